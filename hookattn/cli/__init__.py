"""The command line, ``hookattn``. It needs click and rich, which nothing else of the package does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_MISSING = 'hookattn: the command line needs the package {name}, which is not installed: pip install "hookattn[cli]"'


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, and exit.

    Args:
        args: the words after ``hookattn``; by default those of this process.
    """
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        print(_MISSING.format(name=error.name), file=sys.stderr)
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that cannot show a character shows "?" instead of failing
            reconfigure(errors="replace")
    from .commands import app

    app.main(args=None if args is None else list(args), prog_name="hookattn")
