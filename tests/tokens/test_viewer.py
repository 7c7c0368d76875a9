"""The viewer's module reads tokens as Python does: the same table of cases, and rows of tokens by chance."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import hookattn
from hookattn.tokens.display import CONTINUES
from hookattn.tokens.pieces import SEPARATORS, is_special, marks_of, read_pieces
from tests.tokens.test_pieces import CASES, data

BUNDLE = Path(hookattn.__file__).parent / "render" / "viewer" / "hookattn-viewer.js"
JOIN = CONTINUES
READ = """
import { readFileSync } from "node:fs";
const [bundle, path] = process.argv.slice(2);
const { isSpecial, marksOf, readPieces, readable, segments } = await import(bundle);
const rows = JSON.parse(readFileSync(path, "utf8"));
process.stdout.write(JSON.stringify(rows.map((tokens) => ({
  special: tokens.map(isSpecial),
  marks: marksOf(tokens),
  pieces: readPieces(tokens).map((p) => [Buffer.from(p.data).toString("hex"), p.special, p.joins]),
  labels: readable(tokens).map((label) => label.text),
  segments: segments(tokens) && [...segments(tokens)],
}))));
"""
PARTS = (
    *"<>[]|/｜▁ aZ3_-.:\nĠ", "<|", "|>", "</", ">>", "<<", "[/", "CLS", "s", "fim", "unused", "0xE2", "▁", "##", "@@",
    "</w>", "Ã¼", "ä½", "ł", "日", "é", "x y",
)  # fmt: skip


BRACKETS = (*[("", "")] * 3, ("<", ">"), ("[", "]"), ("<|", "|>"), ("</", ">"), (">>", "<<"))


def by_chance() -> list[list[str]]:
    """2000 rows of up to six tokens, each of a few parts that brackets and marks are made of, or of the table."""
    chance = random.Random(5)
    table = [*CASES["special"], *CASES["ordinary"], *CASES["bytes"]]

    def token() -> str:
        if chance.random() < 0.3:
            return chance.choice(table)
        body = "".join(chance.choices(PARTS, k=chance.randint(0, 4)))
        opens, closes = chance.choice(BRACKETS)
        return opens + body + closes

    return [[token() for _ in range(chance.randint(0, 6))] for _ in range(2000)]


ROWS = [row["tokens"] for row in CASES["rows"]]
PAIRS = [case["tokens"] for case in CASES["segments"]]
ONE_EACH = [*CASES["special"], *CASES["ordinary"], *CASES["bytes"], *SEPARATORS]
CHANCE = by_chance()


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the viewer's module says of each row, in one run of node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node: the viewer's module runs in it")
    folder = tmp_path_factory.mktemp("viewer")
    (folder / "viewer.mjs").write_bytes(BUNDLE.read_bytes())
    (folder / "read.mjs").write_text(READ, "utf-8")
    lists = {"rows": ROWS, "pairs": PAIRS, "tokens": [[token] for token in ONE_EACH], "chance": CHANCE}
    (folder / "rows.json").write_text(json.dumps([row for rows in lists.values() for row in rows]), "utf-8")
    command = [node, folder / "read.mjs", folder / "viewer.mjs", folder / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = iter(json.loads(done.stdout))
    return {name: [next(found) for _ in rows] for name, rows in lists.items()}


def test_special_tokens(viewed: dict[str, Any]) -> None:
    found = {token: one["special"][0] for token, one in zip(ONE_EACH, viewed["tokens"], strict=True)}
    wrong = [token for token in [*CASES["special"], *SEPARATORS] if not found[token]]
    wrong += [token for token in [*CASES["ordinary"], *CASES["bytes"]] if found[token]]
    assert not wrong


@pytest.mark.parametrize("n", range(len(ROWS)), ids=[row["name"] for row in CASES["rows"]])
def test_pieces(n: int, viewed: dict[str, Any]) -> None:
    row, found = CASES["rows"][n], viewed["rows"][n]
    assert found["marks"] == row["marks"]
    assert [bytes.fromhex(piece[0]) for piece in found["pieces"]] == [data(text) for text in row["texts"]]
    assert [piece[1] for piece in found["pieces"]] == [token in CASES["special"] for token in row["tokens"]]
    assert [piece[2] for piece in found["pieces"]] == row["joins"]


@pytest.mark.parametrize("n", range(len(ROWS)), ids=[row["name"] for row in CASES["rows"]])
def test_labels_go_on_as_the_marks_say(n: int, viewed: dict[str, Any]) -> None:
    row, labels = CASES["rows"][n], viewed["rows"][n]["labels"]
    texts = [data(text).decode(errors="ignore") for text in row["texts"]]
    for i, token in enumerate(row["tokens"]):
        if token in CASES["special"]:
            assert labels[i] == token.removeprefix("▁")
        elif i and texts[i - 1][-1:].isalnum() and texts[i][:1].isalnum() and texts[i].isascii():
            assert labels[i] == (JOIN if row["joins"][i] else "") + texts[i]


@pytest.mark.parametrize("n", range(len(PAIRS)), ids=map(" ".join, PAIRS))
def test_a_pair_has_two_segments(n: int, viewed: dict[str, Any]) -> None:
    tokens, parts = CASES["segments"][n]["tokens"], CASES["segments"][n]["segments"]
    last = max((part for token, part in zip(tokens, parts, strict=True) if not is_special(token)), default=0)
    assert viewed["pairs"][n]["segments"] == (parts if last == 1 else None)


def test_rows_by_chance(viewed: dict[str, Any]) -> None:
    differ = []
    for tokens, found in zip(CHANCE, viewed["chance"], strict=True):
        pieces = [[piece.data.hex(), piece.special, piece.joins] for piece in read_pieces(tokens)]
        if found["pieces"] != pieces or found["marks"] != marks_of(tokens).value:
            differ.append(tokens)
    assert not differ
    assert len({found["marks"] for found in viewed["chance"]}) == 7, "some way to mark words is in no row"
    assert sum(map(sum, (found["special"] for found in viewed["chance"]))) > 500
