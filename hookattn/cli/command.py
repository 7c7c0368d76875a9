"""What all commands have in common: ``--json``, ``--debug``, examples in the help, errors as one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ..console.screen import Screen
from ..errors import HookattnError
from ..optional import install
from ..printable import first_line, printable


class Failure(click.ClickException):
    """An error on its way to the user: one red line on stderr, exit code 1."""

    def __init__(self, message: str, screen: Screen) -> None:
        super().__init__(message)
        self.screen = screen

    def show(self, file: Any = None) -> None:
        """Write the line."""
        self.screen.say(f"error: {self.message}", "bold red")


class Command(click.Command):
    """A command that shows examples and never a stack trace, unless it is asked for one.

    Args:
        examples: command lines for the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params += [
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Write one JSON document to stdout, and nothing else there."
            ),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error, and all warnings."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with a :class:`Screen` as the context's object."""
        screen = ctx.obj = Screen(ctx.params.pop("as_json"), ctx.params.pop("debug"))
        try:
            with screen.warnings():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if screen.debug:
                screen.err.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
            raise Failure(explain(error), screen) from error

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, each on its own line however long."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


class Group(click.Group):
    """Commands in the order in which they are used, rather than by name."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As click has it; what it says of the words that were typed is printable."""
        with _printable_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """As click has it; what it says of the words that were typed is printable."""
        with _printable_errors():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names."""
        return list(self.commands)


@contextmanager
def _printable_errors() -> Iterator[None]:
    """Click prints its own errors, which name what was typed: file names, say, that a shell filled in."""
    try:
        yield
    except click.ClickException as error:
        error.message = printable(error.message, keep="\n")  # type: ignore[misc]
        raise


def explain(error: BaseException) -> str:
    """What went wrong, as one line."""
    if isinstance(error, ModuleNotFoundError) and (how := install(error)) is not None:
        return f"this needs the package {error.name}, which is not installed: {how}"
    message = first_line(error) if not isinstance(error, HookattnError) else " ".join(str(error).split())
    if isinstance(error, HookattnError):
        return message
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith("hookattn: ")]
    where = notes[0].removeprefix("hookattn: ").rstrip(".") + "; " if notes else ""
    return f"{type(error).__name__}: {message} ({where}--debug shows the traceback)"
