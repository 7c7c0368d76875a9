"""A survey in actors of Ray: one process's table to the last bit, whatever is killed; errors that say what to do."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from hookattn.analyze.survey import Corpus, Measurer, survey, survey_on_ray
from hookattn.errors import InputError, MeasureError, ModelError
from tests.cluster import surveyed
from tests.cluster.surveyed import BAD, DEADLY, examples, ray_processes

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "hookattn[ray]"')
pytest.importorskip("ray.data", reason='Ray Data is not installed: pip install "hookattn[ray]"')

HERE = "tests.cluster.surveyed:"
ROOT = Path(__file__).resolve().parents[2]
NAMES = ["entropy", "previous_token"]
MANY: dict[str, Any] = {"measures": NAMES, "batch": 4, "about": {"of": "induction"}}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray of two CPUs for all tests of this file; one that starts its own does so in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor of one CPU has
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=100 << 20,
    )  # fmt: skip
    yield
    ray.shutdown()
    torch.set_num_threads(threads)


def alone(values: Any, out: Path, **options: Any) -> Any:
    model, encode = surveyed.induction()
    survey(model, values, encode, out, **{**MANY, **options})
    return pq.read_table(out)


def same(found: Path, wanted: Any) -> None:
    """To the last bit, with what a table says of itself."""
    table = pq.read_table(found)
    assert table.schema.equals(wanted.schema, check_metadata=True)
    assert table.equals(wanted)
    assert not found.with_name(found.name + ".parts").exists()


def test_the_table_is_that_of_one_process_and_ray_is_left_as_it_was(tmp_path: Path) -> None:
    values, seen = examples(22), []
    wanted = alone(values, tmp_path / "one.parquet")
    handler, settings = signal.getsignal(signal.SIGTERM), ray.data.DataContext.get_current()
    bars, folder, path = settings.enable_progress_bars, os.getcwd(), list(sys.path)
    got = survey_on_ray(
        HERE + "induction", values, tmp_path / "ray.parquet", actors=2, progress=seen.append, **MANY
    )  # fmt: skip
    assert got == 22
    assert seen[0] == 0 and seen[-1] == 22 and seen == sorted(seen)
    same(tmp_path / "ray.parquet", wanted)
    assert ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert ray.data.DataContext.get_current() is settings and settings.enable_progress_bars == bars
    assert (os.getcwd(), sys.path) == (folder, path)
    # Complete: nothing is measured again, as there is nothing at all that could build this model.
    seen.clear()
    assert survey_on_ray(HERE + "refusing", iter(values), tmp_path / "ray.parquet", progress=seen.append, **MANY) == 22
    assert seen == [22]


def test_a_function_and_an_iterator_are_taken_too(tmp_path: Path) -> None:
    values = examples(5)
    wanted = alone(values, tmp_path / "one.parquet")
    model_of = surveyed.induction
    survey_on_ray(lambda: model_of(), iter(values), tmp_path / "ray.parquet", **MANY)
    same(tmp_path / "ray.parquet", wanted)


def kill_when(title: str, ready: Callable[[], bool], killed: list[int], times: int = 1) -> threading.Thread:
    """Kill the first process that calls itself so, once it is time; several times, each time another one."""

    def run() -> None:
        until = time.monotonic() + 120
        while len(killed) < times and time.monotonic() < until:
            found = [pid for pid, name in ray_processes().items() if title in name and pid not in killed]
            if ready() and found:
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
                time.sleep(1)
            time.sleep(0.02)

    made = threading.Thread(target=run, daemon=True)
    made.start()
    return made


@pytest.mark.parametrize(
    ("title", "after", "times"),
    [("MapWorker", 0, 1), ("MapWorker", 3, 2), ("ReadSource", 0, 1)],
    ids=["an actor at once", "actors in the midst", "the reader"],
)
def test_killed_processes_change_nothing(title: str, after: int, times: int, tmp_path: Path) -> None:
    values, killed = examples(60), list[int]()
    wanted = alone(values, tmp_path / "one.parquet")
    folder, said = tmp_path / "ray.parquet.parts", list[str]()
    killer = kill_when(title, lambda: len(list(folder.glob("*.parquet"))) >= after, killed, times)
    assert survey_on_ray(HERE + "slow", values, tmp_path / "ray.parquet", actors=2, say=said.append, **MANY) == 60
    killer.join(10)
    assert len(killed) == times
    same(tmp_path / "ray.parquet", wanted)
    if after:  # an actor that had told something, and was seen to be another process after that
        assert any(f"process {killed[0]} on" in line and "was lost" in line for line in said)


def test_a_chunk_that_kills_its_process_ends_in_an_error_and_keeps_the_parts(tmp_path: Path) -> None:
    values, out = examples(20), tmp_path / "ray.parquet"
    values[17] = [1, DEADLY, 2]
    with pytest.raises(MeasureError, match=r"lost 2 times.*parts .*4.*stay") as told:
        survey_on_ray(HERE + "induction", values, out, retries=1, **MANY)
    assert "examples" in str(told.value)
    assert not out.exists()
    there = {p.name for p in (tmp_path / "ray.parquet.parts").glob("*.parquet")}
    assert {"00000000.parquet", "00000001.parquet"} <= there < {f"{i:08d}.parquet" for i in range(5)}
    # The same survey goes on, and does not measure again what is there.
    before = {name: os.stat(tmp_path / "ray.parquet.parts" / name).st_mtime_ns for name in there}
    values[17] = [1, 3, 2]
    seen: list[int] = []

    def look(n: int) -> None:
        seen.append(n)
        for name, at in before.items():
            path = tmp_path / "ray.parquet.parts" / name
            if path.exists():
                assert os.stat(path).st_mtime_ns == at

    survey_on_ray(HERE + "induction", values, out, progress=look, **MANY)
    assert seen[0] == 4 * (len(there) - 1)
    same(out, alone(values, tmp_path / "one.parquet"))


def test_a_model_that_kills_its_process_ends_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match=r"lost 2 times"):
        survey_on_ray(HERE + "lost", examples(9), tmp_path / "ray.parquet", retries=1, **MANY)
    assert not (tmp_path / "ray.parquet").exists()


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        ("refusing", ModelError, "the weights are not here"),
        ("nothing", ModelError, "nothing"),
    ],
)
def test_a_model_that_cannot_be_built_is_told(build: str, error: type, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words) as told:
        survey_on_ray(HERE + build, examples(9), tmp_path / "ray.parquet", **MANY)
    assert any("in a process of Ray" in note for note in told.value.__notes__)
    assert not (tmp_path / "ray.parquet").exists()


def test_a_bad_example_is_an_error_or_is_recorded(tmp_path: Path) -> None:
    values = examples(11)
    values[6] = [1, BAD]
    with pytest.raises(InputError, match=f"examples 4 to 7.*no token {BAD}"):
        survey_on_ray(HERE + "induction", values, tmp_path / "ray.parquet", **MANY)
    assert not (tmp_path / "ray.parquet").exists()
    wanted = alone(values, tmp_path / "one.parquet", on_error="record")
    survey_on_ray(HERE + "induction", values, tmp_path / "ray.parquet", on_error="record", **MANY)
    same(tmp_path / "ray.parquet", wanted)
    names = [tmp_path / f"{name}.parquet.failed.jsonl" for name in ("one", "ray")]
    assert names[0].read_text() == names[1].read_text() and "6" in names[1].read_text()


def test_a_corpus_that_cannot_be_read_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "ids.jsonl"
    file.write_text("".join(f"{json.dumps(ids)}\n" for ids in examples(9)) + "[1, 2\n")
    with pytest.raises(InputError, match=r"ids\.jsonl, line 10"):
        survey_on_ray(HERE + "induction", Corpus((str(file),)), tmp_path / "ray.parquet", **MANY)
    assert not (tmp_path / "ray.parquet").exists()


def test_another_survey_is_not_gone_on_with(tmp_path: Path) -> None:
    values, out = examples(5), tmp_path / "ray.parquet"
    alone(values, out)
    with pytest.raises(MeasureError, match="other batch"):
        survey_on_ray(HERE + "induction", values, out, **{**MANY, "batch": 2})
    out.write_text("what somebody else keeps here")
    with pytest.raises(MeasureError, match="another survey"):
        survey_on_ray(HERE + "induction", values, out, **MANY)
    assert out.read_text() == "what somebody else keeps here"
    with pytest.raises(MeasureError, match="no example"):
        survey_on_ray(HERE + "induction", [], tmp_path / "none.parquet", **MANY)


def test_a_measurer_in_a_pipeline_of_ones_own(tmp_path: Path) -> None:
    values = examples(12)
    wanted = alone(values, tmp_path / "one.parquet").to_pandas()
    data = ray.data.from_items([{"doc": f"d{i:02}", "input_ids": ids} for i, ids in enumerate(values)])
    measured = data.map_batches(
        Measurer, fn_constructor_args=(HERE + "induction", NAMES), batch_size=5,
        compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1,
    )  # fmt: skip
    found = measured.to_pandas().sort_values(["doc", "layer", "head", "measure"], ignore_index=True)
    wanted["doc"] = [f"d{i:02}" for i in wanted["example"]]
    wanted["measure"] = wanted["measure"].astype(str)
    wanted = wanted.sort_values(["doc", "layer", "head", "measure"], ignore_index=True)
    assert found["value"].tolist() == wanted["value"].tolist()
    assert found["doc"].tolist() == wanted["doc"].tolist()


def started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """A driver of its own, which starts Ray for itself."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


DRIVER = """
from hookattn.analyze.survey import Corpus, survey_on_ray
n = survey_on_ray(
    "own:build", Corpus(("ids.jsonl",)), "heads.parquet", measures=["entropy", "previous_token"], batch=4,
    about={"of": "induction"}, actors=2, progress=lambda n: print(n, flush=True), say=print)
import ray, signal
print("left", ray.is_initialized(), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
"""


def test_a_killed_driver_run_again_goes_on(tmp_path: Path) -> None:
    """A module that only the driver's folder has, relative paths, and a Ray that is started and ended with it."""
    values = examples(100)
    (tmp_path / "own.py").write_text("from tests.cluster.surveyed import slow as build\n")
    (tmp_path / "ids.jsonl").write_text("".join(f"{json.dumps(ids)}\n" for ids in values))
    first = started(["-c", DRIVER], tmp_path)
    parts = tmp_path / "heads.parquet.parts"
    until = time.monotonic() + 150
    while len(list(parts.glob("*.parquet"))) < 5:
        assert time.monotonic() < until and first.poll() is None, first.communicate()
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    there = len(list(parts.glob("*.parquet")))
    assert 5 <= there < 25 and not (tmp_path / "heads.parquet").exists()
    again = started(["-c", DRIVER], tmp_path)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    lines = out.split("\n")
    told = re.fullmatch(r"(\d+) parts are there from an earlier run\.", lines[0])
    # The actors of the killed driver end a moment after it, and may write what they were at.
    assert told is not None and there <= int(told[1]) < 25
    assert int(lines[1]) == 4 * (int(told[1]) - 1) and "100" in lines
    assert "left False True" in out
    same(tmp_path / "heads.parquet", alone(values, tmp_path / "one.parquet"))


def test_the_command_writes_the_table_of_one_process_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import sys\nfrom hookattn.demo.induction import load_pretrained\n"
        "def model():\n    print('a word of the model', file=sys.stderr)\n    return load_pretrained()\n"
    )
    (tmp_path / "ids.jsonl").write_text("".join(f"{json.dumps(ids)}\n" for ids in examples(30)))
    command = [
        "-c",
        "from hookattn.cli import main; main()",
        "survey",
        "own:model",
        "ids.jsonl",
        "--measures",
        "entropy",
        "--batch",
        "4",
    ]
    for name, more in (("one", []), ("ray", ["--engine", "ray", "--actors", "2", "--json"])):
        run = started([*command, *more, "-o", f"{name}.parquet"], tmp_path)
        out, err = run.communicate(timeout=200)
        assert run.returncode == 0, err
    assert json.loads(out) == {
        "file": "ray.parquet", "examples": 30, "failed": 0, "measures": ["entropy"],
        "bytes": (tmp_path / "ray.parquet").stat().st_size,
    }  # fmt: skip
    said = [line for line in err.splitlines() if "Set ray log level" not in line]
    assert said == ["a word of the model"]
    same(tmp_path / "ray.parquet", pq.read_table(tmp_path / "one.parquet"))
    # On one's own machine, GPUs that are not there are told and not waited for.
    if not torch.cuda.is_available():
        run = started([*command, "--engine", "ray", "--gpus-per-actor", "1", "-o", "gpu.parquet"], tmp_path)
        out, err = run.communicate(timeout=200)
        assert run.returncode == 1 and "need 1 GPUs, and there are 0 on this machine" in err
