"""Examples that cannot be measured: recorded beside the table, or an error; and never a table that hides them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from hookattn.analyze.survey import Batch, Corpus, Failure, read_table, survey
from hookattn.cli.commands import app
from hookattn.demo.induction import InductionTransformer, load_pretrained
from hookattn.errors import InputError, MeasureError, ModelError

from .surveyed import MODEL, alike, examples, same_table, written

NAMES = ["entropy", "sink"]


@pytest.fixture(scope="module")
def model() -> InductionTransformer:
    return load_pretrained()


def encode(values: Any) -> Any:
    """Refuses 0, which `examples` never has, as a tokenizer may; the model refuses what is not in its vocabulary."""
    if any(ids[0] == 0 for ids in values):
        raise RuntimeError("no token\nof that")
    return alike(values)


def test_the_others_of_its_batch_are_measured_one_by_one(model: Any, tmp_path: Path) -> None:
    values, out, alone = examples(16), tmp_path / "t.parquet", tmp_path / "alone.parquet"
    survey(model, values, alike, alone, measures=NAMES, batch=1)
    values[5], values[11] = [200] * 8, [0] * 8
    assert survey(model, values, encode, out, measures=NAMES, batch=16, on_error="record") == 16
    table, expected = read_table(out), read_table(alone)
    assert sorted(set(range(16)) - set(table.example)) == [5, 11]
    expected = expected[~expected.example.isin([5, 11])].reset_index(drop=True)
    assert table.astype({"value": "float64"}).equals(expected), "the bits of batch=1"
    told = [json.loads(line) for line in (tmp_path / "t.parquet.failed.jsonl").read_text().splitlines()]
    assert told == table.attrs["failed"] and [entry["example"] for entry in told] == [5, 11]
    assert "IndexError" in told[0]["error"] and told[1]["error"].endswith("RuntimeError: no token")
    assert table.attrs["survey"]["found"]["failed"] == 2


def test_it_is_an_error_unless_it_is_asked_for(model: Any, tmp_path: Path) -> None:
    values, out = examples(8), tmp_path / "t.parquet"
    values[5] = [0] * 8
    with pytest.raises(InputError, match="encode does not take the examples 4 to 5: RuntimeError: no token"):
        survey(model, values, encode, out, measures=NAMES, batch=2)
    survey(model, values, encode, out, measures=NAMES, batch=2, on_error="record", shard="0/1")  # goes on
    with pytest.raises(InputError, match=r"1 examples could not be measured; the first one, 5.*No table was written"):
        survey(model, values, encode, out, measures=NAMES, batch=2)
    assert not out.exists()
    survey(model, values, encode, out, measures=NAMES, batch=2, on_error="record")
    with pytest.raises(InputError, match="1 examples could not be measured"):
        survey(model, values, encode, out, measures=NAMES, batch=2)


def test_shards_record_what_one_process_does(model: Any, tmp_path: Path) -> None:
    values = examples(14)
    values[3], values[8], values[9] = [200] * 8, [0] * 8, [200] * 8  # of one chunk, all fail
    for name, shards in (("one", [None]), ("many", ["1/3", "0/3", "2/3", None])):
        for shard in shards:
            survey(model, values, encode, f"{tmp_path}/{name}.parquet", measures=NAMES, batch=2, on_error="record",
                   shard=shard)  # fmt: skip
    same_table(tmp_path / "one.parquet", tmp_path / "many.parquet")
    lists = [(tmp_path / f"{name}.parquet.failed.jsonl").read_bytes() for name in ("one", "many")]
    assert lists[0] == lists[1] and lists[0].count(b"\n") == 3
    survey(model, values, encode, f"{tmp_path}/d/", measures=NAMES, batch=2, on_error="record")
    assert (tmp_path / "d" / "_failed.jsonl").read_bytes() == lists[0]
    assert len(read_table(tmp_path / "d").attrs["failed"]) == 3


def test_if_all_fail_nothing_looks_done(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    for n in (3, 200):
        asked = []

        def failing(values: Any) -> Any:
            asked.append(values)
            raise ValueError("never")

        with pytest.raises(InputError, match=r"none of \d+ examples could be measured; the first one, 0: .*never\."):
            survey(model, examples(n), failing, out, measures=NAMES, batch=1, on_error="record")
        assert len(asked) == min(n, 64) and not list(tmp_path.rglob("*.parquet"))
    survey(model, examples(3), alike, out, measures=NAMES, batch=1, on_error="record")
    assert read_table(out).attrs["failed"] == []


def test_a_shard_of_nothing_but_failures(model: Any, tmp_path: Path) -> None:
    """It waits until somebody has measured something; the table is whole then."""
    values, out = examples(4), tmp_path / "t.parquet"
    values[1] = values[3] = [200] * 8
    options: Any = {"measures": NAMES, "batch": 1, "on_error": "record"}
    with pytest.raises(InputError, match="none of 2 examples"):
        survey(model, values, alike, out, shard="1/2", **options)
    survey(model, values, alike, out, shard="0/2", **options)
    assert survey(model, values, alike, out, shard="1/2", **options) == 2
    survey(model, values, alike, out, **options)
    assert [f["example"] for f in read_table(out).attrs["failed"]] == [1, 3]


def test_what_fails_together_and_not_alone_is_nobodys_fault(model: Any, tmp_path: Path) -> None:
    def crowded(values: Any) -> Any:
        if len(values) > 1:
            raise torch.OutOfMemoryError("no room")
        return alike(values)

    with pytest.raises(InputError, match=r"the examples 0 to 1 fail together and not alone.*no room.*smaller batch"):
        survey(model, examples(4), crowded, tmp_path / "t.parquet", measures=NAMES, batch=2, on_error="record")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ModelError("no tokenizer"), KeyboardInterrupt()])
def test_what_is_no_examples_fault_is_not_recorded(model: Any, tmp_path: Path, error: BaseException) -> None:
    def broken(values: Any) -> Any:
        if values[0] == given[2]:
            raise error
        return alike(values)

    given = examples(4)
    with pytest.raises(type(error)):
        survey(model, given, broken, tmp_path / "t.parquet", measures=NAMES, batch=1, on_error="record")
    assert len(list((tmp_path / "t.parquet.parts").glob("*.parquet"))) == 2


def test_what_a_file_cannot_give(model: Any, tmp_path: Path) -> None:
    good = examples(4)
    path = written(tmp_path, good)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b"{\n", b'{"text": ""}\n', b'{"other": 1}\n', b'"\xff"\n']
    path.write_bytes(b"".join(line for pair in zip(lines, bad, strict=True) for line in pair))
    out = tmp_path / "t.parquet"
    survey(model, Corpus((str(path),)), alike, out, measures=NAMES, batch=3, on_error="record")
    failed = [Failure(**f) for f in read_table(out).attrs["failed"]]
    assert [f.example for f in failed] == [1, 3, 5, 7]
    for failure, said in zip(failed, ("no JSON", "expected a text", "it has other", "UTF-8"), strict=True):
        assert said in failure.error and f"line {failure.example + 1}" in failure.error
    with pytest.raises(InputError, match="line 2: is no JSON"):
        list(Corpus((str(path),)))


def test_an_earlier_list_does_not_stay(model: Any, tmp_path: Path) -> None:
    values, out = examples(3), tmp_path / "t.parquet"
    survey(model, [*values, [200] * 8], alike, out, measures=NAMES, batch=1, on_error="record")
    out.unlink()
    survey(model, values, alike, out, measures=NAMES, batch=1, on_error="record")
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]
    with pytest.raises(MeasureError, match="other batch"):
        survey(model, values, alike, out, measures=NAMES, batch=2)


def test_the_command(tmp_path: Path) -> None:
    values = examples(12)
    values[7] = [1] * 200
    corpus, out = written(tmp_path, values), tmp_path / "t.parquet"
    words = ["survey", MODEL, str(corpus), "-o", str(out), "--measures", "entropy", "--batch", "4"]
    made = CliRunner().invoke(app, [*words, "--on-error", "raise"])
    assert made.exit_code == 1 and "200 tokens are more than the context" in made.stderr
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0 and ": 11 examples" in made.stdout
    assert f"1 of 12 examples could not be measured; {out}.failed.jsonl lists which. The first one, 7" in made.stderr
    made = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(made.stdout)["failed"] == 1 and json.loads(made.stdout)["examples"] == 12
    assert pq.read_table(out).num_rows == 11 * 8


def test_one_batch_may_hold_several_kinds(model: Any, tmp_path: Path) -> None:
    """A batch that is given in pieces is one chunk all the same."""

    def in_pieces(values: Any) -> Any:
        for value in values:
            yield Batch(torch.tensor([value]), 1)

    values = examples(6)
    values[4] = [200] * 8
    survey(model, values, in_pieces, tmp_path / "t.parquet", measures=NAMES, batch=6, on_error="record")
    assert [f["example"] for f in read_table(tmp_path / "t.parquet").attrs["failed"]] == [4]
