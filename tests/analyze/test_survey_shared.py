"""Surveys on several processes: whatever happens to any of them, the table is that of one process, to the last bit."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from hookattn.analyze.survey import Corpus, CorpusShard, Measurer, chunks, survey, survey_on_processes
from hookattn.analyze.survey.chunking import as_shard
from hookattn.analyze.survey.jobs import _Jobs
from hookattn.analyze.survey.measurer import made_by
from hookattn.analyze.survey.parts import Parts, ranges
from hookattn.cli.commands import app
from hookattn.demo.induction import InductionTransformer, load_pretrained
from hookattn.errors import BlankLinesWarning, InputError, MeasureError, ModelError, SelectionError, TraceWriteError

from .surveyed import MODEL, alike, build, build_with_a_warning, examples, one_by_one, same_table, written

NAMES = ["entropy", "previous_token", "sink"]
POSIX = pytest.mark.skipif(os.name == "nt", reason="no signal ends a process at once")


@pytest.fixture(scope="module")
def model() -> InductionTransformer:
    return load_pretrained()


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    return ["survey", MODEL, str(corpus), "-o", str(out), "--batch", "2", "--measures", ",".join(NAMES), *more]


def ran(*args: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, args)))


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("of", [1, 2, 3, 64])
def test_shards_in_any_order_make_the_table_of_one_process(model: Any, tmp_path: Path, of: int) -> None:
    values = examples(21)
    one, many = tmp_path / "one.parquet", tmp_path / "many.parquet"
    assert survey(model, values, alike, one, measures=NAMES, batch=2) == 21
    order = random.Random(of).sample(range(of), of)
    counts = [survey(model, values, alike, many, measures=NAMES, batch=2, shard=CorpusShard(i, of)) for i in order]
    assert sum(counts) == 21 and not many.exists()
    assert counts == [CorpusShard(i, of).size(21, 2) for i in order]
    assert survey(model, values, alike, many, measures=NAMES, batch=2) == 21
    same_table(one, many)
    assert sorted(os.listdir(tmp_path)) == ["many.parquet", "one.parquet"]
    assert survey(model, values, alike, many, measures=NAMES, batch=2, shard="0/1") == 21  # late: it is there already


def test_a_shard_is_an_index_of_a_count() -> None:
    assert as_shard("3/64") == CorpusShard(3, of=64) and as_shard(None) == CorpusShard(0, 1)
    for bad in ("64/64", CorpusShard, "3", "a/b", 3, "-1/4", (1, 2)):
        with pytest.raises((InputError, SelectionError), match=r"shard|CorpusShard"):
            as_shard(bad)
    for index, of in ((-1, 4), (4, 4), (0, 0), (0.5, 2), (True, 2)):
        with pytest.raises(SelectionError, match="CorpusShard"):
            CorpusShard(index, of)  # type: ignore[arg-type]


def test_a_shard_encodes_and_decodes_nothing_of_others(model: Any, tmp_path: Path) -> None:
    values: list[Any] = examples(8)
    values[2] = "a text, which is of chunk 1"
    encoded = []

    def encode(batch: Any) -> Any:
        encoded.append(list(batch))
        return alike(batch)

    corpus = written(tmp_path, values)
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([*lines[:6], "{no json\n", lines[7]]))
    survey(model, Corpus((str(corpus),)), encode, tmp_path / "t.parquet", measures=NAMES, batch=2, shard="0/2")
    with pytest.raises(InputError, match=r"ids.jsonl, line 7: is no JSON"):
        survey(model, Corpus((str(corpus),)), encode, tmp_path / "u.parquet", measures=NAMES, batch=2, shard="3/4")
    assert encoded == [values[0:2], values[4:6]]


def test_two_workers_on_one_shard(model: Any, tmp_path: Path) -> None:
    values, gate = examples(12), threading.Barrier(2, timeout=60)
    one, both = tmp_path / "one.parquet", tmp_path / "both.parquet"
    survey(model, values, alike, one, measures=NAMES, batch=2)
    errors = []

    def work() -> None:
        def encode(batch: Any) -> Any:
            gate.wait()  # each part is measured by both, at the same time
            return alike(batch)

        try:
            survey(load_pretrained(), values, encode, both, measures=NAMES, batch=2, shard="0/1")
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    survey(model, values, alike, both, measures=NAMES, batch=2)
    same_table(one, both)


def test_a_doubled_worker_that_is_late_finds_the_table(model: Any, tmp_path: Path) -> None:
    values, out = examples(6), tmp_path / "t.parquet"

    def encode(batch: Any) -> Any:
        if batch == values[2:4]:  # meanwhile, somebody else makes all of it
            survey(model, values, alike, out, measures=NAMES, batch=2)
        return alike(batch)

    assert survey(model, values, encode, out, measures=NAMES, batch=2) == 6
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_workers_of_other_settings_are_refused(model: Any, tmp_path: Path) -> None:
    out, values = tmp_path / "t.parquet", examples(6)
    survey(model, values, alike, out, measures=NAMES, batch=2, shard="0/2")
    for more, other in (({"batch": 3}, "batch"), ({"measures": "sink"}, "measures"), ({"about": {"x": 1}}, "x")):
        with pytest.raises(MeasureError, match=rf"t.parquet.parts is of another survey \(other {other}\)"):
            survey(model, values, alike, out, **{"measures": NAMES, "batch": 2, "shard": "1/2", **more})
    with pytest.raises(MeasureError, match=r"other model"):
        survey(torch.nn.Sequential(model), values, alike, out, measures=NAMES, batch=2, shard="1/2")
    with pytest.raises(MeasureError, match=r"there were 3 chunks of examples, and now there are 4"):
        survey(model, examples(8), alike, out, measures=NAMES, batch=2, shard="0/2")
    with pytest.raises(InputError, match="the name 'found' is the survey's own"):
        survey(model, values, alike, out, measures=NAMES, about={"found": 1})


def test_what_is_missing_is_named_with_its_shards(tmp_path: Path) -> None:
    corpus, out = written(tmp_path, examples(20)), tmp_path / "t.parquet"
    made = ran(*command(corpus, out, "--finish"))
    assert made.exit_code == 1 and "there are no parts of a survey here" in made.stderr
    assert not (tmp_path / "t.parquet.parts").exists()
    made = ran(*command(corpus, out, "--shard", "0/4"))
    assert made.exit_code == 0 and "shard 0/4: 6 examples; 3 of 10 parts are there" in made.stdout
    made = ran(*command(corpus, out, "--shard", "2/4", "--json"))
    assert json.loads(made.stdout) == {"shard": "2/4", "examples": 4, "parts": 5, "of": 10}
    made = ran(*command(corpus, out, "--finish"))
    assert made.exit_code == 1 and not out.exists()
    assert "5 of 10 parts are missing: 1, 3, 5, 7, 9. No table was written. Run shard 1/4, shard 3/4" in made.stderr
    for i in (1, 3):
        made = ran(*command(corpus, out, "--shard", f"{i}/4"))
    assert "10 of 10 parts are there; --finish makes the table" in made.stdout
    made = ran(*command(corpus, out, "--finish"))
    assert made.exit_code == 0 and f"wrote {out}" in made.stdout, made.output
    one = tmp_path / "one.parquet"
    assert ran(*command(corpus, one)).exit_code == 0
    same_table(one, out)
    assert ran(*command(corpus, out, "--finish")).exit_code == 0  # a second time


def test_numbers_in_words() -> None:
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(range(0, 40, 2), 3) == "0, 2, 4 and 17 more runs"


def test_parts_that_are_no_part_of_it(model: Any, tmp_path: Path) -> None:
    values, out = examples(6), tmp_path / "t.parquet"
    survey(model, values, alike, out, measures=NAMES, batch=2, shard="0/1")
    part = tmp_path / "t.parquet.parts" / "00000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    with pytest.raises(MeasureError, match=r"00000001.parquet: cannot be read.*Remove it"):
        survey(model, values, alike, out, measures=NAMES, batch=2)
    part.write_bytes(whole)
    (tmp_path / "t.parquet.parts" / "00000007.parquet").write_bytes(whole)
    with pytest.raises(MeasureError, match="there are 3 chunks of examples, and a part 7"):
        survey(model, values, alike, out, measures=NAMES, batch=2)
    assert not out.exists()


@POSIX
@pytest.mark.parametrize("seed", [0, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 2))])
def test_a_worker_is_killed_at_any_time(model: Any, tmp_path: Path, seed: int) -> None:
    corpus = written(tmp_path, examples(30))
    one, out = tmp_path / "one.parquet", tmp_path / "t.parquet"
    assert ran(*command(corpus, one)).exit_code == 0
    start = [sys.executable, "-c", "from hookattn.cli import main; main()"]
    first = subprocess.Popen([*start, *command(corpus, out, "--shard", "0/2")], stdout=subprocess.DEVNULL)
    parts, deadline = tmp_path / "t.parquet.parts", time.monotonic() + 120
    while not list(parts.glob("*.parquet")) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.Random(seed).random() * 0.1)
    first.kill()
    first.wait()
    assert ran(*command(corpus, out, "--shard", "1/2")).exit_code == 0
    assert ran(*command(corpus, out, "--shard", "0/2")).exit_code == 0
    assert ran(*command(corpus, out, "--finish")).exit_code == 0
    same_table(one, out)
    assert sorted(os.listdir(tmp_path)) == ["ids.jsonl", "one.parquet", "t.parquet"]


# --------------------------------------------------------------------------------------------------- disks that refuse


@pytest.mark.parametrize("call", ["write", "replace", "fsync", "mkdir"])
def test_a_full_disk_loses_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    values, one, out = examples(8), tmp_path / "one.parquet", tmp_path / "t.parquet"
    survey(model, values, alike, one, measures=NAMES, batch=2)
    real, left = getattr(os, call), [{"mkdir": 0}.get(call, 3)]

    def full(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    if call == "write":
        import builtins

        def opened(name: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            if "x" in mode:
                full(os.open(os.devnull, os.O_WRONLY), b"")
            return open_(name, mode, *more, **options)

        open_ = builtins.open
        monkeypatch.setattr(builtins, "open", opened)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(TraceWriteError, match=r"t.parquet.*No space left on device.*goes on from them"):
        survey(model, values, alike, out, measures=NAMES, batch=2)
    monkeypatch.undo()
    assert not out.exists() and not list(tmp_path.rglob("*.partial"))
    survey(model, values, alike, out, measures=NAMES, batch=2)
    same_table(one, out)


def test_a_folder_that_is_removed(model: Any, tmp_path: Path) -> None:
    import shutil

    values, out = examples(8), tmp_path / "t.parquet"

    def encode(batch: Any) -> Any:
        if batch == values[4:6]:
            shutil.rmtree(tmp_path / "t.parquet.parts")
        return alike(batch)

    with pytest.raises(TraceWriteError, match=r"00000002.parquet: cannot be written: No such file"):
        survey(model, values, encode, out, measures=NAMES, batch=2)
    assert survey(model, values, alike, out, measures=NAMES, batch=2) == 8


# ------------------------------------------------------------------------------------------------------------ Measurer


def test_a_measurer_is_pickled_as_how_to_build_the_model(model: Any, tmp_path: Path) -> None:
    values, out = examples(5), tmp_path / "t.parquet"
    survey(model, values, one_by_one, out, measures=NAMES, batch=2, shard="0/1")
    measurer = Measurer(build, NAMES)
    measurer.load()
    raw = pickle.dumps(measurer)
    assert len(raw) < 2000, "the model is not in it"
    parts = Parts(tmp_path / "u.parquet", {})
    for chunk in chunks(values, 2):
        parts.write(chunk.number, pickle.loads(raw).part(chunk.number, chunk.first, chunk.values))
    parts.counted(3)
    for number in range(3):
        same_table(
            tmp_path / "t.parquet.parts" / f"{number:08d}.parquet", Path(parts.folder.file(f"{number:08d}.parquet"))
        )
    assert made_by(pq.read_schema(parts.folder.file("00000000.parquet")))["torch"] == torch.__version__


def test_builders_that_build_nothing() -> None:
    for bad, match in (
        ("no.such:build", "no.such:build.*ModuleNotFoundError"),
        (f"{MODEL}", "expected it to return .model, encode., got"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ):
        with pytest.raises(ModelError, match=match):
            Measurer(bad, NAMES).load()
    with pytest.raises(InputError, match="build=3"):
        Measurer(3, NAMES)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="on_error"):
        Measurer(build, NAMES, "ignore")


def test_parts_of_several_machines_are_told_apart(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn.analyze.survey import measurer as measuring

    values, out = examples(8), tmp_path / "t.parquet"
    survey(model, values, alike, out, measures=NAMES, batch=2, shard="0/2")
    monkeypatch.setattr(measuring, "_machine", lambda model: {"torch": "9.9", "device": "another"})
    survey(model, values, alike, out, measures=NAMES, batch=2)
    found = json.loads(pq.read_schema(out).metadata[b"hookattn_survey"])["found"]["made_by"]
    assert [entry["parts"] for entry in found] == ["0, 2", "1, 3"] and found[1]["torch"] == "9.9"


# ---------------------------------------------------------------------------------------------------------------- jobs


def test_jobs_make_the_table_of_one_process(model: Any, tmp_path: Path) -> None:
    values, seen = examples(14), list[int]()
    one, many = tmp_path / "one.parquet", tmp_path / "many.parquet"
    survey(model, values, one_by_one, one, measures=NAMES, batch=2)
    assert survey_on_processes(build, values, many, jobs=2, measures=NAMES, batch=2, progress=seen.append) == 14
    assert seen[-1] == 14 and len(seen) == 7
    same_table(one, many)
    assert survey_on_processes(build, values, many, jobs=2, measures=NAMES, batch=2) == 14


def test_jobs_share_a_shard(model: Any, tmp_path: Path) -> None:
    values, out = examples(14), tmp_path / "t.parquet"
    assert survey_on_processes(build, values, out, jobs=2, measures=NAMES, batch=2, shard="1/2") == 6
    assert Parts(out, {"measures": NAMES, "batch": 2}).present() == {1, 3, 5}


def dying() -> Any:
    """A model whose process dies at the third example."""
    model, _ = build()

    def encode(values: Any) -> Any:
        if values[0][0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return one_by_one(values)

    return model, encode


@POSIX
def test_a_killed_job_is_told_and_the_rest_goes_on(model: Any, tmp_path: Path) -> None:
    values, out, said = examples(10), tmp_path / "t.parquet", list[str]()
    values[2][0] = 0
    with pytest.raises(MeasureError, match=r"job 2 of 2 was killed by signal 9. What is done stays"):
        survey_on_processes(dying, values, out, jobs=2, measures=NAMES, batch=2, say=said.append)
    assert said == ["job 2 of 2 was killed by signal 9; the others go on."]
    assert Parts(out, {"measures": NAMES, "batch": 2}).present() == {0, 2, 4}
    assert survey_on_processes(build, values, out, jobs=2, measures=NAMES, batch=2) == 10
    survey(model, values, one_by_one, tmp_path / "one.parquet", measures=NAMES, batch=2)
    same_table(tmp_path / "one.parquet", out)


def test_what_a_job_raises_is_raised(tmp_path: Path) -> None:
    values, said = examples(8), list[str]()
    values[5] = [1] * 200
    with pytest.raises(InputError, match="examples 5 to 5: ValueError: 200 tokens"):
        survey_on_processes(build, values, tmp_path / "t.parquet", jobs=2, measures=NAMES, batch=2, say=said.append)
    assert len(said) == 1 and "failed; the others go on" in said[0]
    with pytest.raises(InputError, match="have to be pickled"):
        survey_on_processes(lambda: build(), values, tmp_path / "u.parquet", jobs=2, measures=NAMES)


@POSIX
@pytest.mark.parametrize(
    "ending", [signal.SIGTERM, *(pytest.param(x, marks=pytest.mark.slow) for x in (signal.SIGINT, signal.SIGKILL))]
)
def test_who_ends_the_command_ends_its_jobs(tmp_path: Path, ending: signal.Signals) -> None:
    corpus, out = written(tmp_path, examples(4000)), tmp_path / "t.parquet"
    start = [sys.executable, "-c", "from hookattn.cli import main; main()"]
    parent = subprocess.Popen(
        [*start, *command(corpus, out, "--jobs", "2")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    parts, deadline = tmp_path / "t.parquet.parts", time.monotonic() + 120
    while len(list(parts.glob("*.parquet"))) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(ending)
    said, _ = parent.communicate(timeout=60)  # their end closes the pipe that they share
    assert parent.returncode != 0 and b"Traceback" not in said, said
    if ending == signal.SIGINT:
        assert b"the same command goes on from there" in said
    there = len(list(parts.glob("*.parquet")))
    time.sleep(0.5)
    assert len(list(parts.glob("*.parquet"))) == there < 2000


def test_a_job_that_fails_before_it_says_anything() -> None:
    jobs: Any = _Jobs([None, None], None, None)  # type: ignore[list-item]
    jobs._ended(1, 3)
    assert jobs.lost == ["job 2 of 2 ended with code 3"]


def test_what_is_told_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far it is, what an earlier run has left, and once, whoever reads the file, that it has blank lines."""
    monkeypatch.setattr("hookattn.cli.survey._PERIOD", 0.0)
    corpus, out = written(tmp_path, examples(6)), tmp_path / "t.parquet"
    corpus.write_text("\n" + corpus.read_text())
    said = ran(*command(corpus, out, "--shard", "0/2")).stderr
    assert "measured 2 of 4 examples in " in said and "goes on" not in said
    said = ran(*command(corpus, out, "--jobs", "2")).stderr
    assert "goes on with" in said and "2 parts of an earlier run stay" in said
    assert said.count("blank lines are no examples") == 1


def test_warnings_of_processes_are_those_of_the_caller(tmp_path: Path) -> None:
    corpus = written(tmp_path, examples(6))
    corpus.write_text("\n" + corpus.read_text())
    with pytest.warns(BlankLinesWarning) as told:
        survey_on_processes(build, Corpus((str(corpus),)), tmp_path / "t.parquet", jobs=2, measures=NAMES, batch=2)
    assert len(told) == 1


def test_warnings_of_libraries_are_said_by_the_first_process_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = examples(6)
    survey_on_processes(build_with_a_warning, values, tmp_path / "t.parquet", jobs=2, measures=NAMES, batch=2)
    assert capfd.readouterr().err.count("UserWarning: of another library") == 1
