"""Which extra of this package brings a library that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_BRINGS = {
    "analyze": ("pandas", "pyarrow", "scipy"),
    "corpora": ("datasets",),
    "image": ("PIL",),
    "ray": ("ray",),
    "render": ("matplotlib", "plotly"),
    "training": ("accelerate", "lightning"),
    "transformers": ("transformers",),
    "view": ("anywidget", "starlette", "traitlets", "uvicorn"),
}


def install(error: ModuleNotFoundError) -> str | None:
    """The command that installs the module that was not found; None where no extra brings it."""
    top = (error.name or "").partition(".")[0]
    return next((f'pip install "hookattn[{extra}]"' for extra, names in _BRINGS.items() if top in names), None)


@contextmanager
def extra_named() -> Iterator[None]:
    """A library that the block doesn't find is an error that says how to install it.

    Raises:
        ModuleNotFoundError: the block's own, with a note.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        how = install(error)
        if how is not None:
            error.add_note(f"hookattn: {how}")
        raise
