"""Hostile text wherever a trace file has text, and what of it every command, ``str`` and ``repr`` writes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import re
import tempfile
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

import hookattn
from hookattn import analyze
from hookattn.calls.site import Site
from hookattn.cli.commands import app
from hookattn.errors import HookattnError
from hookattn.models import registry
from hookattn.render.figures import VIEWS
from hookattn.render.html_page import page
from hookattn.store import document

from . import Figure

SHAPELESS = (
    *(
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x1b]52;c;ZXZpbA==\x07",
        "\x1b[8m",
        "\x1bPq\x1b\\",
        "\x9b31m",
        "\x9d0;t\x9c",
        "\x85",
    ),
    *(
        "\x00",
        "\x08\x08",
        "\r",
        "\n",
        "\t",
        "\x0b\x0c",
        "\x7f",
        "\x1c\x1d\x1e\x1f",
        "\u202e",
        "\u2066",
        "\u200e",
        "\u061c",
    ),
    *("\u2028", "\u2029", "\u200b", "\ufeff", "\xad", "\ud800", "\udfff\ud83d", "\U000e0041\U000e007f", "\ufff9"),
    *("\ufe0f\ufe01", "\u3164", "\u2060"),
)
FORMULAS = (
    *(
        '=HYPERLINK("http://x.test","y")',
        "+1+1",
        "-2+3|cmd",
        "@SUM(1)",
        "=1",
        " =1",
        '"=1',
        "'+1",
        "\t=1",
        "a;=1",
        "＝1",
    ),
)
REAL = ("déjà", "猫が", "안녕", "ĠtheĊ", "👍🏽", "∑√×", "layers.0", "क्षि", "שלום")
_FORMATS = {"\u200c", "\u200d"}


def shapeless(text: str, lines: str = "\n") -> list[str]:
    """The characters of a text that have no shape; the judge, which shares nothing with what it judges."""
    bad = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return [c for c in text if unicodedata.category(c) in bad and c not in lines and c not in _FORMATS]


def computed(cell: str) -> bool:
    """Whether a spreadsheet may compute a cell that is no number."""
    with contextlib.suppress(ValueError):
        float(cell)
        return False
    parts = [cell, *cell.split(";")]
    return any(
        x.lstrip(" '\"\xa0\u3000")[:1] in tuple("=+-@\t\r＝＋－＠") and not x.startswith("'") for x in parts if x
    )


class Count:
    """What got through."""

    def __init__(self) -> None:
        self.texts = self.controls = self.cells = self.broken = self.failed = 0
        self.unread: set[str] = set(REAL)
        self.examples: dict[str, list[str]] = defaultdict(list)

    def text(self, what: str, text: str, own: str = "\n") -> None:
        """One text that somebody reads; ``own`` are characters that are not of the file."""
        self.texts += 1
        if found := shapeless(text, own):
            self.controls += len(found)
            at = text.index(found[0])
            self.examples["controls"].append(f"{what}: {text[max(0, at - 30) : at + 20]!r}")
        self.unread = {word for word in self.unread if word not in text}

    def table(self, what: str, text: str, sep: str = ",") -> None:
        """One CSV."""
        self.text(what, text, "\n" + sep)
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=sep):
            for cell in row:
                if computed(cell):
                    self.cells += 1
                    self.examples["cells"].append(f"{what}: {cell!r}")

    def document(self, what: str, text: str) -> None:
        """One JSON document."""
        self.text(what, text)
        try:
            json.loads(text)
        except ValueError as error:
            self.broken += 1
            self.examples["broken"].append(f"{what}: {error}")


class Text:
    """Hostile text, drawn."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def __call__(self, formula: float = 0.4) -> str:
        """One text: maybe a formula, real words, and characters without a shape in between."""
        words = [self.draw.choice((*SHAPELESS, *REAL)) for _ in range(self.draw.randint(1, 4))]
        start = self.draw.choice(FORMULAS) if self.draw.random() < formula else ""
        return start + "".join(words)


def traced(model: torch.nn.Module, text: Text) -> hookattn.Trace:
    """A trace of two calls with hostile text in every place of it."""
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        trace = hookattn.trace(model, (x, x, x), tokens=[[text() for _ in range(4)]])
        more = hookattn.trace(model, (x, x, x))
    trace.calls += more.calls
    _ = trace.certify()
    for i, call in enumerate(trace.calls):
        call.index, call.step = i, i
        stack, kind = text(), text.draw.choice(["self", text()])
        path = text().encode("utf-8", "ignore").decode()  # it is in names of tensors, which have no lone surrogates
        call.site = Site(path, text.draw.choice([i, None]), stack, kind, text(), text(), 2)
        call.notes, call.tap, call.entry = (text(), text()), text(), text()
        if text.draw.random() < 0.2:
            call.certificate = replace(call.certificate, basis=text())
    trace.model = {"class": text(), "module": text(), "config": {text(): text()}, "versions": {text(): text()}}
    trace.notes = [text() for _ in range(3)]
    trace.skipped = [hookattn.Skipped(text(), text()) for _ in range(2)]
    trace.stack_tokens = {text(): [[text() for _ in range(4)]]}
    trace.selection = {text(): text()}
    return trace


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    """See :mod:`tests.attack`; a round is a trace file, and all that reads it."""
    draw, count = random.Random(seed), Count()
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        for n in range(rounds):
            text = Text(draw)
            trace = traced(model, text)
            file = Path(folder, "run.safetensors")
            file.unlink(missing_ok=True)
            document.save(trace, str(file))
            _commands(count, str(file), text, n)
            read = hookattn.load(file)
            _prompt(count, read)
            _errors(count, read, text)
            _tables(count, read, n)
            if n % 10 == 0:
                _adapters(count, text)
                _pictures(count, read, n // 10)
        outside = [x.name for x in Path(folder).iterdir() if shapeless(x.name)]
    return [
        Figure("texts that were read", count.texts),
        Figure("characters without a shape in them", count.controls, 0, tuple(count.examples["controls"][:8])),
        Figure("cells that a spreadsheet computes", count.cells, 0, tuple(count.examples["cells"][:8])),
        Figure("JSON documents that are none", count.broken, 0, tuple(count.examples["broken"][:8])),
        Figure("commands that ended with an error of Python", count.failed, 0, tuple(count.examples["failed"][:8])),
        Figure("files of names with such characters", len(outside), 0, tuple(map(repr, outside))),
        Figure("real words that nobody could read", len(count.unread), 0, tuple(count.unread)),
    ]


def _run(count: Count, *words: str) -> str:
    """One command; its stderr is judged here."""
    done = CliRunner().invoke(app, list(words))
    what = " ".join(words[:1] + words[2:])
    count.text(f"stderr of {what[:60]!r}", done.stderr)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        count.failed += 1
        count.examples["failed"].append(f"{what!r}: {done.exception!r}")
    return done.stdout


def _commands(count: Count, file: str, text: Text, n: int) -> None:
    for words in (["info"], ["info", "--every-call"], ["verify"], ["heads"]):
        count.text(" ".join(words), _run(count, words[0], file, *words[1:]))
        count.document(f"{words} --json", _run(count, words[0], file, *words[1:], "--json"))
    count.table("heads --csv", _run(count, "heads", file, "--csv"))
    wrong = text().replace("\x00", "").encode("utf-8", "ignore").decode()  # what a shell can hand over
    for words in (
        ["heads", file, "--sort", wrong],
        ["heads", file, "--measures", wrong],
        ["info", file + wrong.replace("/", "")],
        ["render", file, "-o", file + ".svg", "--stack", wrong],
        ["render", file, "-o", file + ".svg", "--kind", "none", "--layer", "77"],
        ["view", file + "none"],
        ["verify", file, wrong],
        [wrong or "x"],
        ["info", file + "x", "--debug"],
    ):
        said = _run(count, *words)
        if not said.startswith("Usage"):  # click's own, with what was typed
            count.text(f"stdout of {words[0]}", said)
    if n % 10 == 0:
        out = file + ".csv"
        _run(count, "heads", file, "--csv", out)
        count.table("heads --csv FILE", Path(out).read_text("utf-8"))
        count.text("view --html", _run(count, "view", file, "--html", file + ".html"))


def _prompt(count: Count, trace: hookattn.Trace) -> None:
    things = [
        trace,
        trace.calls,
        trace.skipped,
        trace.notes,
        trace.tokens,
        trace.stack_tokens,
        trace.model,
        trace.selection,
    ]
    things += [x for c in trace for x in (c, c.site, c.site.label, c.certificate, c.notes, c.basis, c.shape)]
    for thing in things:
        for said in (str(thing), repr(thing)) if not isinstance(thing, str) else (thing,):
            count.text(f"repr of a {type(thing).__name__}", said)


def _errors(count: Count, trace: hookattn.Trace, text: Text) -> None:
    call = trace[0]
    tries: list[Callable[[], Any]] = [
        lambda: trace["none"],
        lambda: trace.select(stack="none"),
        lambda: trace.select(layer=77),
        lambda: trace.attentions,
        lambda: trace.stitch(),
        lambda: call.get("entropy"),
        lambda: call.at(head=99),
        lambda: call.sinks,
        lambda: analyze.top_targets(trace, text()),
        lambda: analyze.measure(trace, ["received"]),
        lambda: analyze.between_segments(trace),
        lambda: page(trace, fields=[text()]),
    ]
    for one in tries:
        try:
            one()
        except HookattnError as error:
            count.text(f"{type(error).__name__}", str(error))
            count.text(f"repr of {type(error).__name__}", repr(error))
        except Exception as error:  # noqa: BLE001 - of another kind, which other attacks judge
            count.text(f"{type(error).__name__}", repr(error))
    for kind in (hookattn.SkippedWarning, hookattn.UnfaithfulWarning, hookattn.GuessedAxesWarning):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(kind(f"{call.site.path}: {trace.notes}"), stacklevel=1)
        count.text(kind.__name__, said.getvalue())


def _frames(trace: hookattn.Trace) -> Iterator[Any]:
    yield analyze.report(trace)
    yield analyze.Entropy()(trace, by="query")
    yield analyze.top_targets(trace, 1)
    yield analyze.normalisation(trace)
    yield analyze.distance_decay(trace)
    yield analyze.compare(trace, trace)
    yield analyze.head_divergence(trace)
    yield analyze.score_rank(trace)


def _tables(count: Count, trace: hookattn.Trace, n: int) -> None:
    for i, frame in enumerate(_frames(trace)):
        if n % 4 and i > 2:
            return
        what = f"table {i}"
        for said in (str(frame), repr(frame), frame.to_string(), frame._repr_html_(), frame.to_json(force_ascii=False)):
            count.text(what, said)
        count.table(f"{what}, csv", frame.to_csv())
        count.table(f"{what}, tsv", frame.to_csv(sep="\t", index=False), "\t")
        count.table(f"{what}, sorted", frame.sort_values(list(frame.columns)[-1]).head(5).to_csv(sep=";"), ";")


def _adapters(count: Count, text: Text) -> None:
    """Names of adapters are of whoever wrote the package."""
    made = type("OfTheAttack", (hookattn.Adapter,), {})()
    made.name, made.covers, made.attention = text(), (text(), text()), {text(): "self"}
    registry.adapters()
    try:
        registry._adapters[made.name] = (made, text())
        count.text("adapters", _run(count, "adapters"))
        count.document("adapters --json", _run(count, "adapters", "--json"))
    finally:
        registry._adapters.pop(made.name, None)


def _pictures(count: Count, trace: hookattn.Trace, n: int) -> None:
    """Text in drawings, and the elements of a page: a page of plain text has as many."""
    view = sorted(VIEWS)[n % len(VIEWS)]
    where = {"heads": [0], "queries": [-1]} if view in ("lens", "neuron") else {}
    with contextlib.suppress(HookattnError):
        out = io.StringIO()
        VIEWS[view].draw(trace[:1], **where).savefig(out, format="svg")
        count.text(f"svg of {view}", out.getvalue().replace("\t", ""))
    made = page(trace)
    count.text("page", made)
    plain = page(hookattn.trace(torch.nn.MultiheadAttention(8, 2), (torch.randn(4, 1, 8),) * 3))
    elements = [re.findall(r"<\w+", x) for x in (made, plain)]
    if len(set(elements[0])) != len(set(elements[1])):
        count.broken += 1
        count.examples["broken"].append(f"elements of a page: {set(elements[0])}")
