"""The same model with padded inputs, with a cache, in half precision, in train mode: every promise holds there too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case, NotApplicable, tensors
from .clean import state_of
from .failure import Failure
from .invariants import repeated_heads, trace_failures
from .taken import CACHE_NAMES, attempt, find_cache, not_taken
from .untouched import compared, differ, left
from .witness import formed


def invariants(case: Case) -> Iterator[Failure]:
    """The fields of every call fit together, in eval and in train mode."""
    for training in (False, True):
        yield from trace_failures(case.trace(case.model(training)))


def grouped(case: Case) -> Iterator[Failure]:
    """k and v are not repeated for grouped queries."""
    yield from repeated_heads(case.trace(case.model()))


def more_inputs(case: Case) -> Iterator[Failure]:
    """Further inputs of the author's."""
    if not case.more_inputs:
        raise NotApplicable("no more_inputs= were given")
    for name, make in case.more_inputs.items():
        yield from _whole(case, case.model(), make(), name)


def padding(case: Case) -> Iterator[Failure]:
    """Padded on the left and on the right, with an ``attention_mask``: no query attends to the padding."""
    ids = _ids(case)
    if not case.padding:
        raise NotApplicable("padding=False")
    n = ids.shape[1]
    if n < 4:
        raise NotApplicable(f"{n} tokens are too few to pad")
    masks: dict[str, tuple[Tensor, slice]] = {}
    for side, hidden in (("left", slice(0, 2)), ("right", slice(n - 2, n))):
        mask = torch.ones(ids.shape, dtype=torch.long)
        mask[-1, hidden] = 0
        masks[side] = mask, hidden
    named = _named(case)
    if "attention_mask" not in named:
        reason = not_taken(case.model(), named, "attention_mask", [mask for mask, _ in masks.values()])
        if reason:
            raise NotApplicable(f"the model takes no attention_mask: {reason}")
    for side, (mask, hidden) in masks.items():
        inputs = {**_named(case), "attention_mask": mask}
        model = case.model()
        yield from _whole(case, model, inputs, f"padded on the {side}")
        live = mask[-1].bool()
        for call in case.trace(model, inputs):
            b, _, t, s = call.weights.shape
            if call.site.kind == "self" and s == n == t and b == len(ids):
                seen = call.mask.expand(call.weights.shape)[-1][:, live][..., hidden]
                if bool(seen.any()):
                    mend = "take the mask that the kernel gets; padding=False where the model attends to padding"
                    where = f"{call.site.label} (call {call.index}, {call.tap}), padded on the {side}"
                    yield Failure(where, "padding", "hidden by the mask", "it may be attended to", mend)


def half(case: Case) -> Iterator[Failure]:
    """bfloat16 and float16, where the model runs in them on this machine."""
    ran, refused = 0, ""
    for dtype in (torch.bfloat16, torch.float16):
        model, inputs = case.model().to(dtype), _cast(case.make_inputs(), dtype)
        try:
            case.run(model, inputs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            refused = f"{dtype}: {error}".partition("\n")[0]
            continue
        ran += 1
        yield from _whole(case, model, inputs, str(dtype))
    if not ran:
        raise NotApplicable(f"the model does not run in half precision here ({refused})")


def cache(case: Case) -> Iterator[Failure]:
    """A prompt, then one token at a time with the model's cache: each row as in one forward over everything."""
    name = "decoder_input_ids" if "decoder_input_ids" in _named(case) else "input_ids"
    ids = _ids(case, name)
    n = ids.shape[1]
    if n < 4:
        raise NotApplicable(f"{n} tokens are too few for a prompt and two steps")
    rest = {k: v for k, v in _named(case).items() if k not in (name, "use_cache", *CACHE_NAMES)}

    def between(start: int, stop: int) -> dict[str, Any]:
        made = {name: ids[:, start:stop]}
        for key, value in rest.items():
            encoders = name != "input_ids" and not key.startswith("decoder_")  # whole in every step
            made[key] = value if encoders else _cut(key, value, n, start, stop)
        return made

    use = find_cache(case.model(), between(0, n - 2), between(n - 2, n - 1))
    model = case.model()

    def steps() -> list[Any]:
        made: list[Any] = []
        back: dict[str, Any] = {}
        torch.manual_seed(1)
        for start, stop in ((0, n - 2), (n - 2, n - 1), (n - 1, n)):
            made.append(model(**between(start, stop), **use.asked, **back))
            again = use.of(made[-1])
            back = back if again is None else {use.name: again}  # one that is written in place may come back once
        return [next(tensors(x)) for x in made]

    with torch.no_grad():
        plain, before = steps(), state_of(model)
        trace = case.traced(model, steps)
        yield from left(model, before, "with a cache")
        yield from differ(plain, trace.output, "with a cache")
        yield from trace_failures(trace)
        yield from repeated_heads(trace)
        together = trace.stitch()
        once = case.traced(model, lambda: case.run(model, {**rest, name: ids, **dict.fromkeys(use.asked, False)}))
    for want in once:
        mine = [c for c in together if (c.site.path, c.site.kind) == (want.site.path, want.site.kind)]
        where = f"{want.site.label}, with a cache"
        if len(mine) != 1 or mine[0].weights.shape != want.weights.shape:
            got = str([tuple(c.weights.shape) for c in mine])
            yield Failure(where, "the steps put together", f"weights {tuple(want.weights.shape)}", got)
            continue
        live = want.mask.any(-1, keepdim=True)
        worst = torch.where(live, mine[0].weights - want.weights, 0.0).abs().max().item()
        if not worst <= 1e-4:
            mend = "k has to hold the cache, oldest first"
            yield Failure(where, "weights as without a cache", "within 1e-4", f"off by {worst:.3g}", mend)


def _whole(case: Case, model: nn.Module, inputs: Any, when: str) -> Iterator[Failure]:
    """Everything that holds of any run."""
    yield from compared(case, model, when, inputs)
    trace = case.trace(model, inputs)
    paths = {call.site.path for call in trace}
    for call in case.trace(case.model()):
        if call.site.path not in paths:
            reason = next((s.reason for s in trace.skipped if s.path == call.site.path), "nothing")
            yield Failure(f"{call.site.label}, {when}", "a call, as with the plain inputs", "a call", reason)
    yield from trace_failures(trace)
    yield from repeated_heads(trace)
    yield from formed(case, model, trace, inputs)


def _named(case: Case) -> dict[str, Any]:
    """The inputs by name."""
    given = case.make_inputs()
    return dict(given) if isinstance(given, Mapping) else {"input_ids": given}


def _ids(case: Case, name: str = "input_ids") -> Tensor:
    x = _named(case).get(name)
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dim() != 2:
        raise NotApplicable(f"the inputs have no {name}")
    if not isinstance(case.make_inputs(), Mapping):  # one tensor: whether the model takes it by name is to be found out
        try:
            _, refused = attempt(case.model(), {name: x}, name)
        except TypeError as error:  # another name is missing
            refused = str(error)
        if refused:
            raise NotApplicable(f"the model does not take its inputs by the name {name} ({refused})")
    return x


def _cut(name: str, x: Any, n: int, start: int, stop: int) -> Any:
    """What belongs to the tokens of one step; of a mask, to all tokens so far."""
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != n:
        return x
    return x[:, :stop] if "mask" in name else x[:, start:stop]


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, Mapping):
        return {k: _cast(v, dtype) for k, v in x.items()}
    return type(x)(_cast(v, dtype) for v in x) if isinstance(x, (list, tuple)) else x
