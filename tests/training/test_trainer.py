"""The callback in transformers' Trainer: what it logs, read back; and a training that is the same with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hookattn.errors import InputError, MeasureError, MonitorWarning
from hookattn.training import HeadMonitor, TrainerHeadMonitor, repeated_tokens
from tests.training import read_logs, small
from tests.training.small import Small, explicit

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PROMPTS = repeated_tokens(small.VOCABULARY, length=6, batch=3)
STEP = "train/global_step"


class Explicit(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """What explicit math makes of the weights at each step, beside the monitor."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, torch.Tensor]] = {}
        self.logged: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps[state.global_step] = explicit(model, PROMPTS)

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        self.on_step_end(*given, **more)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append(dict(logs))


def trainer_of(folder: Path, steps: int, model: Any = None, callbacks: Any = (), **options: Any) -> Any:
    given = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 2,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 3, "disable_tqdm": True,
        "learning_rate": 1e-2, "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in small.data()]
    arguments = transformers.TrainingArguments(**given)
    return transformers.Trainer(model or Small(), arguments, train_dataset=rows, callbacks=list(callbacks))


def test_the_logs_have_what_explicit_math_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    beside = Explicit()
    trainer = trainer_of(
        tmp_path, 7, callbacks=[beside], report_to=["tensorboard", "wandb"], gradient_accumulation_steps=2
    )
    monitor = HeadMonitor(PROMPTS, every=3, follow=[(1, 2)])
    assert TrainerHeadMonitor(monitor).add_to(trainer) in trainer.callback_handler.callbacks
    trainer.train()
    wandb.finish()
    steps = [0, 3, 6, 7]
    assert monitor.history["step"].unique().tolist() == steps
    for read in (read_logs.tensorboard(tmp_path), read_logs.wandb(tmp_path, STEP)):
        numbers, pictures = read
        own = {name for name in numbers if "/heads/" in name}
        assert own == {f"train/{name}" for name in monitor.scalars(monitor.history[monitor.history["step"] == 7])}
        for name in ("entropy", "induction", "first_token", "sink"):
            for step in steps:
                expected = beside.steps[step][name]
                assert numbers[f"train/heads/{name}/layer1/head2"][step] == pytest.approx(
                    float(expected[1, 2]), abs=3e-6
                )
                assert numbers[f"train/heads/{name}/layer0/max"][step] == pytest.approx(
                    float(expected[0].max()), abs=3e-6
                )
                assert numbers[f"train/heads/{name}/mean"][step] == pytest.approx(float(expected.mean()), abs=3e-6)
            assert set(numbers[f"train/heads/{name}/mean"]) == set(steps)
        assert set(pictures) == {"train/heads/atlas"} and set(pictures["train/heads/atlas"]) == set(steps)
        for pixels in pictures["train/heads/atlas"].values():
            assert pixels.shape[2] == 3 and pixels.std() > 10
        assert "train/loss" in numbers  # the trainer's own numbers are there as well
    assert "heads/" not in capsys.readouterr().out, "hundreds of numbers are printed"
    assert not any("heads/" in name for entry in trainer.state.log_history for name in entry)
    assert [name for logs in beside.logged for name in logs if name == "heads/entropy/mean"] == [
        "heads/entropy/mean"
    ] * 4
    table = pd.read_parquet(tmp_path / "heads.parquet")
    pd.testing.assert_frame_equal(table, pd.DataFrame(monitor.history), check_exact=True)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_training_is_the_same_with_it(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for n in range(2):
        trainer = trainer_of(tmp_path / str(n), 6, logging_steps=1, **options)
        if n:
            TrainerHeadMonitor(HeadMonitor(PROMPTS, every=2)).add_to(trainer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append([losses, [x.clone() for x in trainer.model.state_dict().values()], torch.rand(2)])
    assert len(found[0][0]) == 6 and small.equal(found[0], found[1])


def test_a_model_in_autocast_is_measured_as_it_trains(tmp_path: Path) -> None:
    dtypes = set()

    class Watched(Small):
        def forward(self, input_ids: Any, labels: Any = None) -> Any:
            made = super().forward(input_ids, labels)
            if not self.training:
                dtypes.add((torch.is_autocast_enabled("cpu"), self.layers[0].qkv(self.embed(input_ids)).dtype))
            return made

    trainer = trainer_of(tmp_path, 2, Watched(), bf16=True)
    TrainerHeadMonitor(HeadMonitor(PROMPTS, every=1)).add_to(trainer)
    trainer.train()
    assert dtypes == {(True, torch.bfloat16)}


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = HeadMonitor(PROMPTS, every=2)
    once = trainer_of(tmp_path / "once", 10)
    TrainerHeadMonitor(whole).add_to(once)
    once.train()

    class Killed(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    first = trainer_of(tmp_path / "twice", 10, **options)
    monitor = HeadMonitor(PROMPTS, every=2)
    TrainerHeadMonitor(monitor).add_to(first)
    first.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert monitor.history["step"].max() == 6
    second = trainer_of(tmp_path / "twice", 10, **options)
    again = HeadMonitor(PROMPTS, every=2)
    TrainerHeadMonitor(again).add_to(second)
    second.train(resume_from_checkpoint=True)
    pd.testing.assert_frame_equal(again.history, whole.history, check_exact=True)


def test_at_evaluations(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 6)
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.eval_strategy, trainer.args.eval_steps = transformers.trainer_utils.IntervalStrategy("steps"), 2
    monitor = HeadMonitor(PROMPTS, every=None)
    TrainerHeadMonitor(monitor).add_to(trainer)
    trainer.train()
    assert monitor.history["step"].unique().tolist() == [0, 2, 4, 6]
    trainer.evaluate()
    assert len(monitor.history) == 4 * 8


class Failing(Small):
    """Has no room for the second and third measurement."""

    measured = 0

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        self.measured += not self.training
        if not self.training and self.measured in (2, 3):
            raise MemoryError("no room")
        return super().forward(input_ids, labels)


def test_what_fails_later_is_told_once_and_the_training_goes_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 6, Failing())
    monitor = HeadMonitor(PROMPTS, every=2)
    TrainerHeadMonitor(monitor).add_to(trainer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    (said,) = [str(w.message) for w in told if w.category is MonitorWarning]
    assert "step 2" in said and "MemoryError: no room" in said and trainer.state.global_step == 6
    assert monitor.history["step"].unique().tolist() == [0, 6]
    strict = trainer_of(tmp_path, 6, Failing())
    TrainerHeadMonitor(HeadMonitor(PROMPTS, every=2, strict=True, to=tmp_path / "x.csv")).add_to(strict)
    with pytest.raises(MemoryError):
        strict.train()


def test_a_logger_that_fails_ends_nothing(tmp_path: Path) -> None:
    class Full(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.global_step and "heads/entropy/mean" in logs:
                raise OSError("disk full")

    trainer = trainer_of(tmp_path, 4, callbacks=[Full()])
    monitor = HeadMonitor(PROMPTS, every=1)
    TrainerHeadMonitor(monitor).add_to(trainer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    (said,) = [str(w.message) for w in told if w.category is MonitorWarning]
    assert "Full did not take the measures of heads at step 1: OSError: disk full" in said
    assert monitor.history["step"].nunique() == 5


def test_what_is_wrong_is_told_before_the_first_step(tmp_path: Path) -> None:
    for monitor, error in (
        (HeadMonitor(torch.full((1, 4), 99)), InputError),
        (HeadMonitor(torch.arange(6)[None]), MeasureError),
    ):
        trainer = trainer_of(tmp_path, 3)
        TrainerHeadMonitor(monitor).add_to(trainer)
        with pytest.raises(error):
            trainer.train()
        assert trainer.state.global_step == 0
    alone = trainer_of(tmp_path, 3, callbacks=[TrainerHeadMonitor(HeadMonitor(PROMPTS))])
    with pytest.raises(InputError, match=r"add_to\(trainer\)"):
        alone.train()
    for wrong in (lambda: TrainerHeadMonitor(PROMPTS), lambda: TrainerHeadMonitor(HeadMonitor(PROMPTS)).add_to(3)):
        with pytest.raises(InputError):
            wrong()


def test_a_logger_that_takes_no_pictures_is_told_once(tmp_path: Path) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    class Plain(INTEGRATION_TO_CALLBACK["flyte"]):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def on_log(self, *_: Any, **__: Any) -> None:
            pass

        def on_save(self, *_: Any, **__: Any) -> None:
            pass

        def on_train_end(self, *_: Any, **__: Any) -> None:
            pass

    trainer = trainer_of(tmp_path, 3, callbacks=[Plain()])
    TrainerHeadMonitor(HeadMonitor(PROMPTS, every=1)).add_to(trainer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    (said,) = [str(w.message) for w in told if w.category is MonitorWarning]
    assert "Plain takes no pictures" in said and np.isfinite(trainer.state.global_step)
