"""A figure as a file that is there whole or not at all."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path

from matplotlib.figure import Figure

from ...store.partial import PartialFile, explaining_os_errors


def save(figure: Figure, path: str | PathLike[str], kind: str, dpi: int = 300) -> None:
    """Write a figure under its name once all of it is made.

    Args:
        figure: of one of the views.
        path: the file; an older one is replaced.
        kind: ``svg``, ``pdf`` or ``png``.
        dpi: pixels an inch.

    Raises:
        TraceWriteError: it cannot be written there.
    """
    made = io.BytesIO()
    figure.savefig(made, format=kind, dpi=dpi)
    data = made.getvalue()
    target = Path(path)
    file = PartialFile(target)
    with explaining_os_errors(target, "write the figure", len(data)):
        try:
            file.write(0, data)
            file.commit(len(data))
        finally:
            file.discard()
