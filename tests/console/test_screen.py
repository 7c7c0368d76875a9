"""What a terminal gets: the colours of rich, and no control character of anybody else."""

from __future__ import annotations

import io
import json
import re

import pytest

pytest.importorskip("rich")
pytest.importorskip("click")

from click.testing import CliRunner
from rich.table import Table
from rich.text import Text

from hookattn.cli.commands import app
from hookattn.console.screen import PrintableConsole, Screen, plain

HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e"
WRITTEN = r"\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e"


def said(*things: object, **options: object) -> str:
    out = io.StringIO()
    console = PrintableConsole(file=out, force_terminal=True, color_system="truecolor", width=100, _environ={})
    console.print(*things, **options)  # type: ignore[arg-type]
    return out.getvalue()


def test_a_terminal_gets_colours_and_no_other_sequence() -> None:
    table = Table("a", title=HOSTILE)
    table.add_row(plain(HOSTILE, "red"))
    table.add_row(Text(HOSTILE.replace("\x07", ""), "bold"))
    for text in (said(table), said(HOSTILE, markup=False), said(plain(HOSTILE, "green"))):
        colours = re.sub(r"\x1b\[[\d;]*m", "", text)
        assert colours != text or "title" not in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", colours)
        assert r"\x1b]52;c;ZXZpbA==" in colours


def test_text_is_measured_as_it_is_written() -> None:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_row(plain(HOSTILE), "b")
    assert [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in said(table).splitlines()] == [f"{WRITTEN} b"] * 2


def test_a_line_is_one_line() -> None:
    assert plain("a\nb\rc").plain == r"a\nb\rc"


def test_words_of_a_command_line_come_back_printable() -> None:
    for words in ([HOSTILE], ["verify", "a", HOSTILE], ["info", f"--{HOSTILE}"], ["heads", "a", "--top", HOSTILE]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.output), words


def test_json_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    data = {HOSTILE: [HOSTILE, "\ud800 é"]}
    Screen(as_json=True).json(data)
    text = capsys.readouterr().out
    assert (
        json.loads(text) == data and "é" in text and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
    )
