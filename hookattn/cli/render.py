"""``hookattn render``."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import click

from ..calls.part import parts_of
from ..console.screen import Screen, decimal_size
from ..errors import SelectionError
from ..render.figures import VIEWS
from ..traces import Trace, load
from .command import Command
from .options import ints, positions

_KINDS = ("svg", "pdf", "png", "html")


def _width(ctx: click.Context, param: click.Parameter, value: str | None) -> str | float | None:
    """A word, or inches."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


@click.command(
    cls=Command,
    short_help="Draw a trace file: svg, pdf, png, html.",
    examples=(
        "hookattn render run.safetensors --layer 3 --heads 1,5 -o heads.svg",
        "hookattn render run.safetensors --view model --scale log -o layers.pdf",
        "hookattn render run.safetensors --view lens --layer 3 --heads 5 --queries -1 -o why.png",
        "hookattn render run.safetensors --layer 3 --heads 5 --width column --no-title -o head.pdf",
        "hookattn render generation.safetensors --stitch --view matrix --layer 3 -o head.svg",
        "hookattn render run.safetensors --view matrix --layer 3 -o run.html",
    ),
)
@click.argument("file", type=click.Path())
@click.option("--out", "-o", required=True, type=click.Path(), help="What to write: .svg, .pdf, .png, or .html.")
@click.option("--view", default="head", show_default=True, type=click.Choice(tuple(VIEWS)), help="What is drawn.")
@click.option("--layer", type=int, help="The layer; negative ones count from the last.")
@click.option("--heads", callback=ints, metavar="LIST", help="Heads, such as 1,5; default: all.")
@click.option("--queries", callback=positions, metavar="LIST", help="Queries, such as 7, -1 or 0:32; default: all.")
@click.option("--keys", callback=positions, metavar="LIST", help="Keys, likewise.")
@click.option("--batch", type=int, help="The batch entry; default: 0.")
@click.option("--step", type=int, help="The step of a generation; negative ones count from the last.")
@click.option("--stitch", is_flag=True, help="Put the steps of a generation together first, into one picture.")
@click.option("--stack", help="encoder, decoder, vision, …")
@click.option("--kind", help="self or cross.")
@click.option(
    "--field", type=click.Choice(("weights", "applied", "scores", "mask")), help="What is coloured; default: weights."
)
@click.option("--scale", type=click.Choice(("linear", "log")), help="Of weights; default: linear.")
@click.option(
    "--sink", type=click.Choice(("show", "drop", "renormalise")), help="What happens to the first key; default: show."
)
@click.option(
    "--width", callback=_width, metavar="WIDTH", help="column (3.3 in), page (7 in), or inches; default: as drawn."
)
@click.option("--title", help="The line above a figure; default: what is drawn.")
@click.option("--no-title", is_flag=True, help="No line above it.")
@click.option("--dpi", type=click.IntRange(20, 2400), help="Pixels an inch of a png; default: 300.")
@click.pass_obj
def render(
    screen: Screen,
    /,
    file: str,
    out: str,
    view: str,
    stitch: bool,
    title: str | None,
    no_title: bool,
    width: str | float | None,
    dpi: int | None,
    **given: Any,
) -> None:
    """Draw the trace in FILE, without a display.

    An svg or pdf keeps its text as text. An html is the viewer with the whole trace in it, in one page that opens
    anywhere, offline; the options say what it shows first.
    """
    kind = os.path.splitext(out)[1].lower().removeprefix(".")
    if kind not in _KINDS:
        raise click.BadParameter(f"{out!r}: expected a name that ends in .{', .'.join(_KINDS)}.", param_hint="--out")
    asked = {name: value for name, value in given.items() if value is not None}
    if title is not None and no_title:
        raise click.UsageError("--title and --no-title: give one of them.")
    look = {"dpi": dpi, "width": width, "title": False if no_title else title}
    if stitch and "step" in asked:
        raise click.UsageError("--stitch puts all steps together: leave out --step.")
    if kind == "html":
        of_figures = [f"--{name}" for name, value in look.items() if value is not None]
        of_figures += [] if VIEWS[view].in_pages else [f"--view {view}"]
        if of_figures:
            raise click.UsageError(f"{of_figures[0]} is for svg, pdf and png; a page has no such thing.")
    trace = load(file)
    if stitch:
        trace = trace.stitch()
    elif kind != "html":
        _check_steps(trace, file, asked)
    with _own_words():
        if kind == "html":
            _write_page(trace, out, view, asked)
        else:
            asked |= {name: look[name] for name in ("width", "title") if look[name] is not None}
            _write_figure(screen, trace, out, kind, view, dpi, asked)
    data = {"file": out, "bytes": os.path.getsize(out), "view": view}
    if screen.as_json:
        screen.json(data)
    else:
        screen.out.print(f"wrote {out} ({decimal_size(os.path.getsize(out))})", markup=False, soft_wrap=True)


def _check_steps(trace: Trace, file: str, asked: dict[str, Any]) -> None:
    """Raise a SelectionError that names the options where several steps are asked for."""
    where = {name: asked[name] for name in ("layer", "stack", "kind", "step") if name in asked}
    steps = list(dict.fromkeys(call.step for call in trace.select(**where)))
    if len(steps) > 1:
        raise SelectionError(
            f"{file} has {len(steps)} steps; give --stitch to draw them as one picture, or --step with one of "
            f"{steps[0]} to {steps[-1]}."
        )


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """What an error says of arguments of Python is said of options."""
    try:
        yield
    except SelectionError as error:
        said = re.sub(r"\b(layer|heads|queries|keys|batch|step|stack|kind|width)=(?= ?)", r"--\1 ", str(error))
        raise type(error)(re.sub(r" {2,}", " ", said)) from error


def _write_figure(
    screen: Screen, trace: Trace, out: str, kind: str, view: str, dpi: int | None, asked: dict[str, Any]
) -> None:
    from ..render.figures.files import save

    draw = VIEWS[view].draw
    for name in ("field", "scale", "sink"):
        if name in asked and name not in inspect.signature(draw).parameters:
            raise SelectionError(f"--{name} has no meaning in the {view} view; leave it out.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(draw(trace, **asked), out, kind, dpi or 300)
    lacking: dict[str, None] = {}
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) .*missing from", str(warning.message))
        if glyph is not None:
            lacking[chr(int(glyph[1]))] = None
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if lacking and kind != "svg":  # in which the reader's fonts are used
        screen.warn(f"no installed font has {' '.join(lacking)}; install one that does, or write an .svg.")


def _write_page(trace: Trace, out: str, view: str, asked: dict[str, Any]) -> None:
    from ..render.html_page import save_page

    where = {name: value for name, value in asked.items() if name not in ("field", "scale", "sink")}
    part = parts_of(trace, **where)[0]
    site = part.call.site
    state: dict[str, Any] = {
        **{name: asked[name] for name in ("field", "scale", "sink") if name in asked},
        "view": view,
        "step": part.call.step,
        "stack": site.stack,
        "kind": site.kind,
        "batch": asked.get("batch", 0),
    }
    if site.layer is not None:
        state["layer"] = site.layer
    if "heads" in asked:
        state["heads"] = list(part.heads)
    if "queries" in asked:
        state["query"] = part.rows[0]
    save_page(trace, out, state=state)
