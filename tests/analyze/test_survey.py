"""Surveys: the same numbers as one example at a time, whatever ends them, read by every library."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import hookattn
from hookattn import analyze
from hookattn.analyze.survey import Batch, Corpus, survey
from hookattn.analyze.survey import measurer as running
from hookattn.cli.commands import app
from hookattn.demo.induction import InductionTransformer, load_pretrained
from hookattn.errors import InputError, MeasureError, TraceWriteError

NAMES = ["entropy", "previous_token", "sink", "normalised_entropy"]


@pytest.fixture(scope="module")
def model() -> InductionTransformer:
    return load_pretrained()


def examples(n: int, length: int = 12) -> list[list[int]]:
    drawn = torch.randint(1, 128, (n, length), generator=torch.Generator().manual_seed(n))
    return [row[: 5 + i % (length - 4)].tolist() for i, row in enumerate(drawn)]


def one_by_one(values: Any) -> Any:
    for ids in values:
        yield Batch(torch.tensor([ids]), 1)


def expected(model: nn.Module, values: list[list[int]], names: list[str] = NAMES) -> dict[Any, float]:
    found = {}
    for i, ids in enumerate(values):
        table = analyze.measure(hookattn.trace(model, torch.tensor([ids])), names)
        for line in table.to_dict("records"):
            for name in names:
                found[i, line["layer"], line["head"], name] = line[name]
    return found


def same(table: pd.DataFrame, wanted: dict[Any, float], tol: float = 2e-6) -> None:
    got = {(r.example, r.layer, r.head, r.measure): r.value for r in table.itertuples()}
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=tol, nan_ok=True), key


def test_one_row_for_each_example_head_and_measure(model: nn.Module, tmp_path: Path) -> None:
    values, out = examples(11), tmp_path / "t.parquet"
    seen: list[int] = []
    assert survey(model, values, one_by_one, out, measures=NAMES, batch=4, progress=seen.append) == 11
    assert seen == [4, 8, 11]
    table = pd.read_parquet(out)
    assert list(table.columns) == [
        "example", "stack", "kind", "layer", "path", "step", "head", "measure", "value",
    ]  # fmt: skip
    same(table, expected(model, values))
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_pandas_polars_and_duckdb_read_it(model: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    survey(model, examples(5), one_by_one, out, measures=NAMES, batch=2)
    means = pd.read_parquet(out).groupby(["layer", "head", "measure"], observed=True).value.mean()
    by_polars = pl.read_parquet(out).group_by("layer", "head", "measure").agg(pl.col("value").mean())
    by_duckdb = duckdb.sql(
        f"select layer, head, measure, avg(value) from '{out}' group by layer, head, measure"
    ).fetchall()
    for rows in (by_polars.iter_rows(), by_duckdb):
        found = {(a, b, c): v for a, b, c, v in rows}
        assert len(found) == len(means) == 2 * 4 * 4
        for key, value in means.items():
            assert found[key] == pytest.approx(value)


class Padded(nn.Module):
    """Causal attention that is told what is padding."""

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        q = nn.functional.one_hot(x, 16).float().view(*x.shape, 2, 8).transpose(1, 2) * 3
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & real[:, None, None].bool()
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def padded(values: Any) -> Any:
    length = max(map(len, values))
    ids = torch.tensor([[*v, *[0] * (length - len(v))] for v in values])
    real = torch.tensor([[1] * len(v) + [0] * (length - len(v)) for v in values])
    yield Batch({"x": ids, "real": real}, len(values), real=real)


@pytest.mark.parametrize("names", [["entropy", "first_token", "mean_distance"], ["entropy", "normalised_entropy"]])
def test_padding_does_not_count(names: list[str], tmp_path: Path) -> None:
    values = [[i % 16 for i in row] for row in examples(6)]
    survey(Padded(), values, padded, tmp_path / "t.parquet", measures=names, batch=3)
    alone = {}
    for i, ids in enumerate(values):
        inputs = {"x": torch.tensor([ids]), "real": torch.ones(1, len(ids))}
        for line in analyze.measure(hookattn.trace(Padded(), inputs), names).to_dict("records"):
            for name in names:
                alone[i, line["head"], name] = line[name]
    for r in pd.read_parquet(tmp_path / "t.parquet").itertuples():
        assert r.value == pytest.approx(alone[r.example, r.head, r.measure], abs=1e-5)


def test_no_weights_where_statistics_do(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = running.api.trace
    monkeypatch.setattr(running.api, "trace", lambda *a, **o: (asked.append(o["capture"]), real(*a, **o))[1])
    survey(model, examples(2), one_by_one, tmp_path / "a.parquet", measures=["entropy", "sink"])
    survey(model, examples(2), one_by_one, tmp_path / "b.parquet", measures=["entropy", "normalised_entropy"])
    assert not any(isinstance(x, str) for c in asked[:2] for x in c)
    assert all([x for x in c if isinstance(x, str)] == ["mask"] for c in asked[2:])


# --------------------------------------------------------------------------------------------- going on after a stop


def test_goes_on_where_it_stopped(model: nn.Module, tmp_path: Path) -> None:
    values, out, ran = examples(10), tmp_path / "t.parquet", []

    def until(n: int) -> Any:
        def encode(batch: Any) -> Any:
            if len(ran) == n:
                raise KeyboardInterrupt
            ran.append(len(batch))
            yield from one_by_one(batch)

        return encode

    with pytest.raises(KeyboardInterrupt):
        survey(model, values, until(3), out, measures=NAMES, batch=2)
    assert not out.exists() and ran == [2, 2, 2]
    (tmp_path / "t.parquet.parts" / "00000003.partial").write_bytes(b"half of a part")
    survey(model, values, until(9), out, measures=NAMES, batch=2)
    assert ran == [2, 2, 2, 2, 2]
    same(pd.read_parquet(out), expected(model, values))
    survey(model, values, until(5), out, measures=NAMES, batch=2)  # complete: the model does not run again


# Ends the process, as a machine does, at the moment when a file is about to get the name that is its first argument.
DYING = """
import os, signal, sys
moment = sys.argv.pop(1)
def watch(event, arguments):
    if event == "os.rename" and os.fspath(arguments[1]).endswith(moment):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from hookattn.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="no signal ends a process at once")
def test_a_killed_process(tmp_path: Path) -> None:
    """Once with a part written that has no name yet, once more with the table written that has no name yet."""
    corpus, out = tmp_path / "ids.jsonl", tmp_path / "t.parquet"
    corpus.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in examples(20)))
    arguments = ["survey", "hookattn.demo.induction:load_pretrained", str(corpus), "-o", str(out)]
    arguments += ["--batch", "2", "--measures", "entropy"]
    parts = tmp_path / "t.parquet.parts"
    kept: dict[str, int] = {}
    for moment, whole in (("00000003.parquet", 3), (out.name, 10)):
        done = subprocess.run([sys.executable, "-c", DYING, moment, *arguments], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        written = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.parquet")}
        assert len(written) == whole and not out.exists()
        assert kept.items() <= written.items(), "what was whole is written once"
        kept = written
    finished = CliRunner().invoke(app, arguments)
    assert finished.exit_code == 0, finished.output
    table = pd.read_parquet(out)
    assert sorted(table.example.unique()) == list(range(20))
    assert len(table) == 20 * 2 * 4
    assert not parts.exists()


def test_another_survey_is_not_continued(model: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    survey(model, examples(3), one_by_one, out, measures=["entropy"])
    with pytest.raises(MeasureError, match=r"t.parquet is of another survey \(other measures\)"):
        survey(model, examples(3), one_by_one, out, measures=["sink"])
    pq.write_table(pa.table({"a": [1]}), tmp_path / "mine.parquet")
    with pytest.raises(MeasureError, match=r"mine.parquet is of another survey"):
        survey(model, examples(3), one_by_one, tmp_path / "mine.parquet", measures=["sink"])
    assert pq.read_table(tmp_path / "mine.parquet").num_rows == 1


# --------------------------------------------------------------------------------------------------------- bad input


def test_an_example_that_the_model_does_not_take(model: nn.Module, tmp_path: Path) -> None:
    values = examples(5)
    values[3] = [1] * 200
    with pytest.raises(InputError, match=r"examples 3 to 3: ValueError: 200 tokens are more than the context of 64"):
        survey(model, values, one_by_one, tmp_path / "t.parquet", measures=["entropy"], batch=2)
    assert len(list((tmp_path / "t.parquet.parts").glob("*.parquet"))) == 1


def test_no_examples(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="no example"):
        survey(model, [], one_by_one, tmp_path / "t.parquet", measures=["entropy"])


def test_encode_that_loses_one(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="encode gave 1 examples for 2"):
        survey(model, examples(2), lambda v: one_by_one(v[:1]), tmp_path / "t.parquet", measures=["entropy"])


def test_a_directory_that_cannot_be_written(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceWriteError, match="cannot be written"):
        survey(model, examples(2), one_by_one, tmp_path / "file" / "t.parquet", measures=["entropy"])


# ----------------------------------------------------------------------------------------------------------- corpora


def test_corpora_of_every_kind(tmp_path: Path) -> None:
    texts = ["one", "zwei drei", "四 </s> \u202b"]
    (tmp_path / "a.txt").write_text("one\n\nzwei drei\r\n四 </s> \u202b\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    pq.write_table(pa.table({"n": [1, 2, 3], "text": texts}), tmp_path / "d.parquet")
    for name in ("a.txt", "b.jsonl", "c.jsonl", "d.parquet"):
        assert list(Corpus((str(tmp_path / name),))) == texts, name
    assert list(Corpus((str(tmp_path / "a.txt"), str(tmp_path / "d.parquet")))) == texts * 2
    pq.write_table(pa.table({"ids": [[1, 2], [3]]}), tmp_path / "e.parquet")
    assert list(Corpus((str(tmp_path / "e.parquet"),), "ids")) == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: is no JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1: has no 'text' or 'input_ids'; it has body"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: expected a text or a list of token ids, got '3'"),
        ("a.jsonl", b"[1, 2.5]\n", "line 1: expected a text"),
        ("a.txt", b"\xff\xfe\n", "cannot be read as UTF-8"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_bad_corpora(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(Corpus((str(path),)))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"nowhere.txt: there is no such file of prompts"):
        Corpus(("nowhere.txt",)).about()


# ------------------------------------------------------------------------------------------------------ command line


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["survey", *map(str, args)])


def test_the_command(model: nn.Module, tmp_path: Path) -> None:
    corpus, out = tmp_path / "ids.jsonl", tmp_path / "t.parquet"
    values = examples(7)
    corpus.write_text("".join(json.dumps(ids) + "\n" for ids in values))
    made = run("hookattn.demo.induction:load_pretrained", corpus, "-o", out, "--measures", "entropy,sink", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["examples"] == 7
    same(pd.read_parquet(out), expected(model, values, ["entropy", "sink"]))
    cut = tmp_path / "cut.parquet"
    made = run("hookattn.demo.induction:load_pretrained", corpus, "-o", cut, "--max-tokens", 4, "--measures", "entropy")
    assert made.exit_code == 0 and f"wrote {cut}" in made.stdout
    same(pd.read_parquet(cut), expected(model, [v[:4] for v in values], ["entropy"]))


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    model = "hookattn.demo.induction:load_pretrained"
    (tmp_path / "t.txt").write_text("a text\n")
    (tmp_path / "empty.txt").write_text("\n")
    for args, message in (
        ((model, tmp_path / "t.txt", "-o", tmp_path / "o.parquet"), "has no tokenizer"),
        ((model, tmp_path / "empty.txt", "-o", tmp_path / "o.parquet"), "no example in it"),
        ((model, tmp_path / "no.txt", "-o", tmp_path / "o.parquet"), "no such file of prompts"),
        ((model, tmp_path / "t.txt", "-o", tmp_path / "no" / "o.parquet"), "does not exist"),
        ((model, tmp_path / "t.txt", "-o", tmp_path / "o.parquet", "--measures", "nope"), "no measure 'nope'"),
    ):
        made = run(*args)
        assert made.exit_code == 1 and message in made.stderr, made.output


def test_a_text_corpus_through_a_tokenizer(tmp_path: Path) -> None:
    encoder = pytest.importorskip("hookattn.demo.encoder")
    source = encoder.directory()
    if source is None:
        pytest.skip("the encoder is not installed")
    texts = ["The cat sat on the mat.", "A dog.", "It rained for the whole of the day, and of the night too."]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    made = run(source, tmp_path / "t.txt", "-o", tmp_path / "o.parquet", "--measures", "entropy,previous_token")
    assert made.exit_code == 0, made.output
    model, tokenizer = encoder.load(source)
    table = pd.read_parquet(tmp_path / "o.parquet")
    for i, text in enumerate(texts):
        with torch.no_grad():
            trace = hookattn.trace(model, dict(tokenizer(text, return_tensors="pt")))
        own = analyze.measure(trace, ["entropy", "previous_token"])
        for name in ("entropy", "previous_token"):
            got = table[(table.example == i) & (table.measure == name)].sort_values(["layer", "head"]).value
            assert got.to_numpy() == pytest.approx(own[name].to_numpy(), abs=1e-4)
    assert not math.isnan(table.value.mean())
