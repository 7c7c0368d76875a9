"""What Ray costs a survey, and how it grows with its actors.

In a shell, with `pip install "hookattn[ray]"`:

    python -m benchmarks.cluster                       # one process and one actor: a model of GPT-2-small's size
    python -m benchmarks.cluster --speed-up docs/survey-speed-up.png    # actors that sleep instead of computing

The cost is told in two ways. *Gaps* are the wall time between chunks, when the actor waits for its next one: they are
the engine's own, however busy the machine is. *CPU time* is what the processes took: an actor's per chunk beside one
process's, and the driver's beside both. What happens once (Ray starts, an actor imports and builds) stands apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookattn.analyze.survey import Batch, Measurer, on_ray_workers, survey, survey_on_ray

BAR_OVERHEAD, BAR_MEMORY = 0.10, 1.1
LOG = "HOOKATTN_BENCH_CLUSTER"
"""The variable that names the folder in which processes write when each chunk began and ended."""
SLEEP = 1.2
"""Seconds that a simulated worker sleeps for a chunk: what eight examples took a model of GPT-2-small's size."""
_VOCABULARY, _SHORTEST = 50257, 32
_MEASURES = ("entropy", "sink", "previous_token", "induction")


def examples(count: int) -> list[list[int]]:
    """Prompts of 32 to 64 tokens."""
    made = torch.Generator().manual_seed(0)
    lengths = torch.randint(_SHORTEST, 2 * _SHORTEST + 1, (count,), generator=made).tolist()
    return [torch.randint(0, _VOCABULARY, (n,), generator=made).tolist() for n in lengths]


def padded(values: Sequence[Any]) -> Iterator[Batch]:
    """A chunk as one batch."""
    longest = max(map(len, values))
    real = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in values])
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in values])
    yield Batch({"input_ids": ids, "attention_mask": real}, len(values), real=real)


def small() -> tuple[nn.Module, Callable[..., Any]]:
    """GPT-2-small with random weights: 12 layers of 12 heads, 768 wide."""
    from .models import gpt2

    _log_chunks()
    model = gpt2(12, 768, 12, 2 * _SHORTEST, _VOCABULARY, torch.device("cpu"), torch.float32)
    return model, padded


class Little(nn.Module):
    """Attention of one head over four numbers: next to nothing to measure."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B T to B 1 T 4."""
        q = nn.functional.one_hot(x % 4, 4).float()[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)


def sleeping() -> tuple[nn.Module, Callable[..., Any]]:
    """A worker that sleeps, once all of them are there: what starts late is no matter of the speed-up."""
    folder = Path(os.environ[LOG])
    _log_chunks()
    (folder / f"ready-{os.getpid()}").touch()
    waited = []

    def encode(values: Sequence[Any]) -> Iterator[Batch]:
        while not waited and len(list(folder.glob("ready-*"))) < int((folder / "actors").read_text()):
            time.sleep(0.01)
        if not waited:
            waited.append(True)
            (folder / f"go-{os.getpid()}").write_text(repr(time.time()))
        time.sleep(SLEEP)
        yield Batch(torch.tensor([ids[:4] for ids in values]), len(values))

    return Little(), encode


def _log_chunks() -> None:
    """Write down for each chunk of this process: wall and CPU time when it began and ended, and the memory then."""
    log = Path(os.environ[LOG]) / f"chunks-{os.getpid()}"

    def logged(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.time(), time.process_time()
            made = real(*arguments)
            with log.open("a") as file:
                file.write(json.dumps([began, (time.time(), time.process_time()), *_memory(), what]) + "\n")
            return made

        return run

    # A part is measured by the first, and written by the other: what a survey itself does for a chunk.
    on_ray_workers.Actor._done = logged("done", on_ray_workers.Actor._done)  # type: ignore[method-assign]
    Measurer.part = logged("part", Measurer.part)  # type: ignore[method-assign]


def _memory() -> tuple[int, int]:
    """Bytes of this process: its share of what is mapped now (PSS), and the most it ever had (RSS)."""
    rollup = Path("/proc/self/smaps_rollup").read_text().split("\n")
    (pss,) = (int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    (peak,) = (int(x.split()[1]) for x in Path("/proc/self/status").read_text().split("\n") if x.startswith("VmHWM"))
    return pss * 1024, peak * 1024


def _chunks(folder: Path) -> list[Any]:
    return [[json.loads(x) for x in file.read_text().splitlines()] for file in sorted(folder.glob("chunks-*"))]


def _one(out: Path, count: int, batch: int) -> dict[str, float]:
    """One process, measured by itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor of one CPU has
    try:
        model, encode = small()
        began = time.time(), time.process_time()
        survey(model, examples(count), encode, out, measures=_MEASURES, batch=batch)
        wall, cpu = time.time() - began[0], time.process_time() - began[1]
    finally:
        torch.set_num_threads(threads)
    pss, peak = _memory()
    return {"wall": wall, "cpu": cpu, "pss": pss, "peak": peak}


def _ray(out: Path, count: int, batch: int) -> dict[str, float]:
    """One actor."""
    import ray

    began = time.time(), time.process_time()
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    started = time.time()
    heard: list[tuple[float, float]] = []
    survey_on_ray(
        "benchmarks.cluster:small", examples(count), out, measures=_MEASURES, batch=batch,
        progress=lambda n: heard.append((time.time(), time.process_time())),
    )  # fmt: skip
    ended = time.time(), time.process_time()
    ray.shutdown()
    return {
        "init": started - began[0], "survey": ended[0] - started, "began": started, "ended": ended[0],
        "driver cpu": ended[1] - began[1], "driver cpu while measuring": heard[-2][1] - heard[1][1],
    }  # fmt: skip


def overhead(count: int, batch: int) -> dict[str, Any]:
    """One process and one actor, each in a process of its own."""
    found: dict[str, Any] = {"examples": count, "batch": batch, "chunks": -(-count // batch)}
    tables = []
    for name in ("one", "ray"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "table.parquet"
            code = f"from benchmarks import cluster as c; import json; from pathlib import Path; print(json.dumps(c._{name}(Path({str(out)!r}), {count}, {batch})))"  # noqa: E501
            done = subprocess.run(
                [sys.executable, "-c", code], env={**os.environ, LOG: folder}, check=True, text=True,
                stdout=subprocess.PIPE,
            )  # fmt: skip
            found[name] = json.loads(done.stdout.splitlines()[-1])
            found[name]["log"] = _chunks(Path(folder))
            tables.append(out.read_bytes())
    found["equal"] = tables[0] == tables[1]
    return {**found, **_shares(found)}


def _shares(found: dict[str, Any]) -> dict[str, float]:
    """The overheads. The first chunk of an actor builds the model, and counts as start."""
    (alone,), (actor,) = found["one"].pop("log"), found["ray"].pop("log")
    # In the actor, a chunk is logged twice: within, what is measured; around it, with what is read and written.
    pairs = [(a, b) for a, b in itertools.pairwise(actor) if (a[4], b[4]) == ("part", "done")]
    within, around = [a for a, _ in pairs], [b for _, b in pairs]
    first, last = around[0], around[-1]
    window = last[1][0] - first[0][0]
    busy = sum(entry[1][0] - entry[0][0] for entry in around)
    per_chunk = sum(x[1][1] - x[0][1] for x in within) / len(within)
    per_chunk_alone = sum(x[1][1] - x[0][1] for x in alone[1:]) / (len(alone) - 1)
    cpu = last[1][1] - first[0][1]
    return {
        "actor starts (s)": first[0][0] - found["ray"]["began"],
        "window (s)": window,
        "busy (s)": busy,
        "gaps ÷ busy": window / busy - 1,
        "cpu of a chunk, one process (s)": per_chunk_alone,
        "cpu of a chunk, actor (s)": per_chunk,
        "cpu of the actor beside measuring": cpu / sum(x[1][1] - x[0][1] for x in within) - 1,
        "cpu of the driver ÷ the actor's": found["ray"]["driver cpu while measuring"] / cpu,
        "pss, one process (MB)": alone[-1][2] / 1e6,
        "pss, actor (MB)": actor[-1][2] / 1e6,
        "pss, actor ÷ one process": actor[-1][2] / alone[-1][2],
        "peak, actor ÷ one process": actor[-1][3] / found["one"]["peak"],
    }


def speed_up(counts: Sequence[int], chunks: int) -> dict[int, float]:
    """Seconds for so many chunks with so many sleeping actors, from when all are there."""
    import ray

    found = {}
    ray.init("local", num_cpus=max(counts), include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[LOG] = folder
            Path(folder, "actors").write_text(str(count))
            survey_on_ray(
                _Sleeping(folder), [[1, 2, 3, 4]] * chunks, Path(folder) / "table.parquet", measures="entropy", batch=1,
                actors=count,
            )  # fmt: skip
            began = min(float(file.read_text()) for file in Path(folder).glob("go-*"))
            ended = max(entry[1][0] for log in _chunks(Path(folder)) for entry in log)
            found[count] = ended - began
            print(f"{count:3} actors: {found[count]:7.2f} s, ideal {SLEEP * chunks / count:7.2f} s", flush=True)
    ray.shutdown()
    return found


class _Sleeping:
    """:func:`sleeping` in a process that has not the variable: that of a worker is as Ray was started."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> Any:
        os.environ[LOG] = self.folder
        return sleeping()


def draw(seconds: dict[int, float], chunks: int, out: str) -> None:
    """The speed-up as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    counts = list(seconds)
    base = seconds[counts[0]] * counts[0]
    axes.plot(counts, counts, color="0.7", linewidth=1, label="linear")
    axes.plot(counts, [base / seconds[n] for n in counts], marker="o", label="survey_on_ray")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_yticks(counts, map(str, counts))
    axes.set_xlabel("actors")
    axes.set_ylabel("speed-up")
    axes.set_title(f"Simulated: actors sleep {SLEEP:g} s for each of {chunks} chunks", fontsize=9)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--speed-up", metavar="PNG", help="draw the speed-up of simulated workers instead")
    parser.add_argument("--actors", default="1,2,4,8,16", help="with --speed-up: how many, separated by commas")
    parser.add_argument("--chunks", type=int, default=160, help="with --speed-up: how many in all")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    found: dict[Any, Any]
    if options.speed_up:
        found = speed_up([int(n) for n in options.actors.split(",")], options.chunks)
        draw(found, options.chunks, options.speed_up)
    else:
        found = overhead(options.examples, options.batch)
        print(json.dumps(found, indent=1, ensure_ascii=False))
        for name, value, bar in (
            ("gaps ÷ busy", found["gaps ÷ busy"], BAR_OVERHEAD),
            ("cpu of the actor beside measuring", found["cpu of the actor beside measuring"], BAR_OVERHEAD),
            ("pss, actor ÷ one process", found["pss, actor ÷ one process"], BAR_MEMORY),
        ):
            print(f"bar: {name} ≤ {bar}: {value:.3f}, {'reached' if value <= bar else 'missed'}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
