"""What surveys read and write: corpora of every kind and place, tables as files and directories, here and in stores."""

from __future__ import annotations

import bz2
import gzip
import http.server
import json
import lzma
import os
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pad
import pyarrow.parquet as pq
import pytest

from hookattn.analyze.survey import Corpus, chunks, read_table, survey
from hookattn.analyze.survey import blocks as reading
from hookattn.demo.induction import InductionTransformer, load_pretrained
from hookattn.errors import BlankLinesWarning, InputError, MeasureError, TraceWriteError

from .surveyed import alike, examples

TEXTS = ["one", "zwei drei", "四 </s> \u202b", "last"]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in TEXTS)
NAMES = ["entropy", "sink"]


@pytest.fixture(scope="module")
def model() -> InductionTransformer:
    return load_pretrained()


def read(*paths: Any, field: str | None = None) -> list[Any]:
    return list(Corpus(tuple(map(str, paths)), field))


# ------------------------------------------------------------------------------------------------------------ corpora


def packed(kind: str, data: bytes) -> bytes:
    if kind == "zst":
        return bytes(pa.compress(data, "zstd", asbytes=True))
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](data)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.jsonl.{kind}").write_bytes(packed(kind, LINES.encode()))
    (tmp_path / f"b.txt.{kind}").write_bytes(packed(kind, "\n".join(TEXTS).encode()))
    (tmp_path / f"c.json.{kind}").write_bytes(packed(kind, LINES.encode()))
    assert read(*(tmp_path / f"{name}.{kind}" for name in ("a.jsonl", "b.txt", "c.json"))) == TEXTS * 3
    cut = tmp_path / f"cut.txt.{kind}"
    cut.write_bytes(packed(kind, os.urandom(5000).hex().encode())[:-40])
    with pytest.raises(InputError, match=r"cut.txt.* cannot be read"):
        read(cut)
    # Several at a time pack a file as several, one behind the other.
    (tmp_path / f"two.txt.{kind}").write_bytes(b"".join(packed(kind, f"{text}\n".encode()) for text in TEXTS))
    assert read(tmp_path / f"two.txt.{kind}") == TEXTS
    bad = tmp_path / f"bad.txt.{kind}"
    bad.write_bytes(b"this is no such thing")
    with pytest.raises(InputError, match=r"bad.txt.* cannot be read"):
        read(bad)


def test_patterns_and_directories(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "[1].txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["[1].txt", "a.txt", "b.txt"]
    assert read(tmp_path / "[1].txt") == ["[1].txt"]
    folder = tmp_path / "d"
    (folder / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"text": TEXTS[:2]}), folder / "0.parquet")
    pq.write_table(pa.table({"text": TEXTS[2:]}), folder / "deep" / "1.parquet")
    for name in ("_metadata.parquet", ".hidden.txt", "README.md"):
        (folder / name).write_text("no example")
    assert read(folder) == TEXTS == read(f"{folder}/")
    assert [entry["path"] for entry in Corpus((str(folder),)).about()] == [
        str(folder / "0.parquet"), str(folder / "deep" / "1.parquet"),
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    for nothing, said in ((tmp_path / "*.nope", "no file has such a name"), (tmp_path / "empty", "no file of prompts")):
        with pytest.raises(InputError, match=said):
            read(nothing)


def test_stores(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/corpora/a.jsonl.gz", gzip.compress(LINES.encode()))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "b.parquet")
    store.put_file(str(tmp_path / "b.parquet"), "/corpora/b.parquet")
    assert read("memory://corpora/a.jsonl.gz", "memory://corpora/b.parquet") == TEXTS * 2
    assert read("memory://corpora/*.parquet") == TEXTS and read("memory://corpora") == TEXTS * 2
    assert read(f"file://{tmp_path}/b.parquet") == TEXTS
    told = Corpus(("memory://corpora/*",)).about()
    assert [(entry["path"], entry["bytes"]) for entry in told] == [
        ("memory:///corpora/a.jsonl.gz", store.size("/corpora/a.jsonl.gz")),
        ("memory:///corpora/b.parquet", store.size("/corpora/b.parquet")),
    ]
    assert all(entry["changed"] for entry in told) and json.dumps(told)
    for nothing, said in (("memory://corpora/c.txt", "no such file"), ("nosuch://x/y.txt", "cannot be reached")):
        with pytest.raises(InputError, match=said):
            read(nothing)


def test_a_server(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/a.jsonl.gz"
            assert read(url) == TEXTS
            with pytest.raises(InputError, match="no such file"):
                read(url.replace("a.jsonl", "b.jsonl"))
        finally:
            server.shutdown()


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text(LINES.splitlines()[0])
    assert read(f"hub:{folder}:train") == TEXTS and read(f"hub:{folder}:test") == TEXTS[:1]
    with pytest.raises(InputError, match=r"one split has to be named.*train.*it has"):
        read(f"hub:{folder}")
    with pytest.raises(InputError, match="there is no split 'nope'"):
        read(f"hub:{folder}:nope")
    with pytest.raises(InputError, match="has no 'body'; it has id, text"):
        read(f"hub:{folder}:train", field="body")
    made = datasets.Dataset.from_dict({"ids": [[n, 1] for n in range(3000)]})
    made.save_to_disk(str(tmp_path / "saved"))
    corpus = Corpus((f"hub:{tmp_path / 'saved'}",), "ids")
    assert corpus.quick_count() == 3000 and list(corpus) == [[n, 1] for n in range(3000)]
    own = [chunk.values for chunk in chunks(corpus, 7, lambda number: number == 400)]
    assert own[400] == [[n, 1] for n in range(2800, 2807)] and not own[399]
    with pytest.raises(InputError, match="has no 'text' or 'input_ids'; it has ids"):
        read(f"hub:{tmp_path / 'saved'}")
    told = corpus.about()
    assert told[0]["version"] and told == corpus.about()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("hub:nobody/nothing-at-all", "hub:", "hub:./nowhere", "hub:a/b/c/d", "hub:/a"):
        with pytest.raises(InputError, match="hub:"):
            read(name)


def test_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'needs the package datasets: pip install "hookattn\[corpora\]"'):
        read(f"hub:{tmp_path}")


def test_row_groups_of_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [[n, 1] for n in range(10000)]
    pq.write_table(pa.table({"ids": values}), tmp_path / "a.parquet", row_group_size=3000)
    corpus, groups = Corpus((str(tmp_path / "a.parquet"),), "ids"), list[int]()
    real = reading._RowGroup.values

    def values_of(self: Any, start: int, stop: int) -> Any:
        groups.append(self.group)
        return real(self, start, stop)

    monkeypatch.setattr(reading._RowGroup, "values", values_of)
    # 2996 to 3002 lie in two groups, 9996 is in the last.
    found = {c.number: c.values for c in chunks(corpus, 7, lambda n: n in (428, 1428)) if c.values}
    assert found == {428: values[2996:3003], 1428: values[9996:]} and groups == [0, 1, 3]
    assert [v for c in chunks(corpus, 7) for v in c.values] == values
    assert corpus.count() == corpus.quick_count() == 10000


def test_lines_of_any_ending(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\n \u3000\r\nb\rc\n\n\nd".encode())
    assert read(tmp_path / "a.txt") == ["a", "b", "c", "d"]
    big = ["x" * (i % 7 + 1) for i in range(3000)]
    (tmp_path / "b.txt").write_text("\n\n".join(big))
    corpus = Corpus((str(tmp_path / "b.txt"),))
    assert list(corpus) == big and corpus.count() == 3000
    assert [v for chunk in chunks(corpus, 11) for v in chunk.values] == big


@pytest.mark.slow
def test_ten_million_lines_start_at_once(tmp_path: Path) -> None:
    """Within a minute there is a part, whichever shard: a bound that only reading all of it first would break."""
    import time

    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for _ in range(1000):
            file.write('{"input_ids":[1,2,3,4,5,6,7,8]}\n' * 10000)
    start, corpus = time.monotonic(), Corpus((str(path),))
    assert corpus.quick_count() is None
    for chunk in chunks(corpus, 8, lambda number: number % 64 == 63):
        if chunk.values:
            break
    assert chunk.number == 63 and time.monotonic() - start < 10
    assert corpus.count() == 10**7 and time.monotonic() - start < 60


# ------------------------------------------------------------------------------------------------------------- tables


def test_a_directory_of_parts(model: Any, tmp_path: Path) -> None:
    values, one, out = examples(9), tmp_path / "one.parquet", f"{tmp_path}/heads/"
    survey(model, values, alike, one, measures=NAMES, batch=2)
    (tmp_path / "heads").mkdir()
    survey(model, values, alike, out, measures=NAMES, batch=2, shard="0/2")
    assert not os.listdir(out), "not all of it is nothing of it"
    with pytest.raises(MeasureError, match="no complete survey here yet"):
        read_table(out)
    assert survey(model, values, alike, out, measures=NAMES, batch=2) == 9
    assert sorted(os.listdir(tmp_path)) == ["heads", "one.parquet"]
    expected = pq.read_table(one)
    columns = expected.replace_schema_metadata(None)
    assert pad.dataset(out).to_table().replace_schema_metadata(None).sort_by("example").num_rows == columns.num_rows
    assert pad.dataset(out).to_table().to_pydict() == columns.to_pydict()
    total = sum(expected.column("value").to_pylist())
    assert pl.read_parquet(f"{out}*.parquet")["value"].sum() == pytest.approx(total)
    (by_duckdb,) = duckdb.sql(f"select sum(value) from '{out}*.parquet'").fetchall()
    assert by_duckdb[0] == pytest.approx(total)
    for name in (out, out.rstrip("/"), Path(out), one):
        table = read_table(name)
        assert table.equals(expected.to_pandas()) and table.attrs["survey"]["found"]["parts"] == 5
    assert survey(model, values, alike, out, measures=NAMES, batch=2) == 9  # it is there
    with pytest.raises(MeasureError, match="other batch"):
        survey(model, values, alike, out, measures=NAMES, batch=3)


def test_a_directory_of_something_else(model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    with pytest.raises(MeasureError, match="has files in it and is no survey"):
        survey(model, examples(2), alike, f"{tmp_path}/mine/", measures=NAMES)
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]
    for nothing in (tmp_path / "none", tmp_path / "none.parquet", f"{tmp_path}/none/"):
        with pytest.raises(MeasureError, match="there is no complete survey"):
            read_table(nothing)


@pytest.mark.parametrize("name", ["heads.parquet", "heads/"])
def test_a_table_in_a_store(model: Any, tmp_path: Path, name: str) -> None:
    values, one, out = examples(9), tmp_path / "one.parquet", f"memory://out-{name[-1:] == '/'}/{name}"
    survey(model, values, alike, one, measures=NAMES, batch=2)
    for i in (1, 0):
        with pytest.raises(MeasureError, match="no complete survey"):
            read_table(out)
        survey(model, values, alike, out, measures=NAMES, batch=2, shard=f"{i}/2")
    assert survey(model, values, alike, out, measures=NAMES, batch=2) == 9
    assert read_table(out).equals(read_table(one))
    assert survey(model, values, alike, out, measures=NAMES, batch=2) == 9
    with pytest.raises(MeasureError, match="other batch"):
        survey(model, values, alike, out, measures=NAMES, batch=3)
    if name == "heads.parquet":
        assert fsspec.filesystem("memory").cat_file("/out-False/heads.parquet") == one.read_bytes()
    with pytest.raises(TraceWriteError, match="cannot be reached"):
        survey(model, values, alike, "nosuch://x/heads.parquet", measures=NAMES)


def test_blank_lines_are_told_once_a_file_where_numbers_are_not_those_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\nthree\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n\n\n")  # none follows: these are where their lines are
    with pytest.warns(BlankLinesWarning, match=r"a.txt: blank lines are no examples") as told:
        assert list(Corpus((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))) == ["one", "two", "three", "one", "two"]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Corpus((str(tmp_path / "b.txt"),)).count() == 2
