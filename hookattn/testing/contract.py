"""``AdapterContract``: the test class that an adapter's author subclasses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..api import tracing
from ..errors import UnfaithfulWarning
from ..hooks import Plan, make_plan
from ..record import FIELDS
from ..registry import adapter_for, using
from ..trace import Trace
from .calls import check_trace
from .clean import check_clean, state_of


class AdapterContract:
    """What an adapter has to hold to: subclass it, give it an adapter, a model and inputs.

    Attributes:
        adapter: the adapter under test.
        beside: further adapters that the model needs (for the classes that it shares with other families).
        complete: whether these cover every class of the model, so that it is watched at its sites alone.
        every_layer: whether every layer of a stack has a site of each kind, so that they are numbered without gaps.
    """

    adapter: ClassVar[Adapter]
    beside: ClassVar[tuple[Adapter, ...]] = ()
    complete: ClassVar[bool] = True
    every_layer: ClassVar[bool] = True

    def model(self) -> nn.Module:
        """A small model, with weights large enough that its attention is not uniform."""
        raise NotImplementedError

    def inputs(self) -> Any:
        """Inputs of the model, as :func:`hookattn.trace` takes them."""
        raise NotImplementedError

    def test_the_adapter_finds_its_sites(self) -> None:
        model, plan = self._plan()
        assert plan.sites, f"{self.adapter.name} names no site in {type(model).__name__}"
        assert self.adapter.name in plan.adapters, f"all sites are of {sorted(plan.adapters)}"
        for key, site in plan.sites.items():
            assert id(model.get_submodule(site.path)) == key, f"{site.label}: another module is at this path"
            assert site.stack and site.kind and site.axes, f"{site.label}: no stack, kind or axes"
            assert site.module == type(plan.modules[key]).__name__, f"{site.label}: module is {site.module!r}"

    def test_layers_are_numbered(self) -> None:
        layers: dict[tuple[str, str], list[int | None]] = {}
        for site in self._plan()[1].sites.values():
            layers.setdefault((site.stack, site.kind), []).append(site.layer)
            assert site.layers is None or site.layer is None or site.layer < site.layers, f"{site.label}: {site}"
        for (stack, kind), found in layers.items():
            assert None not in found and len(set(found)) == len(found), f"{stack} {kind}: layers {found}"
            assert not self.every_layer or sorted(found, key=int) == list(range(len(found))), (  # type: ignore[arg-type]
                f"{stack} {kind}: layers {found}"
            )

    def test_every_class_is_covered(self) -> None:
        model, plan = self._plan()
        with using(self.adapter, *self.beside):
            kinds = {type(m) for m in model.modules() if adapter_for(m) is None}
        missing = sorted(f"{k.__module__}.{k.__name__}" for k in kinds if not k.__module__.startswith("torch.nn."))
        assert not self.complete or not plan.watch_all, f"covered by no adapter, or not named in it: {missing}"

    def test_tracing_changes_nothing(self) -> None:
        for training in (False, True):
            torch.manual_seed(0)
            model = self.model().train(training)
            plain, before = self._run(model), state_of(model)
            traced = self._trace(model).output
            assert before == state_of(model), f"changed by the trace: {before ^ state_of(model)}"
            check_clean(model)
            pairs = list(zip(_tensors(plain), _tensors(traced), strict=True))
            assert pairs, "the model returns no tensor"
            for i, (a, b) in enumerate(pairs):
                assert _same(a, b), f"train={training}: tensor {i} of the output is not bit-identical when traced"

    def test_nothing_is_left_when_the_forward_raises(self) -> None:
        model, plan = self._plan()
        assert plan.sites, f"{self.adapter.name} names no site in {type(model).__name__}"
        site = list(plan.sites.values())[-1]

        def fail(*_: Any) -> None:
            raise InterruptedError(site.path)

        handle = model.get_submodule(site.path).register_forward_hook(fail)
        before = state_of(model)
        try:
            self._trace(model)
        except InterruptedError:
            pass
        else:
            raise AssertionError(f"{site.label}: the adapter names it as a site, and it never ran")
        assert before == state_of(model), f"changed by the trace: {before ^ state_of(model)}"
        handle.remove()
        check_clean(model)

    def test_the_invariants_hold(self) -> None:
        for training in (False, True):
            torch.manual_seed(0)
            check_trace(self._trace(self.model().train(training)))

    def test_no_attention_is_missing(self) -> None:
        model, plan = self._plan()
        names = {site.module for site in plan.sites.values()}
        paths = {id(m): path for path, m in model.named_modules()}
        ran: dict[str, str] = {}

        def note(module: nn.Module, _: Any) -> None:
            ran[paths[id(module)]] = type(module).__name__

        handles = [
            m.register_forward_pre_hook(note)
            for m in model.modules()
            if type(m).__name__ in names or "attention" in type(m).__name__.lower()
        ]
        self._run(model)
        for handle in handles:
            handle.remove()
        made = self._trace(model)
        told = [call.site.path for call in made] + [skipped.path for skipped in made.skipped]
        for path, name in ran.items():
            assert any(_within(t, path) or _within(path, t) for t in told), (
                f"{path or '<model>'}: {name} ran, and the trace neither has it nor lists it in trace.skipped"
            )

    def test_the_generic_way_sees_the_same(self) -> None:
        torch.manual_seed(0)
        model = self.model()
        ours, generic = self._trace(model), self._trace(model, generic=True)
        assert len(ours) == len(generic), f"{len(ours)} calls with the adapter, {len(generic)} without it"
        for a, b in zip(ours, generic, strict=True):
            assert _within(b.site.path, a.site.path), f"{a.site.label}: the call happened in {b.site.label}"
            for name in ("scale", "softcap", "causal", "window", "dropout", "dtype"):
                x, y = getattr(a, name), getattr(b, name)
                same = _same(x, y) if isinstance(x, Tensor) else x == y
                assert same, f"{a.site.label}: {name} is {x} with the adapter, {y} without it"
            for name in FIELDS:
                x, y = a.get(name), b.get(name)
                same = x is y if x is None or y is None else _same(x, y)
                assert same, f"{a.site.label}: {name} differs with and without the adapter"

    def _plan(self) -> tuple[nn.Module, Plan]:
        torch.manual_seed(0)
        model = self.model()
        with using(self.adapter, *self.beside):
            return model, make_plan(model)

    def _run(self, model: nn.Module) -> Any:
        given = self.inputs()
        torch.manual_seed(1)
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)

    def _trace(self, model: nn.Module, generic: bool = False) -> Trace:
        with using(*(() if generic else (self.adapter, *self.beside))), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfaithfulWarning)
            with tracing(model, verify="full") as made:
                made.output = self._run(model)
            return made


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".") or not outer


def _same(a: Any, b: Any) -> bool:
    """Bit for bit, NaN included."""
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _tensors(x: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in what a model returns, caches included."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return
    seen.add(id(x))
    inner: Any = ()
    if isinstance(x, Tensor):
        yield x.detach()
    elif isinstance(x, Mapping):
        inner = x.values()
    elif isinstance(x, (list, tuple)):
        inner = x
    elif is_dataclass(x) and not isinstance(x, type):
        inner = [getattr(x, f.name) for f in fields(x)]
    elif hasattr(x, "__dict__") and not isinstance(x, (type, nn.Module)) and not callable(x):
        inner = vars(x).values()
    for one in inner:
        yield from _tensors(one, seen)
