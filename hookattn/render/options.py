"""What is handed to the viewer beside the trace: the first selection, scores of heads, images, the theme."""

from __future__ import annotations

import base64
import json
import math
import mimetypes
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ..errors import RenderError

THEMES = ("light", "dark", "auto")


def viewer_options(
    *,
    state: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    theme: str = "auto",
    calls: int | None = None,
) -> dict[str, Any]:
    """The options as plain data, checked.

    Args:
        state: the selection that is shown first, as ``viewer.state`` has it: ``{"view": "matrix", "layer": 3}``.
        scores: ``{measure: {"unit": str, "description": str, "values": V}}``, where V has for each call of the trace a
            number, None or NaN for each head (lists, arrays or tensors); and, if wanted, ``"roles"``, which has for
            each call and head a list of names.
        images: what the patches of a vision model were cut of: ``{"urls": [...], "grid": (rows, columns),
            "prefix": n}`` with a picture for each batch entry, a ``data:`` URL or the path of a file, and the number of
            tokens before the first patch.
        theme: ``"light"``, ``"dark"``, or ``"auto"``: as the reader's system has it.
        calls: how many calls the trace has, where that is known.

    Raises:
        RenderError: one of them is of another form; says which, and what was expected.
    """
    if theme not in THEMES:
        raise RenderError(f"theme={theme!r}: expected one of {', '.join(map(repr, THEMES))}.")
    made: dict[str, Any] = {"theme": theme}
    if state is not None:
        if not isinstance(state, Mapping):
            raise RenderError(f"state: expected a mapping, and got {type(state).__name__}.")
        made["state"] = plain(state, "state")
    if images is not None:
        made["images"] = _images(images)
    if scores is not None:
        made["scores"] = _scores(scores, calls)
    return made


def plain(value: Any, where: str) -> Any:
    """Strict JSON of mappings, sequences, arrays, tensors and scalars; a number that is not finite becomes None.

    Raises:
        RenderError: something JSON has no form for.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if callable(getattr(value, "tolist", None)):  # numpy, torch, pandas
        return plain(value.tolist(), where)
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise RenderError(f"{where}: JSON has no form for {type(value).__name__}; convert it to lists, numbers or text.")


def script_json(value: Any) -> str:
    """JSON that can stand in a ``<script>`` of an HTML page, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _images(images: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(images) if isinstance(images, Mapping) else {}
    urls, grid, prefix = given.get("urls"), given.get("grid"), given.get("prefix", 0)
    counts = [*grid, prefix] if isinstance(grid, Sequence) else []
    if not isinstance(urls, (list, tuple)) or len(counts) != 3 or not all(isinstance(n, int) for n in counts):
        raise RenderError(
            'images: expected {"urls": [a data: URL or a path for each batch entry], "grid": (rows, columns)} and, if '
            f'there are tokens before the first patch, "prefix"; and got {str(images)[:80]!r}.'
        )
    return {"urls": [_data_url(url) for url in urls], "grid": counts[:2], "prefix": prefix}


def _data_url(picture: str | PathLike[str]) -> str:
    text = fspath(picture)
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


def _scores(scores: Mapping[str, Any], calls: int | None) -> dict[str, Any]:
    made = plain(scores, "scores")
    if not isinstance(made, dict):
        raise RenderError(f"scores: expected a mapping of measures, and got {type(scores).__name__}.")
    for name, entry in made.items():
        table = entry if name == "roles" else entry.get("values") if isinstance(entry, dict) else None
        if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
            rows = "a list for each call"
            expected = rows if name == "roles" else f'{{"unit", "description", "values": [{rows}]}}'
            raise RenderError(f"scores[{name!r}]: expected {expected}, and got {str(scores[name])[:80]!r}.")
        if calls is not None and len(table) != calls:
            raise RenderError(f"scores[{name!r}]: expected {calls} rows, one for each call, and got {len(table)}.")
        if name != "roles":
            made[name] = {"unit": "", "description": "", **entry}
    return made
