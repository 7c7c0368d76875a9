"""An independent look at a forward: which modules computed a softmax or ran a fused attention kernel.

It looks below the library under test, at the operators that torch dispatches, and at the names of the modules that ran.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from hookattn.models.discovery import within

_KERNELS = re.compile(
    r"aten\._?(safe_)?softmax|aten\._scaled_dot_product|aten\._native_multi_head|aten\._transformer_encoder|aten\._flash_attention|flex_attention"
)
_ATTENTION = re.compile(r"(?i:attention|attn)")
_PART = re.compile(
    r"(?i:output|projection|bias|mask|norm|mlp|dropout|loss|pool|layer$|block$|router|embed|model|encoder|decoder|head$|stack|feed|gate|conv)"
)
# A softmax that weighs something else than keys: experts, codes, classes, boxes.
_NOT_ATTENTION = re.compile(
    r"(?i:router|gate$|gating|topk|moe|expert|quantiz|classif|predict|head$|loss|integral|distribution|lmhead|sparsemlp|feedforward|ffn|hyperconn|mixer$|mlp)"
)
# Classes with a softmax of their own that is no attention, where the name does not tell.
_ELSEWHERE = {
    "Ovis2VisionModel": "visual words are a softmax over a vocabulary",
    "GraniteSpeech5Encoder": "letters that a head in the middle predicts, fed back",
    "GraniteSpeechCTCEncoder": "letters that a head in the middle predicts, fed back",
    "GraniteSpeechPlusCTCEncoder": "letters that a head in the middle predicts, fed back",
    "AttentiveStatisticsPooling": "statistics over time, weighed by a convolution",
    "LogBinomialSoftmax": "bins of depth",
    "SuperPointInterestPointDecoder": "where in a cell a keypoint is",
    "BltPatcher": "the entropy of the next byte",
    "VitsConvFlow": "widths and heights of a spline",
    "RwkvFeedForward": "a feed forward that a name matches",
}


@dataclass
class Seen:
    """What ran: path -> (class name, how many of which operator), and the innermost modules named after attention."""

    kernels: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    attention: dict[str, str] = field(default_factory=dict)

    def uncovered(self, captured: Iterable[str], skipped: Iterable[str]) -> list[str]:
        """What ran and is under, around or at no captured or skipped path, or ran more often than it was captured."""
        calls, left_out = Counter(captured), set(skipped)
        known = {*calls, *left_out}
        found = []
        for (path, cls, op), n in self.kernels.items():
            if not _covered(path, known) and not _NOT_ATTENTION.search(cls) and cls not in _ELSEWHERE:
                found.append(f"{op} × {n} in {path or '<model>'} ({cls})")
        for path, n in calls.items():
            ran = sum(
                m for (p, cls, _), m in self.kernels.items() if within(p, path) and not _NOT_ATTENTION.search(cls)
            )
            if ran > n and not any(within(path, s) or within(s, path) for s in left_out):
                found.append(f"{ran} softmaxes or kernels in {path or '<model>'}, and {n} calls")
        for path, cls in self.attention.items():
            if not _covered(path, known):
                found.append(f"{path} ({cls}) ran")
        return found


def _covered(path: str, known: set[str]) -> bool:
    """Whether it is in a known place, around one, or beside one (a softmax that is a module of its own)."""
    parent, _, leaf = path.rpartition(".")
    beside = leaf in ("softmax", "attn_softmax") and any(within(k, parent) for k in known)
    return beside or any(within(path, k) or (path != "" and within(k, path)) for k in known)


class _Watch(TorchDispatchMode):
    def __init__(self, where: list[tuple[str, str]], seen: Seen):
        super().__init__()
        self.where, self.seen = where, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _KERNELS.search(str(func)):
            path, cls = self.where[-1] if self.where else ("", "")
            self.seen.kernels[path, cls, str(func).removeprefix("aten.").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def watch(model: nn.Module, forward: Callable[[], Any]) -> Seen:
    """Run a forward and say which modules attended."""
    paths = {id(m): (path, type(m).__name__) for path, m in model.named_modules()}
    where: list[tuple[str, str]] = []
    seen = Seen()

    def enter(module: nn.Module, _: Any) -> None:
        path, cls = paths.get(id(module), where[-1] if where else ("", ""))  # made in the forward: it is its caller's
        where.append((path, cls))
        if _ATTENTION.search(cls) and not _PART.search(cls):
            seen.attention[path] = cls

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        where.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with _Watch(where, seen):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen
