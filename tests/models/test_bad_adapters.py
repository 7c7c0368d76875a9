"""An adapter that is wrong is told by name, with its distribution and the path of the module it was asked about."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import hookattn
from hookattn import Adapter, BrokenAdapterError, Site, UnsupportedConfigError
from hookattn.models import registry


class Att(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.option = "plain"

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return x + scaled_dot_product_attention(q, q, q)[:, 0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Att(), Att()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Good(Adapter):
    name = "theirs"
    covers = (__name__,)
    attention: ClassVar[dict[str, str]] = {"Att": "self"}


class Point:
    """An entry point of an installed distribution."""

    name = "main"
    value = "their_package:ADAPTERS"
    dist = types.SimpleNamespace(name="their-package")

    def __init__(self, *found: Adapter) -> None:
        self.load = lambda: found


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def with_adapters(*found: Adapter) -> None:
        for name, value in (("_adapters", {}), ("_by_module", {}), ("_loaded", False)):
            monkeypatch.setattr(registry, name, value)
        monkeypatch.setattr(registry, "entry_points", lambda group: [Point(*found)])
        registry._changed()

    yield with_adapters
    monkeypatch.undo()
    registry._changed()


def complaint(kind: type[Exception] = BrokenAdapterError, *, option: str = "plain", path: str = "layers.0") -> str:
    """What a trace says; the model is left as it was."""
    model = Model()
    for layer in model.layers:
        layer.option = option  # type: ignore[assignment]
    with pytest.raises(kind) as error:
        hookattn.trace(model, torch.randn(1, 4, 8))
    told = str(error.value)
    assert "'theirs'" in told and "'their-package'" in told and path in told, told
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return told


# Once the plan asks the adapters through `registry.check` and `registry.site_of`.


class RaisesInCheck(Good):
    def check(self, module: nn.Module) -> None:
        raise KeyError("num_heads")


class RaisesInSite(Good):
    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        raise IndexError("list index out of range")


class RaisesInKind(Good):
    def kind(self, path: str, module: nn.Module) -> str:
        raise AttributeError("is_causal")


class RaisesInKnows(Good):
    def knows(self, module: nn.Module) -> bool:
        raise RuntimeError("which module?")


class ReturnsNothing(Good):
    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        return None  # type: ignore[return-value]


class ReturnsAnother(Good):
    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        return dataclasses.replace(super().site(path, module, root), path="elsewhere")


class ReturnsNoWord(Good):
    def kind(self, path: str, module: nn.Module) -> str:
        return None  # type: ignore[return-value]


class ReturnsNoNumber(Good):
    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        return dataclasses.replace(super().site(path, module, root), layer="first")  # type: ignore[arg-type]


class Refuses(Good):
    def check(self, module: nn.Module) -> None:
        if module.option != "plain":
            raise UnsupportedConfigError(f"option={module.option!r}: only 'plain' is known.")


class Everything(Good):
    covers = ("some.other.place",)

    def knows(self, module: nn.Module) -> bool:
        return True


WRONG = [
    (RaisesInCheck(), "check", "KeyError: 'num_heads'"),
    (RaisesInSite(), "site", "IndexError: list index out of range"),
    (RaisesInKind(), "site", "AttributeError: is_causal"),
    (ReturnsNothing(), "site", "returned None, which is no Site"),
    (ReturnsAnother(), "site", "returned a site at 'elsewhere'"),
    (ReturnsNoWord(), "site", "kind=None"),
    (ReturnsNoNumber(), "site", "layer='first'"),
]


@pytest.mark.parametrize(("adapter", "method", "said"), WRONG, ids=lambda x: type(x).__name__)
def test_what_an_adapter_does_wrong_is_told_with_its_name(
    adapter: Adapter, method: str, said: str, install: Any
) -> None:
    install(adapter)
    hookattn.adapters()
    model = Model()
    with pytest.raises(BrokenAdapterError) as error:
        registry.check(adapter, "layers.1", model.layers[1])
        registry.site_of(adapter, "layers.1", model.layers[1], model)
    told = str(error.value)
    assert (
        told.startswith("layers.1: ") and f"`{method}` of the adapter 'theirs' of distribution 'their-package'" in told
    )
    assert said in told


@pytest.mark.parametrize(("adapter", "method", "said"), WRONG, ids=lambda x: type(x).__name__)
def test_a_trace_says_so(adapter: Adapter, method: str, said: str, install: Any) -> None:
    install(adapter)
    told = complaint()
    assert said in told and f"`{method}`" in told


def test_an_option_that_an_adapter_does_not_know(install: Any) -> None:
    install(Refuses())
    hookattn.adapters()
    model = Model()
    model.layers[0].option = "gated"  # type: ignore[assignment]
    with pytest.raises(
        UnsupportedConfigError, match=r"layers\.0: option='gated'.*'theirs' of distribution 'their-pack"
    ):
        registry.check(registry.adapters()["theirs"][0], "layers.0", model.layers[0])
    registry.check(registry.adapters()["theirs"][0], "layers.1", model.layers[1])


def test_a_trace_of_a_model_with_that_option_says_so(install: Any) -> None:
    install(Refuses())
    assert "option='gated'" in complaint(UnsupportedConfigError, option="gated")


def test_one_that_fails_to_tell_what_it_knows(install: Any) -> None:
    install(RaisesInKnows())
    assert "`knows`" in complaint(path=__name__)


def test_one_that_claims_the_modules_of_others(install: Any) -> None:
    install(Everything())
    told = complaint(path=f"{__name__}.Model")
    assert "in none of the modules that it covers (some.other.place)" in told


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("covers", ("",), "covers ''"),
        ("covers", ("*",), r"covers '*'"),
        ("covers", (7,), "covers 7"),
        ("covers", ("torch.nn",), "none of torch"),
        ("covers", ("mine", "torch"), "none of torch"),
        ("attention", ["Att"], "map class names to kinds"),
        ("attention", {"Att": None}, "map class names to kinds"),
        ("attention", {Att: "self"}, "map class names to kinds"),
    ],
)
def test_one_that_matches_everything_or_says_nothing(attribute: str, value: Any, said: str, install: Any) -> None:
    install(type("Wrong", (Good,), {attribute: value})())
    assert said in complaint(path="theirs")


class OldAttention(Att):
    """As an older release calls it."""


def test_a_library_that_is_older_than_the_adapter_thinks(install: Any) -> None:
    """Its classes have other names: they are watched like a model of nobody's, and nothing is lost."""

    class Newer(Good):
        attention: ClassVar[dict[str, str]] = {"NewAttention": "self"}

    install(Newer())
    model = Model()
    model.layers[1] = OldAttention()
    trace = hookattn.trace(model, torch.randn(1, 4, 8))
    assert [c.site.path for c in trace] == ["layers.0", "layers.1"] and trace.faithful
