"""Operators of other libraries (``torch.library``, compiled extensions) that attend, by their names: none is read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

_SOUNDS_LIKE = re.compile(r"attention|attn|(?:^|_)(?:sdpa|mha|gqa|mqa|mla)(?:_|$)", re.IGNORECASE)
_BESIDE = re.compile(r"backward|bwd|mask|cache|metadata|bias|scale|rope|norm(?!al)", re.IGNORECASE)


@functools.cache
def handler_of(name: str) -> Callable[..., Any] | None:
    """What runs an operator that attends by its name and says so; None: it is torch's own, or does not.

    Args:
        name: ``library::operator``, as :func:`.eager.operations.name_of` has it.
    """
    library, _, own = name.partition("::")
    if not own or library == "aten" or not _SOUNDS_LIKE.search(own) or _BESIDE.search(own):
        return None
    return functools.partial(_run, f"torch.ops.{library}.{own}")


def _run(full: str, watch: Any, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """As the handler of a tap; ``watch``: the follower, which asks for this file and so is no type of it."""
    recorder = watch.recorder
    before = recorder.heard, recorder.refused
    out = func(*args, **kwargs)
    if (
        recorder.heard,
        recorder.refused,
    ) == before:  # it may call a kernel that is read, or of which it is said why not
        recorder.skip(f"{full} attends by its name, and its arguments are not known")
    return out
