"""What a notebook shows of a trace or a call: asked of the renderer by its name, as the core imports none."""

from __future__ import annotations

import html
from importlib import import_module
from typing import Any

_RENDERER = "hookattn.render.still"


def still_html(thing: Any, kind: str) -> str:
    """A picture and a table as HTML. A cell's output must not fail: where something does, it is text, with the reason.

    Args:
        thing: a trace or a call.
        kind: ``"trace"`` or ``"call"``.
    """
    try:
        made: str = getattr(import_module(_RENDERER), f"{kind}_html")(thing)
        return made
    except Exception as error:  # noqa: BLE001 - whatever it is: the object is to be seen all the same
        try:
            said = repr(thing)
        except Exception:  # noqa: BLE001 - likewise
            said = f"a {kind}"
        why = f"{type(error).__name__}: {error}"
        return f"<pre>{html.escape(said)}\n(no picture: {html.escape(why)})</pre>"
