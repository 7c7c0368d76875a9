"""What all figures have in common: a sheet measured in inches, a style that depends on no setting, exact output."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from ...calls.part import Part
from ..palette import ALARM, FAINT, GRID, INK, PAPER
from .fitting import wrapped

P = ParamSpec("P")

# For what DejaVu Sans lacks; of these, the ones that are installed.
_FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "PingFang SC", "Hiragino Sans", "Yu Gothic",
    "Microsoft YaHei", "Malgun Gothic", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Arial Unicode MS",
    "Noto Sans Hebrew", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Symbols2",
    "Noto Emoji", "Unifont",
)  # fmt: skip


@functools.cache
def style() -> dict[str, Any]:
    """The settings of every figure: small type for a column of text, thin lines, text kept as text in vector files."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": ["DejaVu Sans", *(name for name in _FALLBACKS if name in installed)],
        "font.size": 7.0,
        "axes.titlesize": 7.5,
        "axes.labelsize": 7.0,
        "axes.linewidth": 0.5,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "xtick.major.width": 0.5,
        "ytick.major.width": 0.5,
        "xtick.major.size": 2.0,
        "ytick.major.size": 2.0,
        "grid.color": GRID,
        "grid.linewidth": 0.4,
        "hatch.linewidth": 0.5,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "savefig.dpi": 300,
        "savefig.bbox": None,  # a figure is saved as wide as it is: see fitting.py
        "image.composite_image": False,  # hundreds of thumbnails, each resampled to the whole sheet, take a minute
        "svg.fonttype": "none",
        "svg.hashsalt": "hookattn",
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
    }


class Sheet(Figure):
    """A figure that saves itself in the style it was drawn in, whatever is set; the same trace gives the same bytes."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """As :meth:`matplotlib.figure.Figure.savefig`; text stays text in SVG and PDF, and no date is written."""
        kind = options.get("format") or (str(fname).rpartition(".")[2] if not hasattr(fname, "write") else "png")
        dated = {"svg": "Date", "pdf": "CreationDate"}.get(str(kind).lower())
        if dated:
            options["metadata"] = {dated: None, **(options.get("metadata") or {})}
        with matplotlib.style.context(["default", style()]):
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=160)
        return out.getvalue()


def pixels_of(figure: Figure, dpi: int = 150) -> Any:
    """A figure as an array, height × width × 3, uint8; what is around it is not cut off."""
    with matplotlib.style.context(["default", style()]):
        figure.set_dpi(dpi)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def in_own_style(view: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a view in the style of all figures, and leave the settings as they were."""
    # matplotlib reads its settings when an artist is made, and some again when it is saved: see Sheet.savefig.

    @functools.wraps(view)
    def run(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", style()]):
            return view(*args, **kwargs)

    return run


def empty_sheet(width: float, height: float) -> Sheet:
    """An empty figure of a size in inches, with no window."""
    made = Sheet(figsize=(width, height))
    FigureCanvasAgg(made)
    return made


def axes_at(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes with their upper left corner at (x, y) from the figure's, all in inches."""
    w, h = figure.get_size_inches()
    return figure.add_axes((x / w, 1 - (y + height) / h, width / w, height / h))


def text_at(figure: Figure, x: float, y: float, text: str, **options: Any) -> Text:
    """Text with its upper left corner at (x, y) from the figure's, in inches."""
    w, h = figure.get_size_inches()
    return figure.text(x / w, 1 - y / h, text, **{"va": "top", "ha": "left", **options})


@dataclass(frozen=True)
class Heading:
    """The lines above a view.

    Attributes:
        title: what is drawn; may be empty.
        alarms: what speaks against it.
        notes: what a reader has to know.
    """

    title: str
    alarms: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, parts: Sequence[Part], title: str, notes: Sequence[str] = ()) -> Heading:
        """The heading of a view of these parts, with what their certificates say against them and what was edited."""
        told: dict[str, list[str]] = {}
        for part in parts:
            if part.doubt:
                told.setdefault(part.doubt, []).append(part.title)
        alarms = [doubt if len(parts) == 1 else f"{_places_text(places)}: {doubt}" for doubt, places in told.items()]
        edited = [part.edited if len(parts) == 1 else f"{part.title} {part.edited}" for part in parts if part.edited]
        return cls(title, _first_lines(alarms), (*_first_lines(edited), *dict.fromkeys(notes)))

    @property
    def height(self) -> float:
        """Inches from the top of the figure to where the view may begin."""
        return 0.05 + sum(_PITCH[text.kind] for text in self._lines)

    def within(self, room: float | None) -> Heading:
        """The same in lines that fit into so many inches; None: in lines as long as they are."""
        if room is None:
            return self
        title = wrapped(self.title, room - 0.1, _SIZE["title"], "bold") if self.title else ""
        alarms, notes = (
            tuple(wrapped(x, room - 0.1, _SIZE["line"]) for x in lines) for lines in (self.alarms, self.notes)
        )
        return Heading(title, alarms, notes)

    @property
    def _lines(self) -> list[_Line]:
        """Its lines from the top."""
        said = [("title", INK, self.title)] if self.title else []
        said += [("line", ALARM, text) for text in self.alarms] + [("line", FAINT, text) for text in self.notes]
        return [_Line(kind, colour, line) for kind, colour, text in said for line in text.split("\n")]

    def draw(self, figure: Figure) -> None:
        """Write it."""
        y = 0.03
        for line in self._lines:
            weight = "bold" if line.kind == "title" else "normal"
            text_at(figure, 0.05, y, line.text, fontsize=_SIZE[line.kind], color=line.colour, fontweight=weight)
            y += _PITCH[line.kind]


# Points, and inches from one line to the next.
_SIZE = {"title": 8.0, "line": 6.5}
_PITCH = {"title": 0.17, "line": 0.13}


class _Line(NamedTuple):
    kind: str
    colour: str
    text: str


def _places_text(places: list[str]) -> str:
    """One place, or how many there are."""
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def _first_lines(lines: list[str], most: int = 4) -> tuple[str, ...]:
    return tuple(lines) if len(lines) <= most else (*lines[:most], f"and {len(lines) - most} more like these")


def hide_frame(axes: Axes) -> None:
    """Take away the frame and the ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def name_artist(artist: Artist, name: str) -> None:
    """Name an artist in SVG files, and for whoever looks for it."""
    artist.set_gid(name)
