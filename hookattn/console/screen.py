"""Where a command's words go: results to stdout, everything else (progress, warnings, errors) to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.segment import Segment
from rich.text import Text

from ..errors import HookattnWarning
from ..printable import json_text, printable
from ..store.json_values import json_value

PIPED_WIDTH = 200
"""Columns that a table may take where no terminal limits it: nothing is folded in a file."""


class Screen:
    """The two streams of one command.

    Args:
        as_json: stdout gets one JSON document and nothing else.
        debug: show what is otherwise left out, such as other libraries' warnings.
    """

    def __init__(self, as_json: bool = False, debug: bool = False) -> None:
        self.as_json, self.debug = as_json, debug
        self.out = console(sys.stdout, quiet=as_json)
        self.err = console(sys.stderr)

    def json(self, data: Any) -> None:
        """Write a JSON document to stdout."""
        click.echo(json_text(json_value(data)))

    def say(self, message: str, style: str = "") -> None:
        """Write one line to stderr."""
        self.err.print(plain(" ".join(message.split()), style), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Write one warning line to stderr."""
        self.say(f"warning: {message}", "yellow")

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Python's warnings as lines on stderr: ours once each, those of other libraries with ``--debug``."""
        said: set[str] = set()

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            ours = issubclass(category, HookattnWarning)
            if self.debug or (ours and str(message) not in said):
                said.add(str(message))
                self.warn(str(message))

        with warnings.catch_warnings():
            warnings.showwarning = show
            warnings.simplefilter("always", HookattnWarning)
            yield

    @contextmanager
    def working(
        self, what: str, total: int | None = None, live: Callable[[], str] | None = None
    ) -> Iterator[Callable[[], None]]:
        """A progress line on stderr while the block runs, gone after it; nothing where stderr is no terminal.

        Args:
            what: what is being done.
            total: how many steps there are, where that is known.
            live: text that is asked for again at every refresh.

        Yields:
            A function to call after each step.
        """
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
        if total is not None:
            columns += [BarColumn(bar_width=24), MofNCompleteColumn()]
        if live is not None:
            columns.append(_Live(live))
        hidden = not self.err.is_terminal
        with Progress(*columns, Elapsed(), console=self.err, transient=True, disable=hidden) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)


class _Live(ProgressColumn):
    """Text that changes while the task runs."""

    max_refresh = 0.2

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__()
        self.text = text

    def render(self, task: Task) -> Text:
        return plain(self.text())


def plain(text: str, style: str = "") -> Text:
    """A line or a cell of text of any origin, as a terminal may get it.

    Text of a file or a model goes through here, so that its width is measured as it is written.
    """
    return Text(printable(text), style)


class PrintableConsole(Console):
    """A console that writes no control character but its own, whatever it is given."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As rich has it, with the text of each segment made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))


def console(stream: TextIO, quiet: bool = False) -> Console:
    """A console on a stream: as wide as the terminal, or wide enough for any table where there is none."""
    made = PrintableConsole(file=stream, highlight=False, emoji=False, quiet=quiet)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPED_WIDTH
    return made


def decimal_size(n: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def counted(n: int, noun: str) -> str:
    """``1 call``, ``2 calls``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def quiet_transformers() -> None:
    """No log lines and no bars of its own: what a user has to know is said by the command."""
    import logging

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
