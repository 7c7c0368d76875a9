"""``show``: the form that fits where this runs."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

from ..errors import PageTooLargeError, RenderError
from ..optional import install
from .trace_files import TraceLike


def show(trace: TraceLike, **options: Any) -> Any:
    """Look at a trace: a widget in a notebook; elsewhere a page in the browser.

    Elsewhere, a trace that fits is written to a self-contained page in the temporary directory, which stays readable
    when this process has ended; a larger one is served until interrupted, as ``hookattn view`` does.

    Args:
        trace: a trace, or the path of a trace file.
        options: ``compare``, ``state``, ``scores``, ``images``, ``theme``.

    Returns:
        In a notebook the :class:`~hookattn.render.widget.Widget`, which shows as the last line of a cell. Elsewhere the
        path of the page, or None once serving has ended.

    Raises:
        RenderError: a package is missing (says which); or options of another form.
        TraceFileError: the path is not that of a trace file.
    """
    if in_notebook():
        try:
            from .widget import Widget
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        return Widget(trace, **options)
    try:
        path = _page(trace, options)
    except PageTooLargeError as too_large:
        try:
            from .server import serve
        except ModuleNotFoundError as error:
            raise _missing(error) from too_large
        serve(trace, **options)
        return None
    webbrowser.open(Path(path).as_uri())
    return path


def _page(trace: TraceLike, options: dict[str, Any]) -> str:
    """The page in a temporary directory of its own, which is gone again where there is no page."""
    from .html_page import save_page

    folder = tempfile.mkdtemp(prefix="hookattn-")
    try:
        return save_page(trace, os.path.join(folder, "trace.html"), **options)
    except BaseException:
        os.rmdir(folder)
        raise


def in_notebook() -> bool:
    """Whether this code runs in a notebook: IPython with a kernel, or marimo."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is not None:
        return True
    marimo = sys.modules.get("marimo")
    return bool(marimo is not None and marimo.running_in_notebook())


def _missing(error: ModuleNotFoundError) -> RenderError:
    return RenderError(f"this needs the package {error.name}, which is not installed: {install(error)}.")
