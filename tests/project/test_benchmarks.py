"""The benchmarks measure what they say: with a clock that is told the time, and with a case that takes a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hookattn
from benchmarks import __main__ as command
from benchmarks import allocator, bars, checkout, clock, held, measure, memory, peers, reading, table, variants
from benchmarks.cases import (
    GENERATION,
    GROUPS,
    HAND,
    LIBRARIES,
    LONG,
    SMALL_EAGER,
    SMALL_EAGER_32,
    TOY,
    TOY_EAGER,
    Case,
    bytes_taken,
    cases,
    plain_name,
)
from benchmarks.clock import Variant
from benchmarks.derivation import derivation
from benchmarks.disk import streaming
from benchmarks.first import first_over_later, first_traces
from benchmarks.hands import HANDS, LOOP, plain_gpt
from benchmarks.libraries import LibraryModel, library_models
from benchmarks.models import gpt2, llama, sibling, unknown_model
from benchmarks.page import page
from benchmarks.statistics_cost import statistics_cost
from hookattn.models.registry import adapter_for
from hookattn.testing import check_clean

pytest.importorskip("transformers")

CPU = torch.device("cpu")
TINY = Case("tiny", lambda device: unknown_model(2, 16, 2, device, torch.float32), 8, 2, 2, width=16, has_bars=True)


def tiny_llama(implementation: str = "sdpa") -> torch.nn.Module:
    return llama(2, 32, 4, 2, 64, 48, 10, CPU, torch.float32, implementation)


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


def test_what_no_bar_is_about_runs_in_fewer_rounds() -> None:
    rows = [Variant("base", lambda: 1.0), Variant("other", lambda: 1.0), Variant("told", lambda: 1.0, context=True)]
    _, other, told = clock.time_all(rows, Hands(), 0.0, rounds=7, context_every=3)
    assert list(other.seconds) == list(range(7)) and list(told.seconds) == [0, 3, 6]


def test_memory_is_looked_at_once_before_the_rounds() -> None:
    looked: list[str] = []

    def look(variant: Variant) -> int:
        looked.append(variant.name)
        if variant.peer:
            raise ValueError("no memory")
        return 7

    ran: list[float] = []

    def takes(seconds: float) -> Callable[[], float]:
        return lambda: ran.append(seconds) or seconds  # type: ignore[func-returns-value]

    rows = [Variant("short", takes(0.2)), Variant("long", takes(0.6)), Variant("theirs", takes(0.3), peer=True)]
    short, long, theirs = clock.time_all(rows, Hands(), 0.0, rounds=2, peak=look)
    assert looked == ["short", "long", "theirs"] and (short.peak, long.peak, theirs.peak) == (7, 7, None)
    assert theirs.failed == "ValueError: no memory" and not theirs.seconds
    assert (ran.count(0.2), ran.count(0.6), ran.count(0.3)) == (4, 3, 1)


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
    long = clock.time_all([*rows, Variant("long", lambda: 5.0, context=True)], Hands(), 30.0)
    assert len(long[1].seconds) > 3 and list(long[2].seconds) == [0]
    told = clock.time_all([*rows, Variant("long", lambda: 5.0)], Hands(), 30.0)  # a bar is about it
    assert len(told[2].seconds) == len(told[1].seconds) == 4
    assert len(clock.time_all(rows, Hands(), 0.0)[0].seconds) == 1  # time is up after the first


def test_a_case_of_ours() -> None:
    rows = {row.name: row for row in measure.measure(TINY, CPU, 0.0, rounds=2)}
    assert next(iter(rows)) == variants.BASE and list(rows)[-1] == variants.AFTER
    assert all(row.left_out is None and row.milliseconds > 0 for row in rows.values())
    assert rows[variants.BASE].ratio == 1
    assert rows[variants.TRACE].kept == 4 * 2 * 8 * 16 * 4  # q, k, v and output
    more = (rows[variants.ALL].kept or 0) - (rows[variants.TRACE].kept or 0)
    assert more == 2 * 2 * 8 * 8 * 4  # the weights alone
    model, x = TINY.make(CPU), TINY.inputs(CPU)
    for variant in variants.fused_rows(model, x):
        with variant.around():
            kept = variant.run()
        variant.after()
        if variant.name in (variants.TRACE, variants.ALL, variants.WEIGHTS):
            assert all(call.has("weights") for call in kept[0])
        check_clean(model)


def test_what_is_read_of_a_trace() -> None:
    model, x = gpt2(2, 32, 2, 8, 10, CPU, torch.float32), torch.arange(8)[None]
    rows = {v.name: v for v in variants.fused_rows(model, x, ends=False)}
    assert variants.IDLE not in rows and variants.BLOCK not in rows
    weights = rows[variants.OUTPUT_ATTENTIONS].run().attentions
    _, read = rows[variants.ALL].run()
    assert torch.allclose(torch.stack(read), torch.stack(weights), atol=1e-5)
    assert torch.allclose(rows[variants.ONE_HEAD].run()[1], weights[-1][:, :1], atol=1e-5)
    _, fields = rows[variants.READ].run()
    assert len(fields) == 2 and sum(t.shape == (1, 2, 8, 8) for t in fields[0] if t is not None) == 2
    assert rows[variants.CERTIFIED].run()[1].faithful
    assert len(rows[variants.REPORT].run()[1]) == 4  # a row for each head
    for name, has_weights in ((variants.SAVED, True), (variants.COMPACT, False)):
        _, path = rows[name].run()
        with open(path, "rb") as file:
            assert (b"/weights" in file.read()) is has_weights  # the names of tensors are in the header
        rows[name].after()
        assert not Path(path).exists()
    told = [v.name for v in rows.values() if not v.context]
    assert told == [variants.BASE, variants.TRACE, variants.ALL, variants.AFTER, variants.OUTPUT_ATTENTIONS]


def test_rows_of_a_model_that_writes_its_attention_out() -> None:
    model, x = gpt2(2, 32, 2, 8, 10, CPU, torch.float32, "eager"), torch.arange(8)[None]
    rows = {v.name: v for v in variants.eager_rows(model, x)}
    weights = rows[variants.OUTPUT_ATTENTIONS].run().attentions
    assert all(torch.equal(a, b) for a, b in zip(rows[variants.ALL].run()[1], weights, strict=True))
    assert rows[variants.TRACE].run()[0][0].tap == "eager"
    with rows[variants.BLOCK].around():
        rows[variants.BLOCK].run()
    assert rows[variants.EAGER].run().logits.shape == (1, 8, 10)
    assert variants.BLOCK not in {v.name for v in variants.eager_rows(model, x, ends=False)}
    told = [v.name for v in rows.values() if not v.context]
    asked = ["EAGER", "BLOCK", "QKV", "TRACE", "ALL", "AFTER"]
    assert told == [getattr(variants, name) for name in asked]
    check_clean(model)


def test_rows_of_any_model() -> None:
    class Two(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, k)

    one, two = unknown_model(1, 16, 2, CPU, torch.float32), Two()
    for model, x in ((one, torch.randn(1, 4, 16)), (two, (torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)))):
        rows = {v.name: v for v in variants.plain_rows(model, x)}
        for variant in rows.values():
            with variant.around():
                variant.run()
        assert torch.equal(rows[variants.UNTRACED].run(), rows[variants.TRACE].run()[0].output)
        told = [v.name for v in rows.values() if not v.context]
        assert told == [variants.UNTRACED, variants.TRACE, variants.AFTER]
        check_clean(model)


@pytest.mark.parametrize("hand", HANDS)
def test_hands_are_gpts_of_their_own_that_no_adapter_knows(hand: str) -> None:
    model = plain_gpt(hand, 2, 32, 4, 8, 10, CPU)
    ids = torch.arange(7)[None] % 5
    assert not [name for name, part in model.named_modules() if adapter_for(part) and "benchmarks" in str(type(part))]
    trace = hookattn.trace(model, ids, verify="full")
    calls, heads = (8, 1) if hand == LOOP else (2, 4)
    assert len(trace) == calls and {call.tap for call in trace} == {"eager"} and trace.certify().faithful
    for call in trace:
        assert call.weights.shape == (1, heads, 7, 7) and not call.weights.triu(1).any()
        assert torch.allclose(call.weights.sum(-1), torch.ones(()), atol=1e-5)
    with torch.no_grad():
        logits, other = model(ids), model(torch.cat((ids[:, :-1], ids[:, -1:] + 1), 1))
    assert logits.shape == (1, 7, 10) and torch.allclose(logits[:, :-1], other[:, :-1], atol=1e-6)
    assert not torch.allclose(logits[:, -1], other[:, -1], atol=1e-3)


@pytest.mark.parametrize("model", [*library_models()], ids=lambda model: model.name)
def test_models_of_other_libraries(model: LibraryModel) -> None:
    if model.missing:
        pytest.skip(f"{model.package} is not installed")
    made, given = model.make().eval(), model.given()
    with torch.no_grad():
        assert len(hookattn.trace(made, given)) == model.calls


def test_the_first_trace_of_a_new_model() -> None:
    seconds = iter([3.0, 1.0, 2.0, 9.0, 5.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    made: list[torch.nn.Module] = []
    seen: list[int] = []

    def make() -> torch.nn.Module:
        made.append(unknown_model(1, 16, 2, CPU, torch.float32))
        return made[-1]

    def inputs(n: int) -> torch.Tensor:
        seen.append(n)
        return torch.zeros(1, 4, 16)

    def hands(run: Callable[[], Any]) -> float:
        assert isinstance(run(), hookattn.Trace)
        return next(seconds)

    assert first_over_later(make, inputs, models=3, later=3, clock=hands) == 1.25  # of 1.5, 1.25 and 1
    assert len(made) == 3 and seen == [0, 1, 2]
    model = gpt2(1, 16, 2, 8, 10, CPU, torch.float32, "eager")
    found = first_traces(model, torch.zeros(1, 8, dtype=torch.long), models=2, later=1)
    assert len(found) == 2 and min(found.values()) > 0
    check_clean(model)


def test_rows_of_a_generation_in_eager() -> None:
    model, x = tiny_llama("eager"), torch.arange(4)[None]
    rows = {v.name: v for v in variants.eager_generation_rows(model, x, 3)}
    out = rows[variants.OUTPUT_ATTENTIONS].run()
    assert torch.equal(rows[variants.EAGER].run(), out.sequences) and out.sequences.shape == (1, 7)
    trace, read = rows[variants.ALL].run()
    assert len(trace) == 2 * 3 and {call.tap for call in trace} == {"eager"}
    expected = [layer for step in out.attentions for layer in step]
    assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))
    assert [v.name for v in rows.values() if not v.context] == [variants.EAGER, variants.TRACE, variants.AFTER]
    check_clean(model)


def test_rows_of_a_generation() -> None:
    model, x = tiny_llama(), torch.arange(4)[None]
    rows = {v.name: v for v in variants.generation_rows(model, x, 3)}
    out = rows[variants.OUTPUT_ATTENTIONS].run()
    assert torch.equal(rows[variants.BASE].run(), out.sequences) and out.sequences.shape == (1, 7)
    trace, read = rows[variants.ALL].run()
    assert len(trace) == 2 * 3
    expected = [layer for step in out.attentions for layer in step]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(read, expected, strict=True))
    assert torch.allclose(rows[variants.ONE_HEAD].run()[1], expected[-1][:, :1], atol=1e-5)
    check_clean(model)


def test_a_peer_that_runs_the_model_often_is_left_out_of_long_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    often = Variant("theirs", lambda: None, peer=True, forwards=66)
    assert measure.too_large(TINY, often, CPU) == "left out: it runs the model 66 times"
    fused = gpt2(2, 32, 2, 40, 10, CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "attnread", type(sys)("attnread"))
    monkeypatch.setattr(sys.modules["attnread"], "extract_attention", lambda *args, **kwargs: kwargs, raising=False)
    row = peers._attnread(fused, torch.zeros(1, 40, dtype=torch.long))
    assert row.forwards == 2 * (1 + 3) and row.run() == {"heads": [(0, 0), (1, 0)]}  # 40 keys, 16 at a time


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is Linux's")
def test_bytes_that_are_held() -> None:
    size = 64 << 20
    made, more = memory.growth(lambda: torch.ones(size // 4))
    assert more is not None and 0.9 * size < more < 1.2 * size and len(made) == size // 4
    model, x = gpt2(2, 256, 4, 512, 10, CPU, torch.float32), torch.zeros(1, 512, dtype=torch.long)
    found = held.held_bytes(model, x)
    assert found["held ÷ q k v output"] * 4 * 2 * 512 * 256 * 4 == pytest.approx(
        found["held by a default trace, bytes"]
    )
    assert found["held ÷ q k v output"] < 2  # of T×S the weights and scores alone would be four times that
    found = held.long_generation(tiny_llama(), torch.arange(4)[None], tokens=3)
    # q and output, the keys and values of the last step at least, and the scores and weights of all steps.
    least = 2 * 4 * (6 * 2 * 32 + 6 * 2 * 16 + 2 * 4 * (4 * 4 + 5 + 6))
    assert least < found["generated, bytes of the file"] < least + 100_000


def test_reading_a_part_and_the_report() -> None:
    found = reading.one_head(tokens=64, heads=4, rounds=1)
    assert found["all heads of a call, seconds"] > 0 and found["one head ÷ all heads, time"] > 0
    found = reading.report(2, 2, 32, rounds=1)
    assert found["report, seconds"] > 0
    made: list[int] = []
    read: list[tuple[str, int]] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    def reads(name: str) -> Callable[[Any], float]:
        def way(made: Any) -> float:
            read.append((name, made))
            return 2.0

        return way

    ways = {"a": reads("a"), "b": reads("b")}
    spent, _ = reading._read(make, ways, 2, Hands(), CPU)
    assert read == [(name, i) for i, name in enumerate("ab" * 4)]  # none is read twice
    assert spent == {"a": 2.0, "b": 2.0}


def test_idle_blocks_see_nothing_and_tap_only_keeps_nothing() -> None:
    model = gpt2(2, 32, 2, 8, 10, CPU, torch.float32)
    x = torch.zeros(1, 8, dtype=torch.long)
    rows = {v.name: v for v in variants.fused_rows(model, x)}
    with rows[variants.IDLE].around():
        model(x)
    with hookattn.tracing(model, capture="sinks", verify="off") as trace:
        rows[variants.TAP].run()
    assert len(trace) == 2 and all(value is None for call in trace for value in call.fields.values())


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
    assert (rows[variants.TRACE].left_out or "").startswith("left out: needs about")
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
    assert found["stream bytes"] == hookattn.plan(model, torch.zeros(1, 128, dtype=torch.long), to="t").total
    assert found["stream ÷ trace then write"] > 0 and 0.05 < found["stream ÷ plain write"] < 50
    speed = derivation(CPU, heads=2, tokens=64, width=16, dtype=torch.float32, rounds=2)
    assert 0 < speed["derive ÷ copy"] < 10
    cost = statistics_cost(CPU, tokens=256, heads=2, width=16, dtype=torch.float32, seconds=0)
    assert cost["statistics ÷ forward"] > 0


def test_the_bars() -> None:
    def row(name: str, milliseconds: float, ratio: float) -> measure.Row:
        return measure.Row(name, milliseconds, ratio, ratio, ratio, per_call=7.0)

    rows = {
        TOY: [row(variants.TRACE, 1, 1.1), row(variants.BLOCK, 1, 1.3), row(variants.AFTER, 1, 0.99)],
        LONG: [row(variants.ALL, 3, 1.5), row(variants.OUTPUT_ATTENTIONS, 2, 1.2)],
        SMALL_EAGER: [row(variants.TRACE, 1, 1.25), row(variants.QKV, 1, 1.21)],
        GENERATION: [row(variants.TRACE, 1, 1.1)],
        TOY_EAGER: [row(variants.TRACE, 1, 1.3), row(variants.BLOCK, 1, 1.25)],
        SMALL_EAGER_32: [row(variants.TRACE, 1, 1.09)],
        plain_name("views", True): [row(variants.TRACE, 1, 1.4)],
        plain_name("views", False): [row(variants.TRACE, 1, 1.4)],
        next(library_models()).name: [row(variants.TRACE, 1, 1.05)],
    }
    extra = {"generated, bytes of the file": 41e6, "generated, bytes in memory": 61e6, "report, peak in calls": 1.5}
    extra["first trace ÷ later ones"] = 1.3
    told = {v.name: v for v in bars.verdicts(rows, extra, "cpu")}
    assert told["toy: trace ÷ untraced"].reached and not told["toy: trace ÷ untraced, in a block"].reached
    assert told["toy: µs a call, one trace()"].measured == 7.0
    assert told["long: trace + all weights ÷ output_attentions"].measured == 1.25
    assert told["small, eager: trace less q k v, in forwards"].measured == pytest.approx(0.04)
    assert told["toy, eager: trace ÷ untraced"].reached
    assert not told["toy, eager: trace ÷ untraced, in a block"].reached
    assert told["small, eager, 32 tokens: trace ÷ untraced"].measured == 1.09
    assert told["plain GPT, views, toy: trace ÷ untraced"].reached
    assert not told["plain GPT, views, width 768: trace ÷ untraced"].reached
    assert told["timm vit_base: trace ÷ untraced"].reached
    assert told["small, eager: first trace of a new model ÷ later ones"].measured == 1.3
    assert told["generation: trace ÷ untraced"].reached and told["report on 12 × 12 × 512: peak in calls"].reached
    assert told["300 generated tokens: megabytes of the file"].measured == 41
    assert not told["300 generated tokens: megabytes in memory"].reached
    assert told["small: trace ÷ untraced"].measured is None
    assert told["untraced after tracing: furthest median ratio from 1"].reached
    text = table.bar_table(list(told.values()))
    assert "not run" in text and "missed" in text
    text = table.bar_table(
        list(told.values()), {"toy: trace ÷ untraced": 1.125, "small: trace ÷ untraced": None}, "kept"
    )
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["what has to be reached"][-1] == "kept"
    assert lines["toy: trace ÷ untraced"][-3:] == ["1.1", "reached", "1.12"]
    assert lines["small: trace ÷ untraced"][-2:] == ["not", "run"]
    gpu = bars.verdicts({}, {"derive ÷ copy": 0.9, "statistics ÷ forward": 3.5}, "cuda")
    assert [v.reached for v in gpu if v.measured is not None] == [True, False]


def test_the_tables_of_the_page() -> None:
    def row(name: str, ratio: float, left_out: str | None = None) -> dict[str, Any]:
        return {"name": name, "ratio": ratio, "left_out": left_out}

    hand = [row(variants.EAGER, 1), row(variants.TRACE, 1.254), row(variants.OUTPUT_ATTENTIONS, 1.1)]
    found = {
        "cases": {
            TOY_EAGER: hand,
            SMALL_EAGER_32: [row(variants.TRACE, 1.1)],
            TOY: [row(variants.ALL, 0, "too large")],
        },
        "freed memory kept": {"cases": {TOY_EAGER: [row(variants.TRACE, 1.2)]}},
    }
    by_hand, fused = page(found).split("\n\n## Fused kernels\n\n")
    assert by_hand.splitlines() == [
        "## Attention written by hand",
        "",
        "| model | trace | `output_attentions` |",
        "| --- | --- | --- |",
        f"| {TOY_EAGER} | 1.25, 1.20 | 1.10 |",
        f"| {SMALL_EAGER_32} | 1.10 |  |",
    ]
    assert fused.splitlines()[0] == "| model |"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cases", lambda: iter([TINY]))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    path = tmp_path / "out" / "bench.json"
    given = ["--cases", "tiny", "--rounds", "1", "--busy", "--json", str(path), "--rows", "all w,q k", "--once"]
    assert command.main(given) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert len(report["cases"]["tiny"]) == 6
    assert report["cases"]["tiny"][0]["name"] == variants.BASE and report["about"]["torch"]
    assert report["about"]["memory"] == allocator.name() and "freed memory kept" not in report
    assert f"tiny; {allocator.name()}" in (out := capsys.readouterr().out)
    assert "trace + all weights" in out and "toy: trace ÷ untraced" in out
    with pytest.raises(SystemExit):
        command.main(["--cases", "nothing"])


@pytest.mark.slow
def test_the_command_measures_both_allocators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "cases", lambda: iter([TINY]))
    asked: list[list[str]] = []

    def run_keeping(arguments: list[str]) -> dict[str, Any]:
        asked.append(arguments)
        assert command.main([*arguments, "--json", str(tmp_path / "again.json")]) == 0
        found = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
        return {**found, "bars": [{**bar, "measured": 0.123} for bar in found["bars"]]}

    monkeypatch.setattr(allocator, "can_keep", lambda: True)
    monkeypatch.setattr(allocator, "run_keeping", run_keeping)
    path = tmp_path / "bench.json"
    assert command.main(["--cases", "tiny", "--rounds", "1", "--rows", "trace,after", "--json", str(path)]) == 0
    assert len(asked) == 1 and "--cases" in asked[0] and "--busy" not in asked[0]
    out = capsys.readouterr().out
    assert out.count("what has to be reached") == 1 and "freed memory kept\n" in out and "0.123" in out
    report = json.loads(path.read_text(encoding="utf-8"))
    again = report["freed memory kept"]["cases"]["tiny"]
    told = [variants.BASE, variants.BLOCK, variants.TRACE, variants.ALL, variants.AFTER]
    assert [row["name"] for row in again] == told
    assert len(report["cases"]["tiny"]) > len(again)


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
    assert [c.group for c in every] == sorted((c.group for c in every), key=GROUPS.index)
    assert {plain_name(hand, toy) for hand in HANDS for toy in (True, False)} < {c.name for c in every}
    assert {c.group for c in every if isinstance(c.inputs(CPU), tuple)} == {LIBRARIES}


def test_groups_of_cases_are_chosen_and_missing_libraries_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(TINY, rows=variants.plain_rows)
    mine, absent = replace(tiny, name="mine", group=HAND), replace(tiny, name="absent", group=HAND, missing="nowhere")
    monkeypatch.setattr(command, "cases", lambda: iter([tiny, mine, absent]))
    given = ["--rounds", "1", "--once", "--rows", variants.TRACE]
    assert command.main(["--only", "hand,libraries", *given]) == 0
    out = capsys.readouterr().out
    assert "\nmine; " in out and "\ntiny; " not in out and "\nabsent; " not in out
    assert "not installed: absent (nowhere)\n" in out
    assert "untraced after tracing" in out and "not run" not in out  # only bars of what was chosen
    assert command.main(["--cases", "tiny", *given]) == 0
    assert "not run" in capsys.readouterr().out
    assert command.main(["--only", "hand", *given[:-1], "no such row"]) == 0  # which no bar is about
    assert "what has to be reached" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--only", "feet"])
    assert "no such group: feet; there are: hand, libraries, fused" in capsys.readouterr().err
    options = command._parser().parse_args(["--only", "hand"])
    assert command._once_more(options, 1.0)[-2:] == ["--only", "hand"]


def test_from_a_checkout_the_adapters_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkout.register_adapters() == "installed"
    added: list[str] = []
    monkeypatch.setattr(checkout, "entry_points", lambda group: [])
    monkeypatch.setattr(hookattn, "register", lambda adapter: added.append(adapter.name))
    monkeypatch.setattr("sys.path", [*sys.path])
    assert checkout.register_adapters() == "of this checkout"
    assert {"gpt2", "bert", "llama"} <= set(added)


def test_freed_memory_is_kept_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*allocator.KEEPING, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    assert allocator.name() == "the allocator's defaults" and allocator.can_keep() is (sys.platform == "linux")
    begun: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> None:
        begun.append((command, env))
        assert check
        Path(command[-1]).write_text('{"bars": []}', encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", run)
    assert allocator.run_keeping(["--again"]) == {"bars": []}
    assert "--again" in begun[0][0] and allocator.KEEPING.items() <= begun[0][1].items()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "1")  # somebody's own choice
    assert allocator.name() == "an allocator of your choice" and not allocator.can_keep()
    for name, value in allocator.KEEPING.items():
        monkeypatch.setenv(name, value)
    assert allocator.name() == "freed memory kept" and not allocator.can_keep()
