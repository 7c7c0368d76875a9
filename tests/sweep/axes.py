"""Whether the axes of a call are what they are called, by what the modules themselves say and were given.

The numbers of a trace can be consistent with each other and have two axes exchanged. So heads are compared with the
head counts that the modules around a site and the configuration have, batch and positions with the inputs of the site's
module, kinds with the names of what it was given, steps and layers with their order.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

import hookattn

from .inputs import parts_of

_HEADS = re.compile(
    r"^_?(?!.*(linear|mamba|ssm|index|expert))(\w*_)?(num_)?(n_?)?(attention_|attn_|query_|q_)?heads?(_num|_q|_count)?$"
)
_OTHERS = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "encoder_outputs")


class Given:
    """What each module was given: the shapes of the tensors, and the names of those that are not None."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        self.names: dict[str, set[str]] = defaultdict(set)


def watch_inputs(model: nn.Module, forward: Callable[[], Any]) -> Given:
    """Run a forward, and note what each module of the model is given."""
    given = Given()
    handles = []
    for path, module in model.named_modules():

        def note(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            given.shapes[path] += [tuple(x.shape) for x in _tensors((args, list(kwargs.values())))]
            given.names[path] |= {name for name, x in kwargs.items() if isinstance(x, Tensor)}

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return given


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)


def untrue(model: nn.Module, config: PreTrainedConfig, trace: hookattn.Trace, given: Given) -> list[str]:
    """What the trace calls by a wrong name; each at most once a site."""
    modules = dict(model.named_modules())
    found: list[str] = []
    everywhere = {n for part in parts_of(config, "") for n in _counts(vars(part))}
    last: dict[tuple[str, str, str], int] = {}
    ran: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for call in trace:
        site = call.site
        heads = _around(modules, site.path) or {1, *everywhere}  # what counts no heads has one, as a net's block does
        b, h, t, s = call.weights.shape
        # What a call says it guessed is not called by a wrong name.
        if heads and h not in heads and h not in everywhere and "H" not in call.guessed:
            found.append(f"axes: {h} heads in {site.label}, where there are {sorted(heads)}")
        placed = any(_placed(given.shapes[site.path], b, x) for x in (t, s))
        # A part of an attention that the model computes piece by piece says so.
        part = call.of_queries is not None or call.heads is not None or any("calls" in note for note in call.notes)
        if not placed and not part and "B" not in call.guessed:
            shapes = sorted(set(given.shapes[site.path]))[:3]
            found.append(f"axes: {b} × {t} rows in {site.label}, which was given {shapes}")
        others = given.names[site.path] & set(_OTHERS)
        # Where the keys of both sequences lie end to end, its path alone tells of the kind, and says self.
        merged = any(len(x) > 1 and x[1] == s - t for x in given.shapes[site.path])
        if others and site.kind == "self" and s != t and not merged:
            found.append(f"kind: self in {site.label}, which was given {', '.join(sorted(others))}")
        if call.step != 0:
            found.append(f"step: {call.step} in {site.label}, of one forward")
        place = (site.stack, site.kind, _tower(site.path))
        if site.layer is not None:
            if site.path in ran[place]:  # the layers run once more, as in the steps of a solver
                ran[place].clear()
                last.pop(place, None)
            ran[place].add(site.path)
            if site.layer < last.get(place, 0):
                found.append(f"layer: {site.layer} after {last[place]} in {site.label}")
            last[place] = site.layer
    return list(dict.fromkeys(found))


def _tower(path: str) -> str:
    """The outermost list of layers that a path is in: within it layers count on, through all that it is nested in."""
    return re.split(r"\.?\d+(?:\.|$)", path)[0]


def _counts(values: dict[str, Any]) -> set[int]:
    """The numbers of heads among some attributes."""
    found: set[int] = set()
    for name, value in values.items():
        if _HEADS.search(name):
            found |= {n for n in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(n, int)}
    return found - {True, False} | ({1} if 1 in found else set())


def _around(modules: dict[str, nn.Module], path: str) -> set[int]:
    """What the module at a path and those in it say; failing that, the one around it."""
    while True:
        inside = [m for p, m in modules.items() if p == path or p.startswith(f"{path}.")][:40]
        found = {n for m in inside for n in _counts(vars(m))}
        if found or not path:
            return found
        path = path.rpartition(".")[0]
        if path.rpartition(".")[2].isdigit():
            return found


def _placed(shapes: list[tuple[int, ...]], b: int, t: int) -> bool:
    """Whether the rows of a call are those of some tensor that the module was given: all of it, or in equal windows."""
    rows = [s for s in shapes if len(s) >= 2]
    if not rows:
        return True
    for s in rows:
        for n in {math.prod(s[:-1]), math.prod(s) // max(1, s[1])}:
            if n and (n == b * t or (b * t) % n == 0 or n % (b * t) == 0):
                return True
    return False
