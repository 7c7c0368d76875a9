"""``layout=``: what the caller says of the axes of q, and what is said where axes were guessed."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.models.registry import using
from hookattn.recording.layouts import Layouts
from hookattn.taps.active import current
from tests.reference import draw

PATHS = ("", "blocks", "blocks.0", "blocks.0.attn", "blocks.1", "blocks.1.attn")


class Told(nn.Module):
    """Attention whose tap asks for the layout, and says how it knows the axes."""

    def __init__(self, basis: dict[str, str]) -> None:
        super().__init__()
        self.basis, self.asked = basis, []

    def forward(self, x: Tensor) -> Tensor:
        watch = current()
        with contextlib.nullcontext() if watch is None else watch.aside():
            weights = torch.softmax(x @ x.mT, -1)
            out = weights @ x
            if watch is not None:
                self.asked.append(watch.layout_for(watch.where() or ""))
                watch.record(KernelCall(x, x, x, out, 1.0, "told", weights=weights, basis=self.basis))
        return out


class Model(nn.Module):
    def __init__(self, *bases: dict[str, str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Told(basis)}) for basis in bases)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["attn"](x)
        return x


X = draw(1, 2, 4, 3, seed=0)
GUESSED = {"B": "followed", "H": "guessed", "T": "guessed", "S": "followed", "G": "followed"}
KNOWN = dict.fromkeys("BHTSG", "followed")


def traced(model: nn.Module, **arguments: Any) -> hookattn.Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hookattn.SkippedWarning)
        return hookattn.trace(model, X, **arguments)


def test_the_first_that_fits_a_path_and_a_path_before_any_pattern() -> None:
    found = Layouts({"blocks.*.attn": "BTHD", "blocks.1.attn": "BHTD", "*": "THD"}, PATHS)
    assert [found.of(path) for path in PATHS] == ["THD", "THD", "THD", "BTHD", "THD", "BHTD"]
    assert Layouts({"": "TD"}, PATHS).of("blocks") is None


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"blocks.0.attn": "BTXD"}, "'X' is none of B"),
        ({"blocks.0.attn": "BTTD"}, "T is there twice"),
        ({"blocks.0.attn": "BHT"}, "D is missing"),
        ({"blocks.0.attn": ""}, "T is missing"),
        ({"blocks.7.attn": "BTHD"}, "no module at 'blocks.7.attn'; there are 'blocks', 'blocks.0'"),
        ({"blocks.0.attn": 3}, "expected module paths"),
        ("BTHD", "expected module paths"),
    ],
)
def test_what_names_no_axes_or_no_module_is_refused(layout: Any, message: str) -> None:
    model = Model(KNOWN)
    with pytest.raises(hookattn.SelectionError, match=message):
        hookattn.trace(model, X, layout=layout)
    assert not model.blocks[0]["attn"].asked  # the model has not run
    assert current() is None


def test_taps_are_told() -> None:
    model = Model(KNOWN, KNOWN)
    traced(model, layout={"blocks.1.*": "BHTD"})
    assert [block["attn"].asked for block in model.blocks] == [[None], ["BHTD"]]
    with hookattn.tracing(model, layout={"blocks.0.attn": "HTD"}):
        model(X)
    assert [block["attn"].asked[-1] for block in model.blocks] == ["HTD", None]
    traced(model)
    assert model.blocks[0]["attn"].asked[-1] is None


def test_what_was_said_of_no_call_is_warned_of() -> None:
    model = Model(KNOWN)
    model.norm = nn.LayerNorm(3)
    with pytest.warns(hookattn.GuessedAxesWarning, match=r"layout= names 'norm', where no attention"):
        trace = traced(model, layout={"blocks.0.attn": "BHTD", "norm": "BHTD"})
    assert any("'norm'" in note for note in trace.notes)


def test_it_is_in_the_file_too(tmp_path: Any) -> None:
    model = Model(KNOWN)
    model.norm = nn.LayerNorm(3)
    with pytest.warns(hookattn.GuessedAxesWarning):
        traced(model, layout={"norm": "BHTD"}, to=tmp_path / "run.safetensors")
    assert any("'norm'" in note for note in hookattn.load(tmp_path / "run.safetensors").notes)


def test_guesses_are_warned_of_once_with_the_first_paths_and_shown_beside_the_certificate() -> None:
    model = Model(KNOWN, *[GUESSED] * 5)
    with pytest.warns(hookattn.GuessedAxesWarning) as caught:
        trace = traced(model)
    (said,) = [str(w.message) for w in caught if issubclass(w.category, hookattn.GuessedAxesWarning)]
    assert "blocks.1.attn (H T), blocks.2.attn (H T), blocks.3.attn (H T) and 2 more" in said
    assert 'layout={"blocks.1.attn": "BTHD"}' in said.replace("'", '"')
    assert caught[0].filename == __file__
    assert trace[0].guessed == () and trace[1].guessed == ("H", "T")
    assert "faithful, axes guessed: H T)" in repr(trace[1]) and "guessed" not in repr(trace[0])
    assert trace[1].verdict == "faithful, axes guessed: H T" and trace[0].verdict == "faithful"
    assert "axes guessed in 5" in repr(trace)


def test_what_is_known_is_not_warned_of_and_a_file_says_the_same(tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", hookattn.GuessedAxesWarning)
        trace = traced(Model(KNOWN))
    assert "guessed" not in repr(trace)
    with pytest.warns(hookattn.GuessedAxesWarning):
        trace = traced(Model(GUESSED))
    back = hookattn.load(trace.save(tmp_path / "run.safetensors"))
    assert back[0].basis == GUESSED and repr(back[0]) == repr(trace[0])


class Says(hookattn.Adapter):
    name = "says"
    covers = (__name__,)
    attention: ClassVar[dict[str, str]] = {"Told": "self"}
    layout: ClassVar[dict[str, str]] = {"Told": "BTHD"}


def test_an_adapter_says_it_and_the_caller_has_the_last_word() -> None:
    model = Model(KNOWN, KNOWN)
    with using(Says()):
        traced(model)
        assert [block["attn"].asked for block in model.blocks] == [["BTHD"], ["BTHD"]]
        traced(model, layout={"blocks.1.attn": "BHTD"})
        assert [block["attn"].asked[-1] for block in model.blocks] == ["BTHD", "BHTD"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"Told": "BTXD"}, "says 'Told': 'BTXD', and 'X' is none of B"),
        ({"Told": 3}, "3 is no string of letters"),
        ({"Model": "BTHD"}, "'Model' is not in `attention`"),
        ("BTHD", "has to map class names to the axes of q"),
    ],
)
def test_an_adapter_that_names_no_axes_is_refused(layout: Any, message: str) -> None:
    class Wrong(Says):
        pass

    Wrong.layout = layout
    with pytest.raises(hookattn.BrokenAdapterError, match=message), using(Wrong()):
        pass
