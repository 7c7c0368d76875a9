"""The conformance suite notices what it is there to notice, and the example of docs/adapters.md passes it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import hookattn
from hookattn.models import registry
from hookattn.testing import AdapterContract, check_clean, check_trace

DOC = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The code of the page, as the module that it says to save it as."""
    source = DOC.read_text().split("```python\n")[1].split("```")[0]
    path = tmp_path_factory.mktemp("doc") / "test_rows.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("test_rows", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_rows"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["test_rows"]


def test_the_check_of_the_page(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    source = DOC.read_text().split("```python\n")[2].split("```")[0]
    exec(compile(source, str(DOC), "exec"), vars(example))
    assert capsys.readouterr().out.startswith("passed - ")


def contract(kind: type[AdapterContract]) -> dict[str, str]:
    """The suite on a class, as pytest runs it: test -> what it complains of."""
    found = {}
    for name in (n for n in dir(kind) if n.startswith("test_")):
        try:
            getattr(kind(), name)()
        except AssertionError as error:
            found[name] = str(error)
    return found


def test_the_example_of_the_page_passes(example: ModuleType) -> None:
    assert contract(example.TestRows) == {}
    with registry.using(example.Rows()):
        made = hookattn.trace(example.RowEncoder(), torch.randn(2, 5, 16))
        gated = example.RowEncoder()
        gated.rows[1].gated = True
        with pytest.raises(hookattn.UnsupportedConfigError, match="gated=True"):
            hookattn.trace(gated, torch.randn(2, 5, 16))
    assert [(c.site.stack, c.site.layer, c.site.axes) for c in made] == [("encoder", i, "residues") for i in range(3)]


# -------------------------------------------------------------------------------------- adapters that are wrong


class Att(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return x + scaled_dot_product_attention(q, q, q)[:, 0]


class Quiet(Att):
    """Attends, and sounds like nothing."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Att(), Quiet(), Att()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Right(hookattn.Adapter):
    name = "right"
    covers = (__name__,)
    attention: ClassVar[dict[str, str]] = {"Att": "self", "Quiet": "self"}


class Forgetful(Right):
    attention: ClassVar[dict[str, str]] = {"Att": "self"}


class Miscounting(Right):
    def site(self, path: str, module: nn.Module, root: nn.Module) -> hookattn.Site:
        return dataclasses.replace(super().site(path, module, root), layer=0)


class Misplacing(Right):
    def site(self, path: str, module: nn.Module, root: nn.Module) -> hookattn.Site:
        return dataclasses.replace(super().site(path, module, root), path="layers.0")


class Meddling(Right):
    def check(self, module: nn.Module) -> None:
        module.been_here = True


class Elsewhere(Right):
    covers = ("some.other.place",)


class OfModel(AdapterContract):
    adapter: ClassVar[hookattn.Adapter] = Right()

    def model(self) -> nn.Module:
        return Model()

    def inputs(self) -> Any:
        return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


def test_the_right_adapter_passes() -> None:
    assert contract(OfModel) == {}


@pytest.mark.parametrize(
    ("adapter", "complaints"),
    [
        (
            Forgetful(),
            {
                "test_layers_are_numbered": "layers [0, 2]",
                "test_the_generic_way_sees_the_same": "2 calls with the adapter, 3 without it",
            },
        ),
        (Miscounting(), {"test_layers_are_numbered": "[0, 0, 0]"}),
        (Misplacing(), {"test_the_adapter_finds_its_sites": "layers.0"}),
        (Meddling(), {"test_tracing_changes_nothing": "been_here"}),
        (Elsewhere(), {"test_the_adapter_finds_its_sites": "names no site", "test_every_class_is_covered": "Quiet"}),
    ],
    ids=lambda x: getattr(type(x), "__name__", "") if isinstance(x, hookattn.Adapter) else "",
)
def test_a_wrong_adapter_is_caught(adapter: hookattn.Adapter, complaints: dict[str, str]) -> None:
    kind = type("OfWrong", (OfModel,), {"adapter": adapter})
    found = contract(kind)
    for name, words in complaints.items():
        assert words in found.get(name, "no complaint"), found


def test_gaps_and_foreign_classes_can_be_declared() -> None:
    kind = type("Declared", (OfModel,), {"adapter": Forgetful(), "every_layer": False})
    assert set(contract(kind)) == {"test_the_generic_way_sees_the_same"}


# ---------------------------------------------------------------------------------------- traces that are wrong


@pytest.fixture
def trace() -> hookattn.Trace:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    made = hookattn.trace(model, (x, torch.ones(5, 5).triu(1).bool()), verify="full")
    # Each field with numbers of its own, as in a file: what is derived would follow what is changed.
    calls = [dataclasses.replace(call, fields={name: call.get(name) for name in call.fields}) for call in made]
    return dataclasses.replace(made, calls=calls)


def edit(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[hookattn.Call], None]:
    def apply(call: hookattn.Call) -> None:
        call.fields[name] = change(getattr(call, name).clone())

    return apply


def poke(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[-1, -1, -1, -1] += value
        return x

    return change


def test_a_sound_trace_passes(trace: hookattn.Trace) -> None:
    check_trace(trace)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("weights", poke(0.01)), "== weights"),
        (edit("scores", poke(0.01)), "== scores"),
        (edit("scores", poke(float("-inf"))), "scores are not finite"),
        (edit("output", poke(0.01)), "weights @ v == output"),
        (edit("v", poke(0.5)), "weights @ v == output"),
        (edit("q", poke(0.5)), "== scores"),
        (edit("k", lambda k: k[:, :, :-1]), "has S=5, others have 4"),
        (edit("k", lambda k: k[:, :1].repeat(1, 3, 1, 1)), "has G=2, others have 3"),
        (lambda c: [edit(x, lambda y: y[:, :1].repeat(1, 3, 1, 1))(c) for x in "kv"], "2 query heads over 3 key heads"),
        (lambda c: setattr(c, "kv_heads", (0, 5)), "kv_heads=(0, 5) for 2 key heads"),
        (edit("mask", lambda m: ~m), "== weights"),
        (edit("mask", lambda m: m.float()), "mask is torch.float32"),
        (edit("mask", lambda m: m[..., :3]), "mask of shape"),
        (edit("q", lambda q: q.double()), "q is torch.float64, its product torch.float32"),
        (edit("v", lambda v: v.double()), "v is torch.float64, its product torch.float32"),
        (edit("v", lambda v: v.requires_grad_()), "v is not detached"),
        (lambda c: setattr(c, "scale", 2.0), "== scores"),
        (lambda c: setattr(c, "softcap", 0.1), "== scores"),
        (lambda c: setattr(c, "certificate", dataclasses.replace(c.certificate, status="unfaithful")), "unfaithful"),
    ],
)
def test_a_changed_field_is_noticed(trace: hookattn.Trace, change: Callable[[Any], None], words: str) -> None:
    change(trace[0])
    with pytest.raises(AssertionError, match=trace[0].site.path) as caught:
        check_trace(trace)
    assert words in str(caught.value)


def test_an_empty_trace_and_a_silent_skip_are_noticed(trace: hookattn.Trace) -> None:
    with pytest.raises(AssertionError, match="no calls"):
        check_trace(hookattn.Trace())
    trace.skipped.append(hookattn.Skipped("somewhere", ""))
    with pytest.raises(AssertionError, match="somewhere"):
        check_trace(trace)


def test_a_trace_of_a_selection_passes() -> None:
    model, x = nn.TransformerEncoderLayer(16, 4, dropout=0.0, batch_first=True), torch.randn(2, 9, 16)
    for more in (
        {"heads": [3, 1]},
        {"queries": slice(-2, None)},
        {"dtype": torch.float16},
        {"capture": ("q", "mask")},
        {"capture": "weights"},
        {"verify": "off"},
    ):
        check_trace(hookattn.trace(model, x, **more))


def test_what_is_left_behind_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    check_clean(model)
    mine = model[0].register_forward_hook(lambda *_: None)
    check_clean(model)  # the user's own hooks are no concern of ours
    mine.remove()
    hook = lambda *_: None  # noqa: E731
    hook.__module__ = "hookattn.models.module_hooks"
    handle = model[0].register_forward_hook(hook)
    with pytest.raises(AssertionError, match="0: a hook is left"):
        check_clean(model)
    handle.remove()
    with hookattn.tracing(model := nn.MultiheadAttention(8, 2)):
        model(*[torch.randn(3, 1, 8)] * 3)
        with pytest.raises(AssertionError, match="still running"):
            check_clean(model)
    check_clean(model)
