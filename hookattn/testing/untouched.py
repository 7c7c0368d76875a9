"""Tracing changes nothing: outputs, gradients, what a forward that raises leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case, NotApplicable, same, tensors
from .clean import check_clean, state_of
from .failure import Failure


def outputs(case: Case) -> Iterator[Failure]:
    """Bit-identical outputs and nothing left, in eval and in train mode (dropout drawn from the same seed)."""
    for training in (False, True):
        model = case.model(training)
        yield from compared(case, model, f"train={training}")


def compared(case: Case, model: nn.Module, when: str, inputs: Any = None) -> Iterator[Failure]:
    """One model and its inputs with and without a trace."""
    plain, before = case.run(model, inputs), state_of(model)
    traced = case.trace(model, inputs).output
    yield from left(model, before, when)
    yield from differ(plain, traced, f"{type(model).__name__}, {when}")


def differ(plain: Any, traced: Any, where: str) -> Iterator[Failure]:
    """Every tensor of two outputs, bit for bit."""
    a, b = ([x.detach() for x in tensors(one)] for one in (plain, traced))
    if not a or len(a) != len(b):
        yield Failure(where, "tensors in the output", str(len(a) or "some"), str(len(b)))
        return
    bad = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not same(x, y)]
    if bad:
        yield Failure(where, f"tensor {bad[0]} of the output is not bit-identical when traced", mend=_MEND)


def left(model: nn.Module, before: set[tuple[Any, ...]], when: str) -> Iterator[Failure]:
    """What a trace left on a model."""
    changed = before ^ state_of(model)
    if changed:
        yield Failure(type(model).__name__, f"changed by the trace ({when})", "nothing", str(sorted(changed, key=str)))
    try:
        check_clean(model)
    except AssertionError as error:
        yield Failure(type(model).__name__, f"left by the trace ({when})", "nothing", str(error))


_MEND = "an adapter only looks: it may not call, change or move a module"


def raising(case: Case) -> Iterator[Failure]:
    """Nothing is left behind when the forward raises."""
    model, plan = case.plan()
    if not plan.sites:
        yield Failure(type(model).__name__, f"{case.adapter.name} names no site in {type(model).__name__}")
        return
    site = list(plan.sites.values())[-1]

    def fail(*_: Any) -> None:
        raise InterruptedError(site.path)

    before = state_of(model)
    handle = model.get_submodule(site.path).register_forward_hook(fail)
    try:
        case.trace(model)
    except InterruptedError:
        pass
    else:
        mend = "name the innermost module in whose forward the kernel runs"
        yield Failure(site.label, "the adapter names it as a site", "that it runs", "it never ran", mend)
    finally:
        handle.remove()
    yield from left(model, before, "its forward raised")


def gradients(case: Case) -> Iterator[Failure]:
    """The gradients are the same, bit for bit."""
    found: list[dict[str, Tensor]] = []
    where = ""
    for traced in (False, True):
        model = case.model()
        where = type(model).__name__
        made = case.trace(model).output if traced else case.run(model)
        roots = [x.float().sum() for x in tensors(made) if x.requires_grad]
        if not roots:
            raise NotApplicable("the output has no gradient")
        try:
            torch.stack(roots).sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if traced:
                raise
            raise NotApplicable(f"no backward pass: {error}") from error
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, ours = found
    if plain.keys() != ours.keys():
        yield Failure(where, "parameters with a gradient", str(len(plain)), str(len(ours)), _MEND)
        return
    bad = [name for name, grad in plain.items() if not same(grad, ours[name])]
    if bad:
        yield Failure(bad[0], f"another gradient when traced ({len(bad)} of {len(plain)} parameters)", mend=_MEND)
