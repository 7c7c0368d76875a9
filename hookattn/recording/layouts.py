"""What the caller says of the axes of hand-written attention: ``layout={"path": "BTHD"}``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from .. import checks
from ..attention.axis_letters import problem_of
from ..calls.site import without_wrappers
from ..errors import SelectionError


class Layouts:
    """The axes of q as it enters the dot product, by the path of the module that attends.

    Args:
        given: path, or a pattern with ``*`` and ``?`` as in file names, to letters of B (batch), H (heads), T (queries)
            and D (width); the first that fits a path is the one that counts, a path itself before any pattern. The
            names that wrappers put into paths may be in it.
        paths: of all modules of the model.

    Raises:
        SelectionError: letters that name no axes, or a path that the model does not have.
    """

    def __init__(self, given: Any, paths: Collection[str]):
        if not isinstance(given, Mapping) or not all(isinstance(x, str) for x in (*given, *given.values())):
            raise checks.wrong(
                "layout", given, f"module paths with the letters of q's axes, {_EXAMPLE}", SelectionError
            )
        self._given: dict[str, str] = {}
        self._used: set[str] = set()
        for said, letters in given.items():
            # As the model spells it, or as a wrapped model spells it.
            path = next((p for p in (said, without_wrappers(said)) if any(_fits(p, known) for known in paths)), None)
            if problem := problem_of(letters):
                raise SelectionError(f"layout={{{said!r}: {letters!r}}}: {problem}; {_EXAMPLE}.")
            if path is None:
                near = ", ".join(map(repr, sorted(p for p in paths if p)[:6])) + (", …" if len(paths) > 7 else "")
                raise SelectionError(
                    f"layout={{{said!r}: {letters!r}}}: the model has no module at {said!r}; there are "
                    f"{near} (call.site.path says where a call was)."
                )
            self._given[path] = letters

    def of(self, path: str) -> str | None:
        """The letters of the axes of q in the module at a path; None: nothing was said."""
        key = path if path in self._given else next((key for key in self._given if _fits(key, path)), None)
        if key is None:
            return None
        self._used.add(key)
        return self._given[key]

    def unused(self, paths: Collection[str]) -> list[str]:
        """What was said of no call; ``paths``: those of all calls."""
        for path in paths:
            self.of(path)
        return [key for key in self._given if key not in self._used]


_EXAMPLE = 'layout={"blocks.0.attn": "BTHD"}, say'


def _fits(key: str, path: str) -> bool:
    return key == path or fnmatchcase(path, key)
