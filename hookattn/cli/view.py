"""``hookattn view``."""

from __future__ import annotations

import os
from typing import Any

import click

from ..console.screen import Screen, decimal_size
from ..console.tables import lines_beside
from ..errors import RenderError
from ..traces import load
from .command import Command, explain


@click.command(
    cls=Command,
    short_help="Look at a trace file in the browser.",
    examples=(
        "hookattn view run.safetensors",
        "hookattn view before.safetensors after.safetensors",
        "hookattn view vit.safetensors --image cat.png",
        "hookattn view run.safetensors --html run.html",
    ),
)
@click.argument("file", type=click.Path())
@click.argument("compare", type=click.Path(), required=False, metavar="[FILE2]")
@click.option("--port", type=click.IntRange(0, 65535), help="The port; by default the first free one from 8765 on.")
@click.option("--no-open", is_flag=True, help="Print the address, and open no browser.")
@click.option("--scores", is_flag=True, help="Add all that `hookattn heads` measures to what the page does.")
@click.option(
    "--image",
    "pictures",
    type=click.Path(),
    multiple=True,
    help="The picture that a vision model saw; again for each batch entry.",
)
@click.option(
    "--grid", type=click.IntRange(1), nargs=2, metavar="ROWS COLUMNS", help="Of its patches; by default a square."
)
@click.option("--html", type=click.Path(), metavar="OUT", help="Write one self-contained page instead, for anyone.")
@click.pass_obj
def view(
    screen: Screen,
    file: str,
    compare: str | None,
    port: int | None,
    no_open: bool,
    scores: bool,
    pictures: tuple[str, ...],
    grid: tuple[int, int] | None,
    html: str | None,
) -> None:
    """Look at a trace FILE, or at two side by side, in the browser.

    A local page reads what it shows from the file, which can be of any size; it is served to this machine alone, until
    Ctrl-C. With --html, viewer and data become one file that opens anywhere, offline.
    """
    if grid is not None and not pictures:
        raise click.UsageError("--grid is of the patches of a picture: give that with --image.")
    images = {"urls": list(pictures), **({} if grid is None else {"grid": grid})} if pictures else None
    if html is not None:
        if port is not None or no_open:
            raise click.UsageError("--port and --no-open are for the served page: leave them out with --html.")
        _write(screen, file, html, compare=compare, scores=_scores(screen, file) if scores else None, images=images)
        return
    try:
        import uvicorn  # noqa: F401

        from ..render.server import serve
    except ModuleNotFoundError as error:
        raise RenderError(f"{explain(error)}; or write a page with --html.") from error

    def ready(url: str) -> None:
        if screen.as_json:
            screen.json({"url": url, "pid": os.getpid()})
        else:
            click.echo(url)
            _tell(screen, file)
            screen.say("Ctrl-C ends it", "dim")

    found = _scores(screen, file) if scores else None
    shown: dict[str, Any] = {"compare": compare, "scores": found, "images": images}
    serve(file, port=port, open_browser=not no_open, ready=ready, **shown)


def _tell(screen: Screen, file: str) -> None:
    """What a reader of the page has to know and no certificate says."""
    for text, style in lines_beside(load(file).calls):
        screen.say(text, style)


def _scores(screen: Screen, file: str) -> Any:
    from ..analyze import report

    with screen.working("scoring the heads"):
        return report(load(file))


def _write(screen: Screen, file: str, html: str, **shown: Any) -> None:
    from ..render.html_page import save_page

    with screen.working(f"writing {html}"):
        save_page(file, html, **shown)
    data: dict[str, Any] = {"html": html, "bytes": os.path.getsize(html)}
    if screen.as_json:
        screen.json(data)
    else:
        _tell(screen, file)
        screen.out.print(f"wrote {html}", f"({decimal_size(data['bytes'])})", markup=False, soft_wrap=True)
