"""What is handed to the viewer beside the trace: the first selection, scores of heads, images, the theme."""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import RenderError
from ..traces import Trace
from .head_scores import scores_of
from .json_values import json_value

THEMES = ("light", "dark", "auto")


def viewer_options(
    *,
    state: Mapping[str, Any] | None = None,
    scores: Any = None,
    images: Mapping[str, Any] | None = None,
    theme: str = "auto",
    trace: Trace | None = None,
) -> dict[str, Any]:
    """The options as plain data, checked.

    Args:
        state: the selection that is shown first, as ``viewer.state`` has it: ``{"view": "matrix", "layer": 3}``.
        scores: a table of :func:`hookattn.analyze.report`, or what :func:`hookattn.render.head_scores.scores_of` takes.
        images: what the patches of a vision model were cut of: ``{"urls": [...], "grid": (rows, columns),
            "prefix": n}`` with a picture for each batch entry, a ``data:`` URL or the path of a file, as the model saw
            it (cropped, if its processor crops); the patches, by default a square; and the number of tokens before the
            first patch, by default what the grid leaves.
        theme: ``"light"``, ``"dark"``, or ``"auto"``: as the notebook or page around it is,
            or else the reader's system.
        trace: the trace that the scores are of.

    Raises:
        RenderError: one of them is of another form; says which, and what was expected.
    """
    checks.word("theme", theme, THEMES, RenderError)
    made: dict[str, Any] = {"theme": theme}
    if state is not None:
        if not isinstance(state, Mapping):
            raise RenderError(f"state: expected a mapping, and got {type(state).__name__}.")
        made["state"] = json_value(state, "state")
    if images is not None:
        made["images"] = _images(images)
    if scores is not None:
        made["scores"] = scores_of(scores, trace)
    return made


def script_json(value: Any) -> str:
    """JSON that can stand in a ``<script>`` of an HTML page, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _images(images: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(images) if isinstance(images, Mapping) else {}
    urls, grid, prefix = given.pop("urls", None), given.pop("grid", None), given.pop("prefix", None)
    pair = grid is None or (isinstance(grid, Sequence) and len(grid) == 2 and all(map(_counts, grid)) and min(grid) > 0)
    if not isinstance(urls, (list, tuple)) or not pair or not (prefix is None or _counts(prefix)) or given:
        raise RenderError(
            'images: expected {"urls": [a data: URL or a path for each batch entry]} and, unless the patches are a '
            'square, "grid": (rows, columns), and, unless they are the last of the tokens, "prefix": the number of '
            f"tokens before the first patch; and got {checks.printed(images)}."
        )
    made: dict[str, Any] = {"urls": [_data_url(url) for url in urls]}
    return made | ({} if grid is None else {"grid": list(grid)}) | ({} if prefix is None else {"prefix": prefix})


def _counts(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _data_url(picture: str | PathLike[str]) -> str:
    text = checks.path("images: urls", picture, RenderError)
    if text.startswith("data:image/"):
        return text
    kind = mimetypes.guess_type(text)[0] or ""
    if not kind.startswith("image/"):
        raise RenderError(f"images: {text[:80]!r} is neither a data:image/ URL nor the path of a picture.")
    try:
        data = Path(text).read_bytes()
    except OSError as error:
        raise RenderError(f"images: {text[:80]!r} cannot be read: {error.strerror}.") from error
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
