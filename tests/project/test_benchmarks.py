"""The benchmarks measure what they say: with a clock that is told the time, and with a case that takes a moment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from benchmarks import __main__ as command
from benchmarks import bars, checkout, clock, measure, memory, table, variants
from benchmarks.cases import LONG, TOY, Case, bytes_taken, cases
from benchmarks.clock import Variant
from benchmarks.derivation import derivation
from benchmarks.disk import streaming
from benchmarks.models import gpt2, sibling, unknown_model
from benchmarks.statistics_cost import statistics_cost
from hookattn.testing import check_clean

pytest.importorskip("transformers")

CPU = torch.device("cpu")
TINY = Case("tiny", lambda device: unknown_model(2, 16, 2, device, torch.float32), 8, 2, 2, width=16)


class Hands:
    """A clock whose variants say how long they take."""

    def __call__(self, run: Callable[[], Any]) -> float:
        return float(run())


def test_ratios_are_taken_round_by_round() -> None:
    seconds = {"base": iter([9, 9, 1.0, 2.0, 4.0]), "other": iter([9, 9, 1.5, 3.0, 6.0])}  # twice to warm up
    rows = [Variant(name, lambda name=name: next(seconds[name])) for name in seconds]  # type: ignore[misc]
    base, other = clock.time_all(rows, Hands(), 1.0, rounds=3)
    assert clock.compare(other, base) == (1.5, 1.5, 1.5)
    assert clock.added(other, base) == 1.0
    assert clock.quartiles([4, 1, 3, 2]) == (2.5, 2, 3)


def test_around_and_after_are_not_timed_and_slow_rows_run_in_fewer_rounds() -> None:
    heard: list[str] = []

    @contextmanager
    def around() -> Any:
        heard.append("in")
        yield
        heard.append("out")

    def run() -> float:
        heard.append("run")
        return 1.0

    rows = [
        Variant("base", lambda: 1.0),
        Variant("watched", run, around, lambda: heard.append("after")),
        Variant("slow", lambda: 40.0),
    ]
    _, watched, slow = clock.time_all(rows, Hands(), 0.0, rounds=10)
    assert heard == ["in", "run", "out", "after"] * 12
    assert sorted(watched.seconds) == list(range(10)) and sorted(slow.seconds) == [0, 5]


def test_what_is_short_runs_several_times_in_a_row_and_counts_as_their_mean() -> None:
    spent: list[float] = []

    def around(run: Callable[[], Any]) -> float:
        before = len(spent)
        run()
        return sum(spent[before:])

    def takes(*seconds: float) -> Callable[[], None]:
        of = cycle(seconds)
        return lambda: spent.append(next(of))

    rows = [Variant("base", takes(0.0099)), Variant("brief", takes(1e-4, 3e-4)), Variant("long", takes(0.021))]
    found = clock.time_all(rows, around, 0.0, rounds=4)
    assert [len(timed.seconds) for timed in found] == [4, 4, 4]
    runs = {s: spent.count(s) for s in spent}
    assert runs == {0.0099: 2 + 4 * 2 + 4 * 3, 1e-4: 1 + 4 * 10, 3e-4: 1 + 4 * 10, 0.021: 2 + 4}
    assert found[1].seconds == pytest.approx(dict.fromkeys(range(4), 2e-4))


def test_a_peer_that_fails_is_a_row_and_ours_is_an_error() -> None:
    def broken() -> float:
        raise ValueError("no such thing\nat all")

    rows = [Variant("base", lambda: 1.0), Variant("theirs", broken, peer=True)]
    found = clock.time_all(rows, Hands(), 0.0, rounds=3)
    assert found[1].failed == "ValueError: no such thing" and not found[1].seconds
    assert measure._row(found[1], found[0], 4).left_out == "failed: ValueError: no such thing"
    with pytest.raises(ValueError):
        clock.time_all([rows[0], Variant("ours", broken)], Hands(), 0.0)


def test_the_rounds_fit_the_time() -> None:
    rows = [Variant("base", lambda: 1.0), Variant("other", lambda: 1.0)]
    assert len(clock.time_all(rows, Hands(), 20.0)[0].seconds) == 10
    long = clock.time_all([*rows, Variant("long", lambda: 5.0)], Hands(), 30.0)
    assert len(long[1].seconds) > 3 and list(long[2].seconds) == [0]
    assert len(clock.time_all(rows, Hands(), 0.0)[0].seconds) == 1  # time is up after the first


def test_a_case_of_ours() -> None:
    rows = {row.name: row for row in measure.measure(TINY, CPU, 0.0, rounds=2)}
    assert next(iter(rows)) == variants.BASE and list(rows)[-1] == variants.AFTER
    assert all(row.left_out is None and row.milliseconds > 0 for row in rows.values())
    assert rows[variants.BASE].ratio == 1
    assert rows[variants.QKV].kept == 3 * 2 * 8 * 16 * 4
    model, x = TINY.make(CPU), TINY.inputs(CPU)
    for variant in variants.variants(model, x):
        with variant.around():
            kept = variant.run()
        variant.after()
        if variant.name in (variants.FULL, variants.WEIGHTS):
            assert all(call.has("weights") for call in kept)
        check_clean(model)


def test_idle_blocks_see_nothing_and_tap_only_keeps_nothing() -> None:
    model = gpt2(2, 32, 2, 8, 10, CPU, torch.float32)
    x = torch.zeros(1, 8, dtype=torch.long)
    rows = {v.name: v for v in variants.variants(model, x)}
    with rows[variants.IDLE].around():
        model(x)
    with hookattn.tracing(model, capture="sinks", verify="off") as trace:
        rows[variants.TAP].run()
    assert len(trace) == 2 and all(value is None for call in trace for value in call.fields.values())
    eager = rows[variants.OUTPUT_ATTENTIONS].run()
    assert torch.allclose(eager.attentions[1], rows[variants.FULL].run()[1].weights, atol=1e-5)


def test_siblings_share_weights_and_nothing_else() -> None:
    model = gpt2(1, 32, 2, 8, 10, CPU, torch.bfloat16)
    other = sibling(model, "eager")
    assert other.config._attn_implementation == "eager" and model.config._attn_implementation == "sdpa"
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in pairs) and pairs[0][0].dtype == torch.bfloat16


def test_what_does_not_fit_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda device: 4096)
    rows = {row.name: row for row in measure.measure(TINY, CPU, 0.0, rounds=1, memory=False)}
    assert rows[variants.BASE].left_out is None
    assert (rows[variants.FULL].left_out or "").startswith("left out: needs about")
    assert "left out: needs about" in table.case_table("tiny", list(rows.values()))
    far = Variant("far", lambda: None, kept=0, host=1 << 20)
    assert (measure.too_large(TINY, far, CPU) or "").endswith("of the host")
    assert "to disk" in (measure.too_large(TINY, Variant("file", lambda: None, kept=0, disk=1 << 40), CPU) or "")
    monkeypatch.setattr(measure, "free_memory", lambda device: 1 << 50)
    assert "to the host" in (measure.too_large(TINY, Variant("far", lambda: None, kept=0, host=1 << 40), CPU) or "")
    assert bytes_taken(TINY, True, 0) == 5 * 2 * 64 * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory() -> None:
    size = 64 << 20
    found = memory.peak(Variant("one", lambda: torch.ones(size // 4)), CPU)
    assert found is not None and 0.9 * size < found < 1.5 * size


def test_streaming_and_derivation() -> None:
    model = gpt2(3, 64, 4, 128, 10, CPU, torch.float32)
    found = streaming(model, torch.zeros(1, 128, dtype=torch.long), clock.cpu_clock, rounds=1)
    assert found["stream bytes"] == hookattn.plan(model, torch.zeros(1, 128, dtype=torch.long)).total
    assert found["stream ÷ trace then write"] > 0 and 0.05 < found["stream ÷ plain write"] < 50
    speed = derivation(CPU, heads=2, tokens=64, width=16, dtype=torch.float32, rounds=2)
    assert 0 < speed["derive ÷ copy"] < 10
    cost = statistics_cost(CPU, tokens=256, heads=2, width=16, dtype=torch.float32, seconds=0)
    assert cost["statistics ÷ forward"] > 0


def test_the_bars() -> None:
    def row(name: str, milliseconds: float, ratio: float) -> measure.Row:
        return measure.Row(name, milliseconds, ratio, ratio, ratio, per_call=7.0)

    rows = {
        TOY: [row(variants.FULL, 1, 1.2), row(variants.QKV, 1, 1.3), row(variants.AFTER, 1, 0.99)],
        LONG: [row(variants.FULL, 3, 2), row(variants.OUTPUT_ATTENTIONS, 2, 1)],
    }
    told = {v.name: v for v in bars.verdicts(rows, {}, "cpu")}
    assert told["toy: everything ÷ untraced"].reached and not told["toy: q k v ÷ untraced"].reached
    assert told["long: everything ÷ eager output_attentions"].measured == 1.5
    assert told["small: everything ÷ untraced"].measured is None
    assert told["untraced after tracing: furthest median ratio from 1"].reached
    text = table.bar_table(list(told.values()))
    assert "not run" in text and "missed" in text
    gpu = bars.verdicts({}, {"derive ÷ copy": 0.9, "statistics ÷ forward": 3.5}, "cuda")
    assert [v.reached for v in gpu if v.measured is not None] == [True, False]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cases", lambda: iter([TINY]))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    path = tmp_path / "out" / "bench.json"
    assert (
        command.main(["--cases", "tiny", "--rounds", "1", "--busy", "--json", str(path), "--rows", "everyt,q k"]) == 0
    )
    report = json.loads(path.read_text(encoding="utf-8"))
    assert len(report["cases"]["tiny"]) == 6
    assert report["cases"]["tiny"][0]["name"] == variants.BASE and report["about"]["torch"]
    assert "everything" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--cases", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no CUDA device" in out


def test_the_cases() -> None:
    every = list(cases())
    assert len({c.name for c in every}) == len(every)
    for case in every:
        assert set(case.places) <= {"cpu", "cuda"} and case.places
    assert max(c.tokens for c in every) == 32768 and {c.batch for c in every} == {1, 16}


def test_from_a_checkout_the_adapters_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkout.register_adapters() == "installed"
    added: list[str] = []
    monkeypatch.setattr(checkout, "entry_points", lambda group: [])
    monkeypatch.setattr(hookattn, "register", lambda adapter: added.append(adapter.name))
    monkeypatch.setattr("sys.path", [*sys.path])
    assert checkout.register_adapters() == "of this checkout"
    assert {"gpt2", "bert", "llama"} <= set(added)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_stays_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: begun.append(environment))
    for name in command._ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    command._keep_freed_memory()
    assert len(begun) == 1 and command._ALLOCATOR.items() <= begun[0].items()
    for name in command._ALLOCATOR:
        monkeypatch.setenv(name, "1")  # somebody's own choice
    command._keep_freed_memory()
    assert len(begun) == 1
