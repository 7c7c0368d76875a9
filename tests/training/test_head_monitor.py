"""Heads measured in the midst of a training: the right numbers, and a training that does not notice."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import analyze
from hookattn.errors import HookattnError, InputError, MeasureError, MonitorWarning, SelectionError
from hookattn.training import HeadMonitor, repeated_tokens
from hookattn.training.scalars import layer_names
from hookattn.training.undisturbed import undisturbed
from tests.training import small
from tests.training.small import Small, equal, explicit, train

PROMPTS = repeated_tokens(small.VOCABULARY, length=6, batch=3)


def values(table: pd.DataFrame, measure: str) -> Tensor:
    """L H."""
    return torch.tensor(table.sort_values(["call", "head"])[measure].to_numpy()).view(small.LAYERS, small.HEADS)


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mode", [True, False])
def test_the_numbers_are_those_of_explicit_math(mode: bool) -> None:
    model = Small().train(mode)
    train(model, 3)
    table = HeadMonitor(PROMPTS).measure(model, 3)
    assert table is not None and len(table) == small.LAYERS * small.HEADS and set(table["step"]) == {3}
    for name, expected in explicit(model, PROMPTS).items():
        torch.testing.assert_close(values(table, name), expected, rtol=0, atol=2e-6)
    assert table.attrs["units"] == {"entropy": "nats", "induction": "share", "first_token": "share", "sink": "share"}


class Tokenizer:
    """Letters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 97 for letter in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(97 + i) for i in ids]


def test_texts_of_any_length_weigh_the_same() -> None:
    model, texts = Small(), ["abcabc", "xyxyxyxy", "abab", "qrsqrs"]
    table = HeadMonitor(texts, tokenizer=Tokenizer()).measure(model, 0)
    assert table is not None
    alone = [explicit(model, torch.tensor([Tokenizer()(text)["input_ids"]])) for text in texts]
    for name in ("entropy", "induction", "sink"):
        mean = torch.stack([one[name] for one in alone]).mean(0)
        torch.testing.assert_close(values(table, name), mean, rtol=0, atol=2e-6)


def test_a_prompt_in_which_a_measure_is_not_defined_has_no_part_in_it() -> None:
    model = Small()
    table = HeadMonitor(["abcabc", "abcdef"], tokenizer=Tokenizer()).measure(model, 0)
    assert table is not None
    expected = explicit(model, torch.tensor([[0, 1, 2, 0, 1, 2]]))["induction"]
    torch.testing.assert_close(values(table, "induction"), expected, rtol=0, atol=2e-6)


def test_padding_has_no_part_in_it() -> None:
    from tests import tiny_models

    model, inputs = tiny_models.llama(), tiny_models.padded("left")
    table = HeadMonitor(inputs, measures=["entropy", "first_token"]).measure(model, 0)
    rows = [{"input_ids": inputs["input_ids"][n : n + 1, cut:]} for n, cut in ((0, 0), (1, 3))]
    alone = [analyze.measure(hookattn.trace(model, row), ["entropy", "first_token"]) for row in rows]
    assert table is not None
    for name in ("entropy", "first_token"):
        expected = sum(one[name].to_numpy() for one in alone) / 2
        np.testing.assert_allclose(table[name].to_numpy(), expected, atol=1e-5)


def test_repeated_tokens_are_random_and_the_same_again() -> None:
    ids = repeated_tokens(30, length=7, batch=5, first=3, seed=2)
    assert ids.shape == (5, 15) and bool((ids[:, 0] == 3).all()) and torch.equal(ids[:, 1:8], ids[:, 8:])
    assert all(len(set(row.tolist())) == 8 for row in ids) and int(ids.min()) >= 0 and int(ids.max()) < 30
    state = torch.get_rng_state()
    assert torch.equal(ids, repeated_tokens(30, length=7, batch=5, first=3, seed=2))
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(ids, repeated_tokens(30, length=7, batch=5))
    for wrong in (
        {"vocabulary": 6, "length": 7},
        {"vocabulary": 30, "batch": 0},
        {"vocabulary": 7, "first": 0, "length": 7},
    ):
        with pytest.raises(SelectionError):
            repeated_tokens(**wrong)


# ---------------------------------------------------------------------------------- a training does not notice


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (Small, {}),
    "autocast": (Small, {"autocast": True}),
    "accumulated": (Small, {"accumulated": 2}),
    "checkpointed": (lambda: Small(checkpointed=True), {}),
    "compiled": (lambda: torch.compile(Small(), backend="eager"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_with_measurements_is_the_same_to_the_last_bit(case: str) -> None:
    make, how = CASES[case]
    without = train(make(), 5, **how)
    monitor = HeadMonitor(PROMPTS)
    assert equal(train(make(), 5, monitor.measure, **how), without)
    assert monitor.history["step"].nunique() == 5
    # What is compared is what a measurement would change: it is, without the care that is taken.
    careless = train(make(), 5, lambda model, _: model.eval()(PROMPTS) and model.train(), **how)
    assert not equal(careless, without)


def test_modes_are_put_back_one_by_one_and_no_train_is_called() -> None:
    model = Small()
    model.layers[0].eval()
    before, calls = [m.training for m in model.modules()], len(model.switched)
    HeadMonitor(PROMPTS).measure(model, 0)
    assert [m.training for m in model.modules()] == before and len(model.switched) == calls and len(set(before)) == 2


class Moody(Small):
    """Exchanges a buffer, writes to another, draws from everything, and fails when it is told to."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        self.table = torch.ones(3)
        assert not self.training and not torch.is_grad_enabled() and not self.layers[0].training
        torch.rand(1), random.random(), np.random.rand()
        if self.fails:
            raise ZeroDivisionError("no")
        return super().forward(input_ids, labels)


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_put_back_whatever_the_forward_does(fails: bool) -> None:
    model, monitor = Moody(), HeadMonitor(PROMPTS)
    model.fails = fails
    table, runs = model.table, model.runs.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    if fails:
        with pytest.raises(InputError, match="ZeroDivisionError: no"):
            monitor.measure(model, 0)
        assert monitor.history.empty
    else:
        monitor.measure(model, 0)
    assert model.table is table and torch.equal(model.runs, runs) and model.training and torch.is_grad_enabled()
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], now[0]) and states[1:] == now[1:]
    hookattn.testing.check_clean(model)


def test_a_buffer_that_was_not_written_to_is_not_written_to() -> None:
    model = Small()
    version = model.layers[0].batch_norm.running_mean._version
    HeadMonitor(PROMPTS).measure(model, 0)
    assert model.layers[0].batch_norm.running_mean._version == version
    model.embed.weight.data[0] = torch.nan
    with undisturbed(nn.Sequential(model)):
        pass
    assert model.training


# ------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(("every", "seen", "expected"), [
    (3, range(1, 10), [3, 6, 9]),
    (1, range(1, 4), [1, 2, 3]),
    (5, [1, 1, 1, 5, 5, 7, 12, 14, 15], [5, 12, 15]),  # steps that come twice, and that are jumped over
    (None, range(5), []),
])  # fmt: skip
def test_it_is_due_once_for_each_multiple(every: int | None, seen: Any, expected: list[int]) -> None:
    model, monitor = Small(), HeadMonitor(PROMPTS, every=every, measures="entropy")
    monitor.begin(model, 0)
    found = []
    for step in seen:
        if monitor.due(step):
            found.append(step)
            monitor.measure(model, step)
    assert found == expected


# ------------------------------------------------------------------------------------------------- history


@pytest.mark.parametrize("name", ["heads.parquet", "heads.csv"])
def test_a_history_is_saved_and_gone_on_from(name: str, tmp_path: Path) -> None:
    model, file = Small(), tmp_path / name
    first = HeadMonitor(PROMPTS, to=file, every=2)
    first.begin(model, 0)
    train(model, 6, lambda own, step: first.measure(own, step + 1))
    assert first.save(tmp_path / f"copy-{name}").read_bytes() == file.read_bytes()
    # Killed at step 6, and gone on from a checkpoint of step 4: nothing is there twice, nothing is lost.
    again = HeadMonitor(PROMPTS, to=file, every=2)
    again.begin(model, 4)
    assert again.history["step"].unique().tolist() == [0, 1, 2, 3, 4]
    old, new = first.history, again.history
    pd.testing.assert_frame_equal(new[new["step"] < 4], old[old["step"] < 4])
    again.measure(model, 5)
    again.measure(model, 5)
    assert again.history["step"].value_counts().tolist() == [8] * 6
    third = HeadMonitor(PROMPTS, to=file)
    third.load(file)
    pd.testing.assert_frame_equal(third.history, again.history, check_exact=True)
    assert third.history.attrs["units"]["entropy"] == "nats"


def test_the_table_of_another_training_is_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "heads.parquet"
    for n in range(3):
        monitor = HeadMonitor(PROMPTS, to=file)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            monitor.begin(Small(), 0)
        said = [str(w.message) for w in told if w.category is MonitorWarning]
        assert len(said) == bool(n) and all(f"heads.{n}.parquet" in text for text in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.1.parquet", "heads.2.parquet", "heads.parquet"]


@pytest.mark.parametrize("content", [b"PAR1 no", b"", None])
def test_a_file_that_is_no_history_is_left_alone(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "heads.parquet"
    if content is None:
        pd.DataFrame({"step": [1], "entropy": [2.0]}).to_parquet(file)
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"heads\.parquet"):
        HeadMonitor(PROMPTS, to=file).begin(Small(), 3)
    assert file.read_bytes() == before


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(hookattn.TraceWriteError, match="Create the directory first"):
        HeadMonitor(PROMPTS, to=tmp_path / "none" / "heads.csv").begin(Small(), 0)


def test_a_checkpoint_has_the_history() -> None:
    model, first, second = Small(), HeadMonitor(PROMPTS), HeadMonitor(PROMPTS)
    assert first.history.empty and list(first.history.columns) == list(second.history.columns)
    first.begin(model, 0)
    first.measure(model, 7)
    second.restore(first.state())
    pd.testing.assert_frame_equal(second.history, first.history)
    second.begin(model, 3)
    assert second.history["step"].unique().tolist() == [0, 3]
    for state in (None, {}, {"history": {"step": [1]}}):
        with pytest.raises(InputError):
            second.restore(state)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected step, call"):
        HeadMonitor(PROMPTS, measures="entropy").restore(first.state())


# ------------------------------------------------------------------------------------------------- scalars


def test_curves_are_few_and_the_followed_heads_have_their_own() -> None:
    model = Small()
    monitor = HeadMonitor(PROMPTS, measures=["entropy", analyze.LocalMass(window=2)], follow=[(1, 3), (0, 0)])
    table = monitor.begin(model, 0)
    assert table is not None
    found = monitor.scalars(table)
    kinds = [f"{where}{how}" for where in ("", "layer0/", "layer1/") for how in ("mean", "min", "max")]
    ends = [*kinds, "layer1/head3", "layer0/head0"]
    assert set(found) == {f"heads/{m}/{end}" for m in ("entropy", "local_mass_window_2") for end in ends}
    entropy = values(table, "entropy")
    assert found["heads/entropy/layer1/head3"] == entropy[1, 3] and found["heads/entropy/max"] == entropy.max()
    assert found["heads/entropy/layer0/min"] == entropy[0].min()
    assert found["heads/entropy/layer1/mean"] == pytest.approx(float(entropy[1].mean()))
    every = HeadMonitor(PROMPTS, measures="entropy", follow="all")
    assert len(every.scalars(table)) == 9 + small.LAYERS * small.HEADS


def test_layers_of_several_stacks_are_told_apart() -> None:
    from tests import tiny_models

    inputs = {"input_ids": tiny_models.ids(), "decoder_input_ids": tiny_models.ids(5)}
    table = HeadMonitor(inputs, measures="entropy").measure(tiny_models.t5(), 0)
    assert table is not None
    names = {f"{stack}.layer{n}" for stack in ("encoder.self", "decoder.self", "decoder.cross") for n in range(2)}
    assert set(layer_names(table)) == names


def test_no_two_places_have_one_name() -> None:
    place = {"stack": "main", "kind": "self", "head": 0}
    rows = [(0, 0, "a.x"), (1, 0, "a.y"), (2, 1, "b"), (3, 1, "b"), (4, None, "c d"), (5, 2, "e")]
    table = pd.DataFrame([{**place, "call": call, "layer": layer, "path": path} for call, layer, path in rows])
    assert layer_names(table) == ["layer0.a.x", "layer0.a.y", "layer1.b.2", "layer1.b.3", "c_d", "layer2"]


def test_a_measure_that_some_layers_lack_is_left_out_there() -> None:
    from tests import tiny_models

    inputs = {"input_ids": tiny_models.ids(), "decoder_input_ids": tiny_models.ids(5)}
    monitor = HeadMonitor(inputs, measures=["entropy", "previous_token"])
    table = monitor.measure(tiny_models.t5(), 0)
    assert table is not None
    found = monitor.scalars(table)
    assert "heads/entropy/decoder.cross.layer0/mean" in found
    assert "heads/previous_token/decoder.cross.layer0/mean" not in found
    assert "heads/previous_token/decoder.self.layer0/mean" in found


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"every": 0}, SelectionError, "every=0: expected an int from 1"),
        ({"every": 1.5}, SelectionError, "every=1.5"),
        ({"measures": "entropi"}, SelectionError, "there is no measure 'entropi'; there are entropy"),
        ({"measures": []}, SelectionError, "no measure was named"),
        ({"follow": "some"}, SelectionError, "follow='some': expected one of all"),
        ({"follow": [3]}, SelectionError, "follow=3: expected pairs"),
        ({"prompts": "text"}, InputError, "need the model's tokenizer="),
        ({"prompts": ["a", 3], "tokenizer": Tokenizer()}, InputError, "prompts=3: expected texts"),
        ({"prompts": []}, InputError, "at least one"),
        ({"prompts": ["a", ""], "tokenizer": Tokenizer()}, InputError, "the prompt '' has no tokens"),
        ({"prompts": "a", "tokenizer": lambda text: 1 / 0}, InputError, "the tokenizer does not take the prompt 'a'"),
        ({"prompts": "a", "tokens": ["a"], "tokenizer": Tokenizer()}, InputError, "tokens= are of inputs"),
        ({"tokens": 3}, InputError, "tokens has to be"),
        ({"picture": "no"}, InputError, "picture='no'"),
        ({"strict": 1}, InputError, "strict=1"),
        ({"to": 3}, InputError, "to=3"),
    ],
)
def test_what_is_wrong_is_told_at_once(wrong: dict[str, Any], error: type[HookattnError], said: str) -> None:
    with pytest.raises(error) as caught:
        HeadMonitor(**{"prompts": PROMPTS, **wrong})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "said"),
    [
        (torch.full((1, 8), small.VOCABULARY), {}, InputError, "the model does not take the prompts: IndexError"),
        (torch.arange(8)[None], {}, MeasureError, "induction is defined for no head.*repeated_tokens"),
        (PROMPTS.float(), {}, InputError, "the model does not take the prompts"),
        ({"input_id": PROMPTS}, {}, InputError, "input_id"),
        (PROMPTS, {"follow": [(2, 0)]}, SelectionError, "no such head; layers are 0 to 1, heads 0 to 3"),
        (PROMPTS, {"follow": [(0, 4)]}, SelectionError, "no such head"),
        (PROMPTS, {"measures": "bracket"}, SelectionError, "there is no measure"),
    ],
)
def test_what_does_not_fit_the_model_is_told_by_the_first_measurement(
    prompts: Any, options: dict[str, Any], error: type[HookattnError], said: str
) -> None:
    model = Small()
    with pytest.raises(error, match=said):
        HeadMonitor(prompts, **options).begin(model, 0)
    assert model.training and torch.is_grad_enabled()


def test_no_module_is_told() -> None:
    with pytest.raises(HookattnError, match="Module"):
        HeadMonitor(PROMPTS).measure(3, 0)  # type: ignore[arg-type]
    with pytest.raises(HookattnError):
        HeadMonitor(PROMPTS).measure(nn.Linear(2, 2), 0)
    with pytest.raises(SelectionError, match="step=-1"):
        HeadMonitor(PROMPTS).measure(Small(), -1)
