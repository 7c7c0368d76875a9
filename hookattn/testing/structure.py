"""What an adapter says of a model: its sites, their numbers, what it covers, and that nothing is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..attention.kernel_call import FIELDS
from ..models.discovery import within
from ..models.registry import adapter_for, using
from .case import Case, same
from .failure import Failure

_SCALARS = ("scale", "softcap", "causal", "window", "dropout", "dtype", "score", "normalizer")


def sites(case: Case) -> Iterator[Failure]:
    """The adapter finds its sites, at paths that exist."""
    model, plan = case.plan()
    name, kind = case.adapter.name, type(model).__name__
    mend = "`covers` has to have the Python module of the model's classes, and `attention` their names"
    if not plan.sites:
        yield Failure(kind, f"{name} names no site in {kind}", mend=mend)
        return
    if name not in plan.adapters:
        yield Failure(kind, "whose sites", name, f"all sites are of {sorted(plan.adapters)}", mend)
    for key, site in plan.sites.items():
        try:
            there: nn.Module | None = model.get_submodule(site.path)
        except AttributeError:
            there = None
        if id(there) != key:
            yield Failure(site.label, "another module is at this path", mend="hand on the path that `site` was given")
        if not (site.stack and site.kind and site.axes):
            yield Failure(site.label, "stack, kind or axes", "a word for each", str(site))
        if site.module != type(plan.modules[key]).__name__:
            yield Failure(site.label, "the class", type(plan.modules[key]).__name__, repr(site.module))


def layers(case: Case) -> Iterator[Failure]:
    """Layers are numbered, each once, and without gaps."""
    found: dict[tuple[str, str], list[int | None]] = {}
    for site in case.plan()[1].sites.values():
        found.setdefault((site.stack, site.kind), []).append(site.layer)
        if site.layers is not None and site.layer is not None and site.layer >= site.layers:
            yield Failure(site.label, "the layer", f"below {site.layers}", str(site.layer))
    for (stack, kind), numbers in found.items():
        known = [n for n in numbers if n is not None]
        once = len(known) == len(numbers) == len(set(known))
        if not once or (case.every_layer and sorted(known) != list(range(len(known)))):
            expected = f"0 to {len(numbers) - 1}" if case.every_layer else "each once"
            mend = (
                "set the layer in `site`; every_layer=False where only some layers attend"
                if once
                else ("set the layer in `site`")
            )
            yield Failure(f"{stack} {kind}", "the numbers of the layers", expected, f"layers {numbers}", mend)


def covered(case: Case) -> Iterator[Failure]:
    """Every class of the model is covered by the adapter or those beside it."""
    model, plan = case.plan()
    with using(case.adapter, *case.beside):
        kinds = {type(m) for m in model.modules() if adapter_for(m) is None}
    missing = sorted(f"{k.__module__}.{k.__name__}" for k in kinds if not k.__module__.startswith("torch.nn."))
    if case.complete and plan.watch_all:
        suspects = sorted({type(m).__name__ for _, m in plan.suspects})
        mend = (
            "add their modules to `covers` (or an adapter to beside=), their attention to `attention`; complete=False"
        )
        got = f"not covered: {missing}" + (f"; not named: {suspects}" if suspects else "")
        yield Failure(type(model).__name__, "the whole model is watched", "every class covered", got, mend)


def missing(case: Case) -> Iterator[Failure]:
    """Every attention module that ran has a call, or is listed as skipped."""
    model, plan = case.plan()
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
    try:
        case.run(model)
    finally:
        for handle in handles:
            handle.remove()
    made = case.trace(model)
    told = [call.site.path for call in made] + [skipped.path for skipped in made.skipped]
    for path, name in ran.items():
        if not any(within(t, path) or within(path, t) for t in told):
            mend = "name the innermost module in whose forward the kernel runs"
            yield Failure(path or "<model>", f"{name} ran", "a call, or a line in trace.skipped", "neither", mend)
    named = {site.path: site.module for site in plan.sites.values()}
    for one in made.skipped:
        if one.path in named and named[one.path] not in case.skipped:
            mend = "skipped=[…] takes the classes whose attention is known to be unreadable"
            yield Failure(
                one.path or "<model>", f"{named[one.path]} is a site", "a call", f"skipped: {one.reason}", mend
            )


def generic(case: Case) -> Iterator[Failure]:
    """Without the adapter the same calls are seen, with the same fields."""
    model = case.model()
    ours, others = case.trace(model), case.trace(model, generic=True)
    if len(ours) != len(others):
        told = f"{len(ours)} calls with the adapter, {len(others)} without it"
        mine, theirs = {c.site.path for c in ours}, {c.site.path for c in others}
        lost = sorted(p for p in theirs if not any(within(p, m) for m in mine))
        yield Failure(type(model).__name__, told, mend=f"name the classes at {lost} in `attention`" if lost else "")
        return
    for a, b in zip(ours, others, strict=True):
        if not within(b.site.path, a.site.path):
            yield Failure(a.site.label, "where the call is", b.site.label, a.site.label)
        for name in _SCALARS:
            x, y = getattr(a, name), getattr(b, name)
            if not (same(x, y) if isinstance(x, Tensor) else x == y):
                yield Failure(a.site.label, f"{name} with and without the adapter", str(y), str(x))
        for name in FIELDS:
            x, y = a.get(name), b.get(name)
            if not (x is y if x is None or y is None else same(x, y)):
                yield Failure(a.site.label, f"{name} differs with and without the adapter")
