"""Arguments of public functions: a path where a trace is expected, what is refused by name, tokens that fit no call.

``tests/attack/arguments.py`` tries every argument of every public function; here stands what each kind of mistake says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import analyze, checks, render
from hookattn.errors import (
    FieldNotCaptured,
    ForeignFileError,
    HookattnError,
    InputError,
    MeasureError,
    NoSuchCallError,
    NoSuchFieldError,
    SelectionError,
    TraceFileError,
    UnfitTokensWarning,
)
from hookattn.interop.bertviz import to_bertviz
from hookattn.interop.circuitsvis import to_circuitsvis
from tests.attack import argument_values, arguments
from tests.attack.argument_targets import Target, stage


class Net(nn.Module):
    """Two layers of causal attention over tokens of width 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(3 * x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(x.shape)


X = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(1))


def made(**options: Any) -> hookattn.Trace:
    return hookattn.trace(Net(), X, **options)


# ------------------------------------------------------------------------------------------------ traces and files

TAKE_A_PATH: list[Callable[[Any], Any]] = [
    analyze.report,
    analyze.rollout,
    analyze.received,
    analyze.aggregate,
    analyze.distance_decay,
    analyze.value_weighted,
    analyze.Entropy(),
    analyze.variability,
    lambda t: analyze.variability([t, t]),
    lambda t: analyze.compare(t, t),
    lambda t: analyze.measure(t, "sink"),
    lambda t: analyze.pool_words(t, [0, 0, 1]),
    hookattn.testing.check_trace,
]


@pytest.mark.parametrize("function", TAKE_A_PATH)
def test_a_path_is_read_where_a_trace_is_taken(function: Callable[[Any], Any], tmp_path: Path) -> None:
    trace = made()
    path = trace.save(tmp_path / "x.safetensors")
    for given in (path, Path(path)):
        assert repr(function(given)).replace(path, "") == repr(function(trace))
    (tmp_path / "no.txt").write_text("no trace")
    for wrong, error in ((tmp_path / "no.txt", ForeignFileError), (tmp_path / "none", TraceFileError)):
        with pytest.raises(error):
            function(wrong)
    for other in (3, None, trace[0], b"x", trace.calls[0].weights):
        with pytest.raises(InputError, match=r"(trace|traces|a)=.*: expected a Trace, or the path of a trace file"):
            function(other)


@pytest.mark.parametrize("name", ["distance", "heads", "heatmap", "layers", "lens", "neuron", "plotly"])
def test_a_figure_takes_a_path(name: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly" if name == "plotly" else "matplotlib")
    draw, path = getattr(render, name), made().save(tmp_path / "x.safetensors")
    assert draw(path, layer=0, heads=0) is not None
    with pytest.raises(InputError, match="trace=3: expected a Trace, or the path"):
        draw(3)


def test_what_stands_below_files_says_how_to_open_one(tmp_path: Path) -> None:
    path = made().save(tmp_path / "x.safetensors")
    for function in (to_bertviz, to_circuitsvis, hookattn.statistics.merge):
        with pytest.raises(InputError, match=r"expected a Trace \(hookattn.load\(path\) opens a file\)"):
            function(path)  # type: ignore[arg-type,operator]


def test_paths_that_are_none(tmp_path: Path) -> None:
    for wrong in ("a\0b", "", "\ud800"):
        with pytest.raises(TraceFileError, match="path="):
            hookattn.load(wrong)
        with pytest.raises(TraceFileError, match="to="):
            made(to=wrong)
    for other in (b"x", 3, None):
        with pytest.raises(InputError, match=r"path=.*: expected the path of a file"):
            hookattn.load(other)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ what is selected

SELECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"layer": "a"}, "layer='a': expected an int or several ints"),
    ({"layer": [None]}, "layer=None: expected an int"),
    ({"layer": True}, "layer=True: expected an int"),
    ({"layer": torch.tensor([True, False])}, "layer=True: expected an int"),
    ({"layer": torch.zeros(2, device="meta")}, "layer=.*: expected an int"),
    ({"step": 1.5}, "step=1.5: expected an int"),
    ({"step": []}, "no call fits"),
    ({"step": 10**20}, "no call fits"),
]


@pytest.mark.parametrize(("asked", "said"), SELECTIONS)
def test_a_selection_of_no_calls(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(SelectionError, match=said):
        made().select(**asked)


def test_ints_of_any_library_select() -> None:
    trace = made()
    for layer in (1, np.int64(1), torch.tensor(1), torch.tensor([1]), (x for x in [1]), range(1, 2), np.array([-1])):
        assert [c.site.layer for c in trace.select(layer=layer)] == [1]  # type: ignore[arg-type]
    assert trace[np.int64(-1)] is trace[1]  # type: ignore[call-overload]
    assert hookattn.statistics.TopK(np.int64(3)) == hookattn.statistics.TopK(3)  # type: ignore[arg-type]
    assert type(hookattn.statistics.TopK(np.int64(3)).k) is int  # type: ignore[arg-type]


def test_calls_and_fields_that_are_not_there() -> None:
    trace = made()
    for key in (2, -3, 10**20):
        with pytest.raises(NoSuchCallError, match=r"the trace has 2 calls") as error:
            trace[key]
        assert isinstance(error.value, IndexError)
    for other in (True, None, 1.5, b"layers.0"):
        with pytest.raises(SelectionError, match="expected a position"):
            trace[other]  # type: ignore[call-overload]
    with pytest.raises(SelectionError, match="step is not 0"):
        trace[::0]
    with pytest.raises(NoSuchFieldError, match="no field 'wieghts'") as missing:
        trace[0].get("wieghts")
    assert isinstance(missing.value, AttributeError)
    with pytest.raises(InputError, match="name=None: expected the name of a field"):
        trace[0].get(None)  # type: ignore[arg-type]
    with pytest.raises(FieldNotCaptured, match=r"'entropy' of layers.0 was not kept"):
        trace[0].place("entropy")
    with pytest.raises(SelectionError, match="one of scores, weights"):
        trace[0].derived("wieghts")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queries": slice(None, None, 0)}, "step is not 0"),
        ({"queries": slice(True, None)}, "a slice of ints"),
        ({"strict": "no"}, "strict='no': expected True or False"),
        ({"copy": 1.5}, "copy=1.5: expected True or False"),
        ({"strict": None}, "strict=None: expected True or False"),
        ({"verify": torch.zeros(3)}, "verify=.*expected one of sample, full, off; got Tensor"),
        ({"device": "meta"}, "device='meta': expected a device that holds values"),
        ({"device": True}, "device=True: expected a torch.device"),
        ({"device": 10**20}, "there is no such device here"),
    ],
)
def test_options_of_a_trace(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HookattnError, match=said):
        made(**options)


def test_a_trace_is_not_true_of_text() -> None:
    """Nothing that merely counts as True is a flag."""
    for wrong in ("no", 1, 0, None, [], np.array([True])):
        with pytest.raises(InputError, match=r"compact=.*: expected True or False"):
            made().save("never", compact=wrong)  # type: ignore[arg-type]
    assert checks.flag("x", np.False_) is False


@pytest.mark.parametrize("value", [float("nan"), True, "1", None, torch.tensor([0.5]), 2, -1, 10**400])
def test_numbers_out_of_range(value: Any) -> None:
    with pytest.raises(SelectionError, match=r"residual=.*: expected a share from 0, below 1"):
        analyze.rollout(made(), residual=value)


def test_padding_that_says_nothing() -> None:
    trace = made()
    for wrong in ("x", [[0.5, 1, 1]] * 2, torch.full((2, 3), torch.nan), torch.ones(2, 3, 1), [[]]):
        with pytest.raises(MeasureError, match="real="):
            analyze.measure(trace, "sink", real=wrong)
    with pytest.raises(MeasureError, match="real= has shape"):  # though it is not looked at here
        analyze.neuron_contributions(trace, 1, real=[[1, 1, 1, 1]])


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["a"] * 9, "tokens= fit no call: lists of 9 for the 3 keys of layers.0"),
        ([["a"] * 3] * 5, "5 lists for the 2 batch entries of layers.0"),
        ([["a"] * 3, ["b"] * 2], "lists of 2 and 3 for the 3 keys"),
        ({"decoder": ["a"] * 3}, "tokens= names decoder, and the stacks that attended are main"),
        ({"main": ["a"] * 4}, "tokens= for 'main' fit no call: lists of 4 for the 3 keys"),
    ],
)
def test_tokens_that_fit_no_call_are_told(tokens: Any, said: str, tmp_path: Path) -> None:
    with pytest.warns(UnfitTokensWarning, match=said):
        trace = made(tokens=tokens)
    assert any(said in note for note in trace.notes) and len(trace) == 2
    with pytest.warns(UnfitTokensWarning, match=said):
        made(tokens=tokens, to=tmp_path / "x.safetensors")
    assert any(said in note for note in hookattn.load(tmp_path / "x.safetensors").notes)


@pytest.mark.parametrize("tokens", [list("abc"), [list("abc")] * 2, {"main": list("abc")}, np.array(list("abc"))])
def test_tokens_that_fit_are_kept_in_silence(tokens: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made(tokens=tokens).tokens is not None
        assert made(tokens=(x for x in "abc")).tokens == [list("abc")]
        hookattn.trace(Net(), X, tokens=list("abc"), capture="lse")  # nothing tells how many keys there are


@pytest.mark.parametrize("wrong", ["abc", b"abc", [1, 2, 3], [["a", None]], [], [[]], {"main": "abc"}, {"a", "b"}, 3])
def test_what_are_no_tokens(wrong: Any) -> None:
    with pytest.raises(InputError, match="tokens has to be a list of strings"):
        made(tokens=wrong)


def test_tokens_of_a_generation_fit() -> None:
    on = stage()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfitTokensWarning)
        with hookattn.tracing(on.model, tokens=["x"] * 7), torch.no_grad():
            on.model.generate(on.inputs[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_labels_of_a_figure_are_as_many_as_its_keys() -> None:
    trace = made()
    for name in ("tokens", "key_tokens"):
        with pytest.raises(InputError, match=f"{name} has 9 labels, and layers.0 has 3 keys"):
            to_circuitsvis(trace, layer=0, **{name: ["a"] * 9})  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ the attack itself


def test_the_attack_sees_what_gets_through() -> None:
    def run(_: Any, given: Any) -> Any:
        if given["x"] == "nonsense":
            raise AttributeError("'str' object has no attribute 'calls'")
        if given["x"] is None:
            raise ValueError("nothing about it")
        if given["x"] == "":
            raise TypeError("x has to be something")

    target = Target("f", run, {"x": "flag"})
    for label, what in (
        ("nonsense", "bare"), ("None", "bare"), ("bytes", "silent"), ("empty text", "clean"), ("True", "fine")
    ):  # fmt: skip
        assert arguments._outcome(stage(), target, "x", label)[0] == what
    assert list(arguments._not_attacked([]))  # every argument is missed where nothing is attacked
    kinds = {kind for target in arguments.targets() for kind in target.kinds.values()}
    assert kinds <= set(argument_values.TAKES)
    assert set().union(*argument_values.TAKES.values()) <= set(argument_values.VALUES)
