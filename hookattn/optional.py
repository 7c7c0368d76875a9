"""Which extra of this package brings a library that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_BRINGS = {
    "analyze": ("pandas", "pyarrow", "scipy"),
    "corpora": ("datasets",),
    "image": ("PIL",),
    "ray": ("ray",),
    "render": ("matplotlib", "plotly"),
    "training": ("accelerate", "lightning"),
    "transformers": ("transformers",),
    "xarray": ("xarray",),
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


def imported_when_asked(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package each of whose names needs a library of its own.

    Args:
        package: its name.
        modules: public name → the module that has it, imported when the name is first asked for.

    Returns:
        What gives a name; it raises AttributeError where there is no such name, and ModuleNotFoundError, with how to
        install it, where a library is missing.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; there are {', '.join(modules)}.")
        with extra_named():
            return getattr(import_module(modules[name]), name)

    return get
