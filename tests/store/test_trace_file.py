"""A Trace in a file: written at once or as it comes, read lazily, and refused with a reason when it is damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import hookattn
from hookattn import Call, CorruptFileError, NewerFormatError, Site, Trace
from hookattn.store import LazyFile
from hookattn.store.schema import CALL, FIRST
from hookattn.taps.active import current
from tests.reference import causal, draw, paths, same_bits

B, T, E, H, G = 2, 6, 32, 4, 2
X = draw(B, T, E, seed=1)
pytestmark = pytest.mark.filterwarnings("ignore::hookattn.SkippedWarning")


class Layer(nn.Module):
    """Between them, these have every field and attribute that a call can have."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(E, E // H * (H + 2 * G))
        self.sink, self.heat = nn.Parameter(draw(H, 1, 1, seed=3)), nn.Parameter(draw(H, 1, 1, seed=4).abs() + 0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, -1)).transpose(1, 2).split((H, G, G), 1)
        if self.kind in ("causal", "biased"):
            own = {"is_causal": True} if self.kind == "causal" else {"attn_mask": mask}
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **own).transpose(1, 2).flatten(2)
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        scores = 5.0 * torch.tanh(q @ k.mT * 0.3 / 5.0) if self.kind == "capped" else q @ k.mT * self.heat
        scores = scores.masked_fill(mask < -1e30, torch.finfo(scores.dtype).min)
        if self.kind == "sinks":
            scores = torch.cat([scores, self.sink.expand(b, H, t, 1)], -1)
        return (F.dropout(scores.softmax(-1)[..., :t], 0.1, self.training) @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    config = {"name": "tiny", "nested": {"eps": float("inf"), "kind": torch.float16}}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for kind in ("causal", "biased", "capped", "sinks", "biased"))
        self.mask = draw(T, T, seed=5).masked_fill(~causal(T), -torch.inf)

    def forward(self, x: Tensor, fail: type[BaseException] | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, self.mask[: x.shape[1], : x.shape[1]].to(x.dtype))
        if fail is not None:
            raise fail("half-way")
        return x


def run(kind: torch.dtype = torch.float32, **options: Any) -> Trace:
    """Two forwards of different lengths, and something that was skipped."""
    torch.manual_seed(0)
    m = Model().to(kind).eval()
    with hookattn.tracing(m, tokens=["a", "ü", "\N{SNOWMAN}"], **options) as trace:
        m(X.to(kind))
        m(X[:1, :4].to(kind))
        current().skip("unreadable", "layers.9")
        in_memory = [isinstance(x, Tensor) for call in trace for x in call.fields.values() if x is not None]
        assert any(in_memory) == ("to" not in options)
    return trace


def check_same(a: Trace, b: Trace, measured: bool = True) -> None:
    """Every field, attribute and word, bit for bit (but for what the certificates ``measured``, if they did twice)."""
    assert len(a) == len(b) and a.tokens == b.tokens and a.notes == b.notes and a.skipped == b.skipped
    for x, y in zip(a, b, strict=True):
        for name in (
            field.name for field in dataclasses.fields(Call) if field.name not in ("fields", "beside", "made")
        ):
            u, v = getattr(x, name), getattr(y, name)
            if name == "certificate" and not measured:
                u, v = (dataclasses.replace(c, output_error=0.0, weights_error=None, row_sum_error=0.0) for c in (u, v))
            assert type(u) is type(v) and same_bits(u, v), f"{x}: {name}: {u} and {v}"
        assert list(x.fields) == list(y.fields) and repr(x) == repr(y)
        assert all(same_bits(x.get(f), y.get(f)) for f in hookattn.FIELDS if x.has(f)), x


def document(path: Path | str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["hookattn"], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


SOME = [{"heads": [3, 1]}, {"heads": 2, "queries": slice(-1, None)}, {"capture": "mask"}, {"verify": "off"}]
FEW = [{"capture": ("q", "weights"), "layers": [0, -1]}, {"capture": ("q", "k", "bias", "mask", "sinks")}]
CAST = [{"dtype": torch.bfloat16}, {"dtype": torch.float8_e4m3fn}, {"kind": torch.float64}, {"kind": torch.float16}]


@pytest.mark.parametrize("options", [{}, *SOME, *FEW, *CAST], ids=lambda options: " ".join(options) or "all")
def test_saved_and_streamed_are_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    trace = run(**options)
    saved = hookattn.load(trace.save(tmp_path / "saved"))
    streamed, again = run(**options, to=tmp_path / "streamed"), hookattn.load(tmp_path / "streamed")
    check_same(trace, saved)
    check_same(streamed, again)
    check_same(trace, streamed, measured=False)
    check_same(trace[1:].select(step=1), saved[1:].select(step=1))
    assert sorted(os.listdir(tmp_path)) == ["saved", "streamed"] and streamed.path == str(tmp_path / "streamed")
    assert {c.certificate.status for c in again} == {"unverified" if options.get("verify") == "off" else "faithful"}
    one, two = document(tmp_path / "saved"), document(tmp_path / "streamed")
    with safe_open(tmp_path / "saved", framework="pt") as file:  # readable without this library
        for call, entry in zip(trace, one["calls"], strict=True):
            for field, name in entry["fields"].items():
                assert name is None if call.get(field) is None else same_bits(file.get_tensor(name), call.get(field))
                if name is not None and field not in ("mask", "bias", "sinks"):
                    assert name == f"calls/{call.index:04d}/{call.site.path}/{field}"
    if "layers" not in options:  # there calls are written before it is known which are left out
        for entry in (*one["calls"], *two["calls"]):
            entry["certificate"] = entry["certificate"]["status"]
        assert one == two and one["skipped"] == [{"path": "layers.9", "reason": "unreadable", "steps": [1]}]
        assert one["model"]["config"]["nested"] == {"eps": "inf", "kind": "float16"} and not one["compact"]
        files = LazyFile(tmp_path / "saved"), LazyFile(tmp_path / "streamed")
        assert set(files[0]) == set(files[1]) and all(same_bits(*(f.tensor(n) for f in files)) for n in files[0])
    assert paths(saved.select(layer=-1).calls) == ["layers.4"] * 2 and len(saved.select(layer=-1, step=-1)) == 1


def test_every_field_and_attribute_of_a_call_occurs_in_these() -> None:
    calls = [*run(heads=[1, 2], queries=[0]), *hookattn.trace(Model(), X)]
    for name in ("softcap", "causal", "dropout", "heads", "kv_heads", "queries", "of_queries", "derivable"):
        assert any(getattr(c, name) not in (None, False, 0.0, ()) for c in calls), name
    assert all(any(c.get(name) is not None for c in calls) for name in hookattn.FIELDS)
    assert any(isinstance(c.scale, Tensor) for c in calls) and any(not c.mask.all() for c in calls)


def test_what_calls_share_is_stored_once(tmp_path: Path) -> None:
    run(to=tmp_path / "f")
    names = list(LazyFile(tmp_path / "f"))
    expected = [f"shared/{field}/00{i}" for field in ("bias", "mask", "sinks") for i in (0, 1)]
    assert sorted(n for n in names if n.startswith("shared/")) == expected  # one for each of the two lengths
    assert not any(n.startswith("calls/") and n.endswith(("/mask", "/bias", "/sinks")) for n in names)
    call = run()[0]
    masks = (call.mask, call.mask.clone(), ~call.mask)  # a copy of it, and another one as large
    Trace([dataclasses.replace(call, index=i, fields={"mask": m}) for i, m in enumerate(masks)]).save(tmp_path / "g")
    found = [c["fields"]["mask"] for c in document(tmp_path / "g")["calls"]]
    assert found[0] == found[1] != found[2] and torch.equal(hookattn.load(tmp_path / "g")[2].mask, masks[2])


def test_compact(tmp_path: Path) -> None:
    trace = run()
    sizes = [os.path.getsize(trace.save(tmp_path / name, compact=name == "small")) for name in ("large", "small")]
    small, names = hookattn.load(tmp_path / "small"), list(LazyFile(tmp_path / "small"))
    assert not any(n.endswith(("scores", "weights")) for n in names) and sizes[1] < sizes[0]
    for a, b in zip(trace, small, strict=True):
        assert b.weights.dtype == a.weights.dtype and torch.allclose(a.weights, b.weights, rtol=0, atol=1e-6)
        assert torch.allclose(a.scores, b.scores, rtol=1e-6, atol=1e-5)
        assert all(same_bits(a.get(f), b.get(f)) for f in hookattn.FIELDS if f not in ("scores", "weights"))
    some, heads = run(capture=("q", "weights")), run(heads=[3, 0, 1])
    check_same(some, hookattn.load(some.save(tmp_path / "some", compact=True)))  # nothing that could be derived
    for a, b in zip(heads, hookattn.load(heads.save(tmp_path / "heads", compact=True)), strict=True):
        assert torch.allclose(a.weights, b.weights, rtol=0, atol=1e-6) and a.kv_heads == b.kv_heads


def test_a_loaded_trace_saved_again(tmp_path: Path) -> None:
    (trace := run()).save(tmp_path / "f")
    for target in ("g", "f", "f"):  # another path, and twice the one it reads from
        loaded = hookattn.load(tmp_path / "f")
        check_same(trace, hookattn.load(loaded.save(tmp_path / target)))
        check_same(trace, loaded)


@pytest.mark.parametrize("error", [KeyError, hookattn.SelectionError, hookattn.UnfaithfulError, KeyboardInterrupt])
def test_a_failure_leaves_no_file(tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    (older := tmp_path / "older").write_text("mine")
    m = Model()
    monkeypatch.setitem(hookattn.calls.certificate.TOLERANCE, torch.float32, -1.0)
    for path in (tmp_path / "f", older):
        layers, strict = [9] if error is hookattn.SelectionError else None, error is hookattn.UnfaithfulError
        with pytest.raises(error), hookattn.tracing(m, to=path, layers=layers, strict=strict):
            m(X, fail=error if error in (KeyError, KeyboardInterrupt) else None)
    assert os.listdir(tmp_path) == ["older"] and older.read_text() == "mine"
    with pytest.raises(hookattn.TraceWriteError, match="Create the directory"):
        hookattn.trace(m, X, to=tmp_path / "none" / "f")


LAZY = """
import os, sys, time, hookattn, torch
def rss(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def timed(f):
    begin = time.perf_counter(); f(); return (time.perf_counter() - begin) * 1000
def best(f): return min(timed(f) for _ in range(5))
hookattn.load(sys.argv[1])[0].sinks.sum()
before = rss()
opened, trace = best(lambda: hookattn.load(sys.argv[1])), hookattn.load(sys.argv[1])
repr(trace), repr(trace[0]), trace[0].shape
grown = rss() - before
print(opened, grown, best(lambda: trace[0].weights[:, 3].sum()), rss() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory in use from there")
def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """200 MB: opened at once, and one head costs the pages of one head."""
    fields = {"weights": torch.ones(1, 50, 1024, 1024), "sinks": torch.ones(50)}
    call = Call(Site("attn"), 0, 0, "test", torch.float32, 1.0, fields=fields)
    Trace([call]).save(tmp_path / "large")
    assert os.path.getsize(tmp_path / "large") > 200_000_000
    environment = {**os.environ, "PYTHONPATH": str(Path(hookattn.__file__).parents[1])}
    command = [sys.executable, "-c", LAZY, tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    opened, grown, head, after = map(float, done.stdout.split())  # ms, MB, ms, MB
    assert opened < 50 and head < 20 and grown < 20 and after < 20, done.stdout


def test_many_calls_are_opened_in_linear_time(tmp_path: Path) -> None:
    call = run()[0]
    Trace([dataclasses.replace(call, index=i) for i in range(2000)]).save(tmp_path / "f")
    begin = time.process_time()
    assert len(hookattn.load(tmp_path / "f")) == 2000 and time.process_time() - begin < 2


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Path(run().save(tmp_path_factory.mktemp("good") / "f")).read_bytes()


def changed(good: bytes, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another document in its header, as of a writer that makes no checksums; sound otherwise."""
    n = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + n])
    found = json.loads(header["__metadata__"]["hookattn"])
    change(found)
    header["__metadata__"] = {"hookattn": json.dumps(found)}
    raw = json.dumps(header).encode().ljust(n)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + good[8 + n :])
    return path


LATER = {scalar.name for scalar in CALL if scalar.since != FIRST}
PLACES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "the document": lambda d: d,
    "skipped": lambda d: d["skipped"][0],
    "call 1": lambda d: d["calls"][1],
    "call 1, site": lambda d: d["calls"][1]["site"],
    "call 1, certificate": lambda d: d["calls"][1]["certificate"],
}


@pytest.mark.parametrize("place", PLACES)
def test_missing_keys_and_wrong_types(tmp_path: Path, good: bytes, place: str) -> None:
    """An error that names the key, or a trace that can be used: nothing else, whatever stands there."""
    at = PLACES[place]
    for key in set(at(document(changed(good, tmp_path / "f", len)))) - {"format", "format_version", "compact"}:
        path = changed(good, tmp_path / "f", lambda d, key=key: at(d).pop(key))
        if place == "call 1" and key in LATER:  # an older file has it not, and is read
            assert len(hookattn.load(path)) > 1
        else:
            with pytest.raises(CorruptFileError, match=f"{place} has no '{key}'.*save the trace again") as caught:
                hookattn.load(path)
            assert str(path) in str(caught.value)
        refused = 0
        for value in (None, True, -3, 1.5, 10**400, "x", [], [1.5], [None], {"x": 1}, {"tensor": "x"}):
            path = changed(good, tmp_path / "f", lambda d, key=key, value=value: at(d).update({key: value}))
            try:
                found = hookattn.load(path)
            except CorruptFileError as error:
                refused += 1
                assert any(word in str(error) for word in (key, "names the tensor", "the error is")), error
            else:
                assert len(repr(found)) and all(len(repr(c)) and c.has("q") in (True, False) for c in found)
        assert refused >= 6, f"{key}: only {refused} of 11 were refused"


DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d["calls"][1]["fields"].update(q="gone"), r"call 1, field 'q' names the tensor 'gone', which is not in"),
    (lambda d: d["calls"][0].update(dtype="nn"), "'dtype' is 'nn'"),
    (lambda d: d.update(calls=[3]), "'calls' is"),
    (lambda d: d["calls"][0].update(scale=10**400), "'scale' is 1000.*expected a finite number"),
    (lambda d: d.update(tokens=[["a"], "b"]), "'tokens' is .*expected a list of lists of strings or null"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_other_damage(tmp_path: Path, good: bytes, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        hookattn.load(changed(good, tmp_path / "f", change))


def test_a_file_of_before_1_3_says_nothing_of_what_lay_between_weights_and_values(tmp_path: Path, good: bytes) -> None:
    def older(found: dict[str, Any]) -> None:
        found["format_version"] = [1, 2]
        for call in found["calls"]:
            for name in ("score", "normalizer", "basis", "entry"):
                call.pop(name, None)
            del call["fields"]["applied"]
        found["calls"][2]["mixed"], found["calls"][3]["dropout"] = True, 0.5

    calls = hookattn.load(changed(good, tmp_path / "f", older)).calls
    assert {(c.score, c.normalizer, c.entry, *c.basis) for c in calls} == {("dot", "softmax", "")}
    assert [c.has("applied") for c in calls] == [i not in (2, 3) for i in range(len(calls))]
    assert calls[0].applied is None and list(calls[0].fields) == list(hookattn.FIELDS)
    with pytest.raises(hookattn.FieldNotCaptured):
        _ = calls[2].applied


@pytest.mark.parametrize("streamed", [False, True])
def test_how_many_queries_a_call_had(tmp_path: Path, streamed: bool) -> None:
    """Written beside the rows that were kept; a file of format 1.1 did not say."""
    trace = run(queries=[-1, 0], to=tmp_path / "f") if streamed else run(queries=[-1, 0])
    if not streamed:
        trace.save(tmp_path / "f", compact=True)
    lengths = [T] * 5 + [4] * 5
    entries = document(tmp_path / "f")["calls"]
    assert [(e["queries"], e["of_queries"]) for e in entries] == [([n - 1, 0], n) for n in lengths]
    assert [c.of_queries for c in hookattn.load(tmp_path / "f")] == lengths
    assert [c.of_queries for c in hookattn.load(tmp_path / "f").select(step=1)] == [4] * 5
    raw = (tmp_path / "f").read_bytes()

    def lessen(d: dict[str, Any]) -> None:
        d["format_version"] = [1, 1]
        for entry in d["calls"]:
            del entry["of_queries"]

    older = hookattn.load(changed(raw, tmp_path / "g", lessen))
    assert [c.of_queries for c in older] == [None] * 10 and [c.queries for c in older] == [c.queries for c in trace]
    assert not any("of_queries" in entry for entry in document(run().save(tmp_path / "h"))["calls"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("6", "'of_queries' is '6', expected an integer from 0"),
        (True, "'of_queries' is True, expected an integer from 0"),
        (6.0, "'of_queries' is 6.0, expected an integer from 0"),
        (5, "'of_queries' is 5, and query row 5 was kept"),
        (-1, "'of_queries' is -1, expected an integer from 0"),
    ],
)
def test_how_many_queries_there_cannot_have_been(tmp_path: Path, value: object, message: str) -> None:
    raw = Path(run(queries=[-1, 0]).save(tmp_path / "f")).read_bytes()
    with pytest.raises(CorruptFileError, match=f"call 1: {message}.*save the trace again"):
        hookattn.load(changed(raw, tmp_path / "g", lambda d: d["calls"][1].update(of_queries=value)))


def test_how_many_queries_without_a_selection(tmp_path: Path, good: bytes) -> None:
    with pytest.raises(CorruptFileError, match="call 1: 'of_queries' is 6, and 'queries' is null: expected both or"):
        hookattn.load(changed(good, tmp_path / "f", lambda d: d["calls"][1].update(of_queries=6)))


def test_newer_documents(tmp_path: Path, good: bytes) -> None:
    def extend(d: dict[str, Any]) -> None:
        for at in PLACES.values():
            at(d)["of a later version"] = {"x": [1, None]}
        d["format_version"][1] += 1

    older = hookattn.load(changed(good, tmp_path / "f", len))
    check_same(older, hookattn.load(changed(good, tmp_path / "g", extend)))
    with pytest.raises(NewerFormatError, match="Upgrade hookattn"):
        hookattn.load(changed(good, tmp_path / "h", lambda d: d["format_version"].__setitem__(0, 2)))
