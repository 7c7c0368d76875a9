"""The conformance suite for adapters: what this library promises of a trace, checked on a model of yours.

Subclass :class:`AdapterContract` in a test file, and pytest runs the whole suite::

    class TestMyModel(AdapterContract):
        adapter = MyAdapter()

        def model(self):
            return MyModel(layers=2)

        def inputs(self):
            return torch.arange(5)[None]

The two functions it is made of stand on their own: :func:`check_trace` and :func:`check_clean`. Everything raises
AssertionError, with the path of the call or module. Nothing here needs pytest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .api import trace, tracing
from .attention import sink_column
from .certificate import TOLERANCE
from .errors import UnfaithfulWarning
from .hooks import Plan, make_plan
from .record import FIELDS
from .registry import adapter_for, using
from .taps import patch
from .taps.current import current
from .trace import Call, Trace

_LETTERS = {"q": "BHTD", "k": "BGSD", "v": "BGSE", "scores": "BHTS", "weights": "BHTS", "output": "BHTE"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_NOTHING = 1e-30  # what a masked entry may weigh: exp(-100) is not 0 in float32


def check_trace(trace: Trace) -> None:
    """Check every promise about the fields of a call that the captured fields allow to check.

    Shapes and dtypes fit; scores are finite, and are scale·q·kᵀ, soft-capped, plus bias; weights are the softmax of the
    scores where the mask is True, with the sinks; masked entries weigh nothing; weights times v is the kernel's output
    (without dropout); no certificate is unfaithful; whatever was skipped has a reason.
    """
    assert len(trace), "the trace holds no calls"
    for call in trace:
        where = f"{call.site.label} (call {call.index}, step {call.step}, {call.tap})"
        values = {name: call.get(name) if call.has(name) else None for name in FIELDS}
        sizes = _check_shapes(call, values, where)
        if not trace.selection.get("dtype"):
            for name in ("q", "k", "v", "output"):
                x = values[name]
                assert x is None or x.dtype == call.dtype, f"{where}: {name} is {x.dtype}, the kernel ran in {call.dtype}"
        _check_math(call, values, sizes, where)
        assert call.certificate.status != "unfaithful", f"{where}: {call.certificate}"
    for skipped in trace.skipped:
        assert skipped.reason and skipped.steps, f"{skipped.path}: skipped without a reason or a step"


def _check_shapes(call: Call, values: Mapping[str, Tensor | None], where: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, x in values.items():
        if x is None:
            continue
        assert not x.requires_grad, f"{where}: {name} is not detached"
        assert (x.dtype == torch.bool) is (name == "mask"), f"{where}: {name} is {x.dtype}"
        assert name == "mask" or not x.isnan().any() or name in ("output", "weights"), f"{where}: NaN in {name}"
        if name in _LETTERS:
            letters = _LETTERS[name]
            assert x.dim() == 4, f"{where}: {name} of shape {tuple(x.shape)}, expected {' '.join(letters)}"
            for letter, n in zip(letters, x.shape, strict=True):
                known = sizes.setdefault(letter, n)
                assert known == n, f"{where}: {name} of shape {tuple(x.shape)} has {letter}={n}, others have {known}"
    heads, groups = sizes.get("H"), sizes.get("G")
    if heads and groups and call.kv_heads is None:
        assert heads % groups == 0, f"{where}: {heads} query heads over {groups} key heads"
    elif heads and groups and call.kv_heads is not None:
        assert len(call.kv_heads) == heads, f"{where}: kv_heads={call.kv_heads} for {heads} heads"
        assert max(call.kv_heads) < groups, f"{where}: kv_heads={call.kv_heads} for {groups} key heads"
    if {"B", "H", "T", "S"} <= sizes.keys():
        full = [sizes[letter] for letter in "BHTS"]
        for name, target in (("bias", full), ("mask", full), ("sinks", [*full[:3], 1])):
            x = values[name]
            if x is not None:
                shape = (sink_column(x) if name == "sinks" else x).shape
                assert _broadcasts(shape, target), f"{where}: {name} of shape {tuple(x.shape)} for B H T S = {full}"
    return sizes


def _broadcasts(shape: torch.Size, full: list[int]) -> bool:
    return len(shape) == len(full) and all(n in (1, m) for n, m in zip(shape, full, strict=True))


def _check_math(call: Call, values: Mapping[str, Tensor | None], sizes: Mapping[str, int], where: str) -> None:
    q, k, v, bias, scores, mask, sinks, weights, output = (
        x if x is None or x.dtype == torch.bool else x.double() for x in (values[name] for name in FIELDS))
    unit = max(TOLERANCE.get(x, TOLERANCE[torch.float16]) for x in (
        call.dtype, *(x.dtype for x in values.values() if x is not None and x.is_floating_point())))
    assert scores is None or scores.isfinite().all(), f"{where}: scores are not finite; the mask is not to be in them"
    assert bias is None or bias.isfinite().all(), f"{where}: bias is not finite; the mask is not to be in it"
    if scores is None or mask is None:
        return
    mask = mask.expand_as(scores)
    seen = scores.abs()[mask]
    size = max(1.0, seen.max().item()) if seen.numel() else 1.0
    if q is not None and k is not None and "scores" in call.derivable:
        own = q @ _repeat(k, call, sizes).mT * call.scale
        if call.softcap is not None:
            own = call.softcap * torch.tanh(own / call.softcap)
        own = own if bias is None else own + bias
        _close(own, scores, mask, unit * size, f"{where}: scale·q·kᵀ, soft-capped, plus bias == scores")
    if weights is None:
        return
    live = mask.any(-1, keepdim=True)
    masked = torch.where(mask, scores, -torch.inf)
    if sinks is None:
        expected = torch.softmax(masked, -1)
    else:
        joined = torch.cat([masked, sink_column(sinks).expand(*scores.shape[:3], 1)], -1)
        expected = torch.softmax(joined, -1)[..., :-1]
    _close(expected, weights, live.expand_as(mask), unit * max(1.0, size / 10),
           f"{where}: softmax(where(mask, scores, -inf), sinks) == weights")
    hidden = weights.abs()[~mask & live]
    assert not hidden.numel() or hidden.max() <= _NOTHING, f"{where}: a masked entry weighs {hidden.max().item():.3g}"
    if v is not None and output is not None and not call.dropout:
        largest = max(v.abs().max().item(), 1e-3)
        _close(weights @ _repeat(v, call, sizes), output, live.expand_as(output), unit * largest,
               f"{where}: weights @ v == output")


def _repeat(x: Tensor, call: Call, sizes: Mapping[str, int]) -> Tensor:
    if call.kv_heads is not None:
        return x[:, list(call.kv_heads)]
    return x.repeat_interleave(sizes["H"] // sizes["G"], 1) if "H" in sizes else x


def _close(actual: Tensor, expected: Tensor, at: Tensor, tolerance: float, what: str) -> None:
    gap = torch.where(at, actual - expected, 0.0).abs()
    worst = gap.max().item() if gap.numel() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.3g}, {tolerance:.3g} allowed"  # NaN fails


def check_clean(model: nn.Module) -> None:
    """Check that no hook, patch or function mode of this library is left (no trace may be running elsewhere)."""
    assert current() is None, "a trace is still running in this thread"
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    assert not any(_ours(type(mode)) for mode in modes), "a torch function mode is still open"
    assert not patch._active, f"still exchanged: {[name for _, name in patch._active]}"
    for name in dir(nn.modules.module):
        if name.startswith("_global_") and name.endswith("hooks"):
            left = getattr(nn.modules.module, name)
            assert not any(_ours(hook) for hook in left.values()), f"left in torch.nn.modules.module.{name}"
    for path, module in model.named_modules():
        state = vars(module)
        assert not _ours(state.get("forward")), f"{path or '<model>'}: forward is still replaced"
        ids = {key for name in _HOOKS for key in state[name]}
        for name in _HOOKS:
            assert not any(_ours(hook) for hook in state[name].values()), f"{path or '<model>'}: a hook is left in {name}"
        for name in _FLAGS:
            assert set(state[name]) <= ids, f"{path or '<model>'}: {name} speaks of a hook that is gone"


def _ours(x: Any) -> bool:
    return str(getattr(x, "__module__", "")).split(".")[0] == __name__.split(".")[0]


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
                f"{stack} {kind}: layers {found}")

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
            plain, before = self._run(model), _state(model)
            traced = self._trace(model).output
            assert before == _state(model), f"changed by the trace: {before ^ _state(model)}"
            check_clean(model)
            pairs = list(zip(_tensors(plain), _tensors(traced), strict=True))
            assert pairs, "the model returns no tensor"
            for i, (a, b) in enumerate(pairs):
                assert _same(a, b), f"train={training}: tensor {i} of the output is not bit-identical when traced"

    def test_nothing_is_left_when_the_forward_raises(self) -> None:
        model, plan = self._plan()
        site = list(plan.sites.values())[-1]

        def fail(*_: Any) -> None:
            raise InterruptedError(site.path)

        handle = model.get_submodule(site.path).register_forward_hook(fail)
        before = _state(model)
        try:
            self._trace(model)
        except InterruptedError:
            pass
        else:
            raise AssertionError(f"{site.label}: the adapter names it as a site, and it never ran")
        assert before == _state(model), f"changed by the trace: {before ^ _state(model)}"
        handle.remove()
        check_clean(model)

    def test_the_invariants_hold(self) -> None:
        for training in (False, True):
            torch.manual_seed(0)
            check_trace(self._trace(self.model().train(training)))

    def test_no_attention_is_missing(self) -> None:
        model, plan = self._plan()
        names = {site.module for site in plan.sites.values()}
        ran: dict[str, str] = {}
        handles = [m.register_forward_pre_hook(lambda m, _, path=path: ran.setdefault(path, type(m).__name__))
                   for path, m in model.named_modules() if type(m).__name__ in names or "atten" in type(m).__name__.lower()]
        self._run(model)
        for handle in handles:
            handle.remove()
        made = self._trace(model)
        told = [call.site.path for call in made] + [skipped.path for skipped in made.skipped]
        for path, name in ran.items():
            assert any(_within(t, path) or _within(path, t) for t in told), (
                f"{path or '<model>'}: {name} ran, and the trace neither has it nor lists it in trace.skipped")

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
    return bool(torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


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


def _state(model: nn.Module) -> set[tuple[Any, ...]]:
    """What a trace could leave behind: attributes, hooks, mode, and whether a parameter was written to."""
    found: set[tuple[Any, ...]] = set()
    for path, module in model.named_modules():
        state = vars(module)
        found.add((path, "attributes", *sorted(state)))
        found.add((path, "training", module.training))
        found.update((path, name, len(state[name])) for name in _HOOKS)
    found.update((name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters())
    return found


__all__ = ["AdapterContract", "check_clean", "check_trace"]
