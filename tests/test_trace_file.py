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
from hookattn.taps.current import current
from tests.reference import causal, draw, paths, same_bits

B, T, E, H, G = 2, 6, 32, 4, 2
X = draw(B, T, E, seed=1)


class Layer(nn.Module):
    """Between them, these have every field and attribute that a call can have."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(E, E // H * (H + 2 * G))
        self.sink, self.heat = nn.Parameter(draw(H, 1, 1, seed=3)), nn.Parameter(draw(H, 1, 1, seed=4).abs() + 0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, -1)).transpose(1, 2).split((H, G, G), 1)
        if self.kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        if self.kind == "biased":
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2)
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

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, self.mask[: x.shape[1], : x.shape[1]].to(x.dtype))
        if fail:
            raise KeyError("half-way")
        return x


def model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).eval()


def run(dtype: torch.dtype = torch.float32, **options: Any) -> Trace:
    """Two forwards of different lengths, and something that was skipped."""
    m = model(dtype)
    with hookattn.tracing(m, tokens=["a", "ü", "\N{SNOWMAN}"], **options) as trace:
        m(X.to(dtype))
        m(X[:1, :4].to(dtype))
        current().skip("unreadable", "layers.9")
    return trace


def check_same(a: Trace, b: Trace, measured: bool = True) -> None:
    """Every field, attribute and word, bit for bit (but for what the certificates ``measured``, if they did twice)."""
    assert len(a) == len(b) and a.tokens == b.tokens and a.notes == b.notes and a.skipped == b.skipped
    for x, y in zip(a, b, strict=True):
        for name in (field.name for field in dataclasses.fields(Call) if field.name != "fields"):
            u, v = getattr(x, name), getattr(y, name)
            if name == "certificate" and not measured:
                u, v = (dataclasses.replace(c, output_error=0.0, weights_error=None, row_sum_error=0.0) for c in (u, v))
            assert type(u) is type(v) and same_bits(u, v), f"{x}: {name}: {u} and {v}"
        assert list(x.fields) == list(y.fields) and repr(x) == repr(y)
        assert all(same_bits(x.get(f), y.get(f)) for f in hookattn.FIELDS if x.has(f)), x


def document(path: Path | str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["hookattn"], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


# ------------------------------------------------------------------------------------------------ there and back


OPTIONS: list[dict[str, Any]] = [
    {}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"dtype": torch.float8_e4m3fn}, {"heads": [3, 1]},
    {"heads": 2, "queries": slice(-1, None)}, {"capture": ("q", "weights"), "layers": [0, -1]}, {"verify": "off"},
    {"capture": ("q", "k", "bias", "mask", "sinks")}, {"capture": "mask"}, {"verify": "full", "queries": [0, 2]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "all")
def test_saved_and_streamed_are_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    trace = run(**options)
    assert trace.path is None and trace.save(tmp_path / "saved") == str(tmp_path / "saved")
    streamed = run(**options, to=tmp_path / "streamed")
    saved, again = hookattn.load(tmp_path / "saved"), hookattn.load(tmp_path / "streamed")
    for one, two in ((trace, saved), (streamed, again)):
        check_same(one, two)
    check_same(trace, streamed, measured=False)
    assert saved.path == str(tmp_path / "saved") and streamed.path == again.path == str(tmp_path / "streamed")
    assert saved.model["versions"]["torch"] == torch.__version__ and saved.model["class"] == "Model"
    assert saved.model["config"]["nested"] == {"eps": "inf", "kind": "float16"}
    one, two = document(tmp_path / "saved"), document(tmp_path / "streamed")
    if "layers" not in options:  # there calls are written before it is known which are left out
        for call in (*one["calls"], *two["calls"]):
            call["certificate"] = call["certificate"]["status"]
        assert one == two and one["skipped"] == [{"path": "layers.9", "reason": "unreadable", "steps": [1]}]
        names, other = LazyFile(tmp_path / "saved"), LazyFile(tmp_path / "streamed")
        assert set(names) == set(other) and all(same_bits(names.tensor(n), other.tensor(n)) for n in names)
    assert os.listdir(tmp_path) in (["saved", "streamed"], ["streamed", "saved"])
    if options.get("verify") != "off":
        assert {c.certificate.status for c in streamed} == {"faithful"} and streamed.faithful and again.faithful
    check_same(trace[1:].select(step=1), saved[1:].select(step=1))
    assert paths(saved.select(layer=-1).calls) == ["layers.4"] * 2 and len(saved.select(layer=-1, step=-1)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    trace = run(dtype, to=tmp_path / "f")
    check_same(run(dtype), trace, measured=False)
    assert {c.dtype for c in trace} == {dtype} and trace.faithful


def test_everything_occurs() -> None:
    """What the round trips above are worth: every field and attribute is something else than nothing somewhere."""
    calls = [*run(heads=[1, 2], queries=[0]), *hookattn.trace(model().train(), X)]
    for name in ("softcap", "causal", "dropout", "heads", "kv_heads", "queries", "derivable"):
        assert any(getattr(c, name) not in (None, False, 0.0, ()) for c in calls), name
    assert all(any(c.get(name) is not None for c in calls) for name in hookattn.FIELDS)
    assert any(isinstance(c.scale, Tensor) for c in calls) and any(not c.mask.all() for c in calls)


def test_readable_without_this_library(tmp_path: Path) -> None:
    trace = run()
    trace.save(tmp_path / "f")
    found = document(tmp_path / "f")
    assert found["format"] == "hookattn-trace" and found["tokens"] == trace.tokens and not found["compact"]
    with safe_open(tmp_path / "f", framework="pt") as file:
        for call, entry in zip(trace, found["calls"], strict=True):
            assert entry["site"]["path"] == call.site.path and entry["certificate"]["status"] == "faithful"
            for field, name in entry["fields"].items():
                assert name is None if call.get(field) is None else torch.equal(file.get_tensor(name), call.get(field))
                if name is not None and field not in ("mask", "bias", "sinks"):
                    assert name == f"calls/{call.index:04d}/{call.site.path}/{field}"


def test_what_calls_share_is_stored_once(tmp_path: Path) -> None:
    run(to=tmp_path / "f")
    names = list(LazyFile(tmp_path / "f"))
    # Two lengths of each: the causal mask of all layers, the bias of two, the sinks of one.
    assert sorted(n for n in names if n.startswith("shared/")) == [
        f"shared/{field}/00{i}" for field in ("bias", "mask", "sinks") for i in (0, 1)]
    assert not any(n.startswith("calls/") and n.endswith(("/mask", "/bias", "/sinks")) for n in names)
    call = run()[0]  # a copy of its mask, and another one as large
    masks = (call.mask, call.mask.clone(), ~call.mask)
    Trace([dataclasses.replace(call, index=i, fields={"mask": m}) for i, m in enumerate(masks)]).save(tmp_path / "g")
    found = [c["fields"]["mask"] for c in document(tmp_path / "g")["calls"]]
    assert found[0] == found[1] != found[2] and torch.equal(hookattn.load(tmp_path / "g")[2].mask, masks[2])


def test_compact(tmp_path: Path) -> None:
    trace = run()
    sizes = [os.path.getsize(trace.save(tmp_path / name, compact=name == "small")) for name in ("large", "small")]
    small, large = hookattn.load(tmp_path / "small"), LazyFile(tmp_path / "large")
    assert not any(n.endswith(("scores", "weights")) for n in LazyFile(tmp_path / "small")) and sizes[1] < sizes[0]
    assert document(tmp_path / "small")["compact"] and any(n.endswith("weights") for n in large)
    for a, b in zip(trace, small, strict=True):
        assert b.has("scores") and b.has("weights") and b.weights.dtype == a.weights.dtype
        assert torch.allclose(a.weights, b.weights, rtol=0, atol=1e-6)
        assert torch.allclose(a.scores, b.scores, rtol=1e-6, atol=1e-5)
        assert all(same_bits(a.get(f), b.get(f)) for f in hookattn.FIELDS if f not in ("scores", "weights"))
    some = run(capture=("q", "weights"))  # from these nothing can be derived: nothing is left out
    some.save(tmp_path / "some", compact=True)
    check_same(some, hookattn.load(tmp_path / "some"))
    heads = run(heads=[3, 0, 1])
    heads.save(tmp_path / "heads", compact=True)
    for a, b in zip(heads, hookattn.load(tmp_path / "heads"), strict=True):
        assert torch.allclose(a.weights, b.weights, rtol=0, atol=1e-6) and a.kv_heads == b.kv_heads


def test_a_loaded_trace_saved_again(tmp_path: Path) -> None:
    trace = run()
    trace.save(tmp_path / "f")
    for target in ("g", "f", "f"):  # another path, and twice the one it reads from
        loaded = hookattn.load(tmp_path / "f")
        loaded.save(tmp_path / target)
        check_same(trace, loaded)
        check_same(trace, hookattn.load(tmp_path / target))
    hookattn.load(tmp_path / "f").select(layer=2).save(tmp_path / "h", compact=True)
    assert torch.allclose(hookattn.load(tmp_path / "h")[1].weights, trace.select(layer=2)[1].weights, atol=1e-6)


@pytest.mark.parametrize("error", [KeyError, hookattn.SelectionError, hookattn.UnfaithfulError, KeyboardInterrupt])
def test_a_failure_leaves_no_file(tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    m, older = model(), (tmp_path / "older")
    older.write_text("mine")
    monkeypatch.setitem(hookattn.certificate.TOLERANCE, torch.float32, -1.0)
    for path in (tmp_path / "f", older):
        layers, strict = [9] if error is hookattn.SelectionError else None, error is hookattn.UnfaithfulError
        with pytest.raises(error), hookattn.tracing(m, to=path, layers=layers, strict=strict):
            m(X, fail=error is KeyError)
            if error is KeyboardInterrupt:
                raise error
    assert os.listdir(tmp_path) == ["older"] and older.read_text() == "mine"
    with pytest.raises(hookattn.TraceWriteError, match="Create the directory"):
        hookattn.trace(m, X, to=tmp_path / "none" / "f")


LAZY = """
import os, sys, time, hookattn, torch
def rss(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def best(f):
    times = []
    for _ in range(5):
        begin = time.perf_counter(); f(); times.append(time.perf_counter() - begin)
    return min(times) * 1000
hookattn.load(sys.argv[2])[0].weights.sum()
before = rss()
opened = best(lambda: hookattn.load(sys.argv[1]))
trace = hookattn.load(sys.argv[1])
repr(trace), repr(trace[0]), trace[0].shape
grown = rss() - before
print(opened, grown, best(lambda: trace[0].weights[:, 3].sum()), rss() - before)
"""


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """200 MB: opened at once, and one head costs the pages of one head."""
    call = Call(Site("attn"), 0, 0, "test", torch.float32, 1.0, fields={"weights": torch.ones(1, 50, 1024, 1024)})
    Trace([call]).save(tmp_path / "large")
    Trace([dataclasses.replace(call, fields={"weights": torch.ones(1, 1, 2, 2)})]).save(tmp_path / "small")
    assert os.path.getsize(tmp_path / "large") > 200_000_000
    command = [sys.executable, "-c", LAZY, str(tmp_path / "large"), str(tmp_path / "small")]
    environment = {**os.environ, "PYTHONPATH": str(Path(hookattn.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    opened, grown, head, after = map(float, done.stdout.split())
    assert opened < 50 and head < 20, f"opened in {opened:.1f} ms, one head in {head:.1f} ms"
    assert grown < 20 and after < 20, f"{grown:.1f} MB after opening, {after:.1f} MB after one head of 4 MB"


def test_many_calls_are_opened_in_linear_time(tmp_path: Path) -> None:
    call = run()[0]
    Trace([dataclasses.replace(call, index=i) for i in range(3000)]).save(tmp_path / "f")
    begin = time.process_time()
    assert len(hookattn.load(tmp_path / "f")) == 3000
    assert time.process_time() - begin < 3


# ------------------------------------------------------------------------------------------------ damaged documents


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "f"
    run().save(path)
    return path.read_bytes()


def changed(good: bytes, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another document in its header, sound otherwise."""
    n = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + n])
    found = json.loads(header["__metadata__"]["hookattn"])
    change(found)
    header["__metadata__"]["hookattn"] = json.dumps(found)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + good[8 + n :])
    return path


PLACES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "the document": lambda d: d, "skipped": lambda d: d["skipped"][0], "call 1": lambda d: d["calls"][1],
    "call 1, site": lambda d: d["calls"][1]["site"], "call 1, certificate": lambda d: d["calls"][1]["certificate"]}


@pytest.mark.parametrize("place", PLACES)
def test_missing_keys_and_wrong_types(tmp_path: Path, good: bytes, place: str) -> None:
    """An error that names the key, or a trace that can be used: nothing else, whatever stands there."""
    at = PLACES[place]
    (tmp_path / "f").write_bytes(good)
    keys = [key for key in at(document(tmp_path / "f")) if key not in ("format", "format_version", "compact")]
    assert len(keys) >= 3
    for key in keys:
        path = changed(good, tmp_path / "f", lambda d, key=key: at(d).pop(key))
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
                assert key in str(error) or "names the tensor" in str(error) or "OverflowError" in str(error), error
            else:
                assert len(repr(found)) and all(len(repr(c)) and c.has("q") in (True, False) for c in found)
        assert refused >= 6, f"{key}: only {refused} of 11 were refused"


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d["calls"][1]["fields"].update(q="gone"), r"call 1 names the tensor 'gone', which is not in the file"),
    (lambda d: d["calls"][0].update(dtype="nn"), "'dtype' is 'nn'"), (lambda d: d.update(calls=[3]), "'calls' is"),
    (lambda d: d["calls"][0].update(scale=10**400), "OverflowError"),
    (lambda d: d.update(tokens=[["a"], "b"]), "expected texts or null")])
def test_other_damage(tmp_path: Path, good: bytes, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        hookattn.load(changed(good, tmp_path / "f", change))


def test_newer_documents(tmp_path: Path, good: bytes) -> None:
    def extend(d: dict[str, Any]) -> None:
        for at in PLACES.values():
            at(d)["of a later version"] = {"x": [1, None]}
        d["format_version"][1] += 1

    older = hookattn.load(changed(good, tmp_path / "f", len))
    check_same(older, hookattn.load(changed(good, tmp_path / "g", extend)))
    with pytest.raises(NewerFormatError, match="Upgrade hookattn"):
        hookattn.load(changed(good, tmp_path / "h", lambda d: d["format_version"].__setitem__(0, 2)))
