"""Tables that are opened in a spreadsheet: text is text there, and a program reads back what it was."""

from __future__ import annotations

import csv
import io
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn

pytest.importorskip("pandas")

import pandas as pd

from hookattn import analyze
from hookattn.analyze.spreadsheet import Table

DOCS = Path(hookattn.__file__).parents[1] / "docs" / "analyze.md"
FORMULAS = [
    '=HYPERLINK("http://x","y")', "+1", "-1+1|cmd", "@SUM(1)", "\t=1", " =1", '"=1', "'=1", " ' \"-2", "＝1",
    "＋1", "－1", "＠x", "a;=1", "a; -x;+y", "''=1", "'';'=1",
]  # fmt: skip
TEXTS = ["", "layers.0", "a=b", "a-b", "x@y", "'quoted'", '"q"', "1-2", "a,b", "a\nb", "it's; so", "É", "'a;b"]


def computed(cell: str) -> bool:
    """Whether a spreadsheet may compute a cell, or a part of it behind its other separator."""
    return any(
        part.strip(" '\"\xa0")[:1] in tuple("=+-@\t\r＝＋－＠") and not part.startswith("'") for part in cell.split(";")
    )


def cells(text: str, **options: Any) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), **options))


@pytest.mark.parametrize("sep", [",", "\t", ";"])
def test_no_text_is_computed_and_all_is_read_back(sep: str) -> None:
    assert all(computed(x) for x in FORMULAS if x[0] != "'") and not any(map(computed, TEXTS))
    words = FORMULAS + TEXTS
    table = Table({"path": words, "n": [-1.5] * len(words), "=h": words, "k": [-3] * len(words)})
    made = cells(table.to_csv(sep=sep, index=False), delimiter=sep)
    assert made[0] == ["path", "n", "'=h", "k"]
    assert [row[1::2] for row in made[1:]] == [["-1.5", "-3"]] * len(words), "numbers are numbers"
    assert not [cell for row in made for cell in row[::2] if computed(cell)]
    # As docs/analyze.md says.
    rule = re.search(r're\.sub\((r".*"), (r".*?"), cell\)', DOCS.read_text("utf-8"))
    assert rule is not None
    pattern, put = (eval(text) for text in rule.groups())
    assert [re.sub(pattern, put, row[0]) for row in made[1:]] == words
    unchanged = [row[0] for row in made[1:] if row[0] in TEXTS]
    assert unchanged == TEXTS, "what no spreadsheet computes is written as it is"


def test_a_cell_is_one_line_of_one_row() -> None:
    """What begins a row for a spreadsheet, though not for csv, is written as its number."""
    assert Table({"path": ["a\r=1", "\x85=1", "\u2028+1"]}).to_csv(index=False) == "path\na\\r=1\n\\x85=1\n\\u2028+1\n"


def test_what_is_made_of_a_table_writes_likewise(tmp_path: Path) -> None:
    table = Table({"path": ["=1", "b"], "n": [2.0, -1.0]})
    table.attrs["units"] = {"n": "nats"}
    for made in (
        table.sort_values("n"), table.head(1), table[table.n > 0], pd.concat([table, table]), table[["path"]],
        table.path, table.set_index("path"), table.groupby("path").n.mean(), pickle.loads(pickle.dumps(table)),
        table.copy(), table.assign(m=1), table.pivot_table("n", "path"), table.astype({"path": "category"}),
    ):  # fmt: skip
        assert "'=1" in made.to_csv() and not re.search(r"(^|,)=", made.to_csv(), re.MULTILINE), type(made)
    assert table.sort_values("n").attrs == {"units": {"n": "nats"}}
    table.to_csv(tmp_path / "a.csv", index=False)
    assert (tmp_path / "a.csv").read_text() == "path,n\n'=1,2.0\nb,-1.0\n"
    assert table.path.tolist() == ["=1", "b"], "the table itself has the text"


def hostile() -> hookattn.Trace:
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        trace = hookattn.trace(model, (torch.randn(1, 3, 8),) * 3, tokens=["=1+1", "\x1b[2J", "@c"])
    trace[0].site = replace(trace[0].site, path='=HYPERLINK("http://x")', layer=0, stack="\x9b8m", kind="self")
    return trace


@pytest.mark.parametrize(
    "make",
    [
        analyze.report,
        lambda trace: analyze.Entropy()(trace, by="query"),
        lambda trace: analyze.top_targets(trace, 1),
        analyze.normalisation,
        analyze.distance_decay,
        lambda trace: analyze.compare(trace, trace),
        analyze.head_divergence,
        analyze.score_rank,
    ],
)
def test_the_tables_of_a_hostile_trace(make: Any) -> None:
    table = make(hostile())
    for text in (table.to_csv(), table.to_csv(index=False), str(table), table.to_string()):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    for row in cells(table.to_csv()):
        assert not [cell for cell in row if computed(cell) and not re.fullmatch(r"-?[\d.e+-]+|-inf", cell)]
