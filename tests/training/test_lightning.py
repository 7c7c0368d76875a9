"""The callback in Lightning, by both of its names: what each logger gets; and a training that is the same with it."""

from __future__ import annotations

import csv
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hookattn.errors import InputError, MonitorWarning
from hookattn.training import HeadMonitor, repeated_tokens
from tests.training import read_logs, small
from tests.training.small import Small, explicit

lightning = pytest.importorskip("lightning.pytorch")

from hookattn.training import LightningHeadMonitor  # noqa: E402 - it needs the library

PROMPTS = repeated_tokens(small.VOCABULARY, length=6, batch=3)


def module_of(base: Any = lightning, own_forward: bool = True) -> Any:
    class Module(base.LightningModule):  # type: ignore[misc]
        """The small model, and what explicit math makes of it at each step."""

        def __init__(self) -> None:
            super().__init__()
            self.model = Small()
            self.explicit: dict[int, dict[str, torch.Tensor]] = {}
            self.losses: list[float] = []

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss = self.model(batch, labels=batch)["loss"]
            self.log("loss", loss)
            self.losses.append(float(loss.detach()))
            return loss  # type: ignore[no-any-return]

        def on_train_batch_start(self, *_: Any) -> None:
            if self.global_step not in self.explicit:  # the first of the batches that make a step
                self.explicit[self.global_step] = explicit(self.model, PROMPTS)

        def on_train_end(self) -> None:
            self.explicit[self.global_step] = explicit(self.model, PROMPTS)

        def validation_step(self, batch: torch.Tensor, _: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    if own_forward:
        Module.forward = lambda self, ids: self.model(ids)  # type: ignore[method-assign]
    return Module()


def fit(
    module: Any, steps: int, folder: Path, monitor: Any, base: Any = lightning, validate: bool = False, **options: Any
) -> Any:
    torch.manual_seed(3)
    random.seed(3)
    given = {
        "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "default_root_dir": str(folder), **options,
    }  # fmt: skip
    resume = given.pop("ckpt_path", None)
    callbacks = given.pop("callbacks", [])
    if monitor is not None:
        own = monitor if not isinstance(monitor, HeadMonitor) else LightningHeadMonitor(monitor)
        callbacks = [*callbacks, own]
    trainer = base.Trainer(**given, callbacks=callbacks)
    data = DataLoader(small.data(), batch_size=4)  # type: ignore[arg-type]
    checks = {"val_dataloaders": DataLoader(small.data(8), batch_size=4)} if validate else {}  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|litlogger|num_workers|GPU).*")
        trainer.fit(module, data, ckpt_path=resume, **checks)
    return trainer


def test_every_logger_has_what_explicit_math_has(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    loggers = [
        TensorBoardLogger(tmp_path / "tb"),
        WandbLogger(save_dir=tmp_path / "wb", offline=True),
        CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1),
    ]
    (tmp_path / "wb").mkdir()
    module, monitor = module_of(), HeadMonitor(PROMPTS, every=3, follow=[(1, 2)])
    with pytest.warns(MonitorWarning, match="CSVLogger takes no pictures") as told:
        fit(module, 7, tmp_path, monitor, logger=loggers, accumulate_grad_batches=2)
    wandb.finish()
    assert len([w for w in told if w.category is MonitorWarning]) == 1
    steps = [0, 3, 6, 7]
    assert monitor.history["step"].unique().tolist() == steps
    (file,) = (tmp_path / "csv").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.open()) if row.get("heads/entropy/mean")]
    written = {
        name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in rows[0] if "/" in name
    }
    by_board, board_pictures = read_logs.tensorboard(tmp_path / "tb")
    by_wandb, wandb_pictures = read_logs.wandb(tmp_path / "wb", "trainer/global_step")
    for numbers in (by_board, by_wandb, written):
        for name in ("entropy", "induction", "first_token", "sink"):
            assert set(numbers[f"heads/{name}/mean"]) == set(steps)
            for step in steps:
                expected = module.explicit[step][name]
                for ending, value in (("layer1/head2", expected[1, 2]), ("layer0/min", expected[0].min())):
                    assert numbers[f"heads/{name}/{ending}"][step] == pytest.approx(float(value), abs=3e-6)
    assert "loss" in by_board and "loss" in by_wandb
    for pictures in (board_pictures, wandb_pictures):
        assert set(pictures) == {"heads/atlas"} and set(pictures["heads/atlas"]) == set(steps)
        assert all(pixels.std() > 10 for pixels in pictures["heads/atlas"].values())


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"precision": "64-true"}], ids=str
)
def test_a_training_is_the_same_with_it(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for monitor in (None, HeadMonitor(PROMPTS, every=2)):
        module = module_of()
        fit(module, 5, tmp_path, monitor, **options)
        found.append([module.losses, [x.clone() for x in module.state_dict().values()], torch.rand(2)])
    assert len(found[0][0]) >= 5 and small.equal(found[0], found[1])
    assert monitor is not None and monitor.history["step"].unique().tolist() == [0, 2, 4, 5]


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = HeadMonitor(PROMPTS, every=2)
    fit(module_of(), 8, tmp_path / "once", whole)
    monitor, file = HeadMonitor(PROMPTS, every=2), tmp_path / "x.ckpt"

    class Saving(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(file)
            if trainer.global_step == 7:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(module_of(), 8, tmp_path / "twice", monitor, callbacks=[Saving()])
    again = HeadMonitor(PROMPTS, every=2)
    fit(module_of(), 8, tmp_path / "twice", again, ckpt_path=str(file))
    found = again.history
    assert found["step"].value_counts().to_dict() == dict.fromkeys([0, 2, 4, 5, 6, 8], 8)
    expected = whole.history
    pd.testing.assert_frame_equal(
        found[found["step"] <= 4].reset_index(drop=True), expected[expected["step"] <= 4].reset_index(drop=True)
    )


def test_after_validations(tmp_path: Path) -> None:
    monitor = HeadMonitor(PROMPTS, every=None, to=tmp_path / "heads.csv")
    fit(module_of(), 5, tmp_path, monitor, validate=True, val_check_interval=2)
    assert monitor.history["step"].unique().tolist() == [0, 2, 4, 5]
    assert pd.read_csv(tmp_path / "heads.csv")["step"].nunique() == 4


def test_the_part_that_takes_the_prompts(tmp_path: Path) -> None:
    monitor = HeadMonitor(PROMPTS, every=1)
    with pytest.raises(
        InputError, match="no forward that takes the prompts: say which part of it does, with part= one of 'model'"
    ):
        fit(module_of(own_forward=False), 2, tmp_path, monitor)
    with pytest.raises(InputError, match="part='modle': Module has no such module; it has model"):
        fit(module_of(own_forward=False), 2, tmp_path, LightningHeadMonitor(monitor, part="modle"))
    fit(module_of(own_forward=False), 2, tmp_path, LightningHeadMonitor(monitor, part="model"))
    assert monitor.history["step"].unique().tolist() == [0, 1, 2]
    for wrong in ({"monitor": 3}, {"monitor": monitor, "part": 3}):
        with pytest.raises(InputError):
            LightningHeadMonitor(**wrong)  # type: ignore[arg-type]


def test_what_fails_later_is_told_once(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    class Full(CSVLogger):  # type: ignore[misc]
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if step and "heads/entropy/mean" in metrics:
                raise OSError("disk full")

    monitor = HeadMonitor(PROMPTS, every=1, picture=False)
    with pytest.warns(MonitorWarning, match="disk full") as told:
        fit(module_of(), 4, tmp_path, monitor, logger=Full(tmp_path))
    assert len([w for w in told if w.category is MonitorWarning]) == 1 and monitor.history["step"].nunique() == 5


@pytest.mark.slow
def test_the_other_name_of_lightning(tmp_path: Path) -> None:
    """In a process of its own, as the class is made for what a process has imported."""
    import subprocess

    pytest.importorskip("pytorch_lightning")
    code = """
import sys, torch, pytorch_lightning
from pathlib import Path
from hookattn.training import HeadMonitor, LightningHeadMonitor
assert issubclass(LightningHeadMonitor, pytorch_lightning.Callback) and "lightning.pytorch" not in sys.modules
sys.modules["lightning"] = None
import pytest
pytest.importorskip = lambda name: pytorch_lightning
from tests.training.test_lightning import PROMPTS, fit, module_of
monitor = HeadMonitor(PROMPTS, every=2)
fit(module_of(pytorch_lightning), 3, Path(sys.argv[1]), LightningHeadMonitor(monitor), base=pytorch_lightning)
print(monitor.history["step"].unique().tolist())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, cwd=root, timeout=240,
        env={**__import__("os").environ, "PYTHONPATH": f"{root}:{root / 'adapters'}"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[0, 2, 3]", done.stderr[-2000:]
    assert isinstance(nn.Module(), nn.Module)
