"""Modules that ran, sound like attention by name, and were not seen attending."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from .discovery import WatchPlan, within
from .registry import owner


def unread_sites(plan: WatchPlan, ran: Mapping[int, nn.Module], seen: Collection[str]) -> Iterator[tuple[str, str]]:
    """Path and reason of each module that was not seen attending, nor was any module around it or in it.

    Args:
        plan: of the model.
        ran: module identity -> module, of what sounds like attention and ran.
        seen: the paths of what was seen attending, or listed as skipped.
    """
    paths = {plan.paths[key]: module for key, module in ran.items()}
    quiet = {p: m for p, m in paths.items() if not any(within(s, p) or within(p, s) for s in seen)}
    for path, module in quiet.items():
        if not any(other != path and within(other, path) for other in quiet):  # the innermost says it best
            adapter = plan.named.get(id(module))
            named = "" if adapter is None else f" (it is a site by the word of {owner(adapter)})"
            yield path, f"{type(module).__name__} ran, and no softmax over q·k was seen in it{named}"
