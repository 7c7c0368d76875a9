"""Requests that ask for it are recorded, within their bounds; the others, and the server, notice nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.errors import InputError, SelectionError
from hookattn.serving import request_file, tracer
from hookattn.serving.request_file import file_name
from hookattn.serving.settings import Settings, from_environment
from hookattn.serving.tracer import RequestTracer
from tests.serving_requests.batches import Request, Server, difference, flash, request
from tests.serving_requests.test_split import EXACT
from tests.standins import Give, give

__all__ = ["give"]

LOG = logging.getLogger("tests.serving")
ALL = {"capture": ["q", "k", "v", "mask", "scores", "weights", "output"]}


@pytest.fixture
def server(give: Give) -> Iterator[Server]:
    flash(give)
    yield Server()


def step(server: Server, running: RequestTracer, batch: Sequence[tuple[Request, int]]) -> None:
    with running.running(server.model, {r.name: n for r, n in batch}, lambda: [r.name for r, _ in batch]):
        server.step(batch, named=False)


def begin(server: Server, running: RequestTracer, **asked: Any) -> None:
    for name, what in asked.items():
        running.begin(name, name, what, server.model)


def serve(server: Server, folder: Path, asked: Mapping[str, Any], **settings: Any) -> RequestTracer:
    """Requests a, b and c, in batches that change."""
    running = RequestTracer(Settings(folder, **settings), 0, LOG)
    a, b, c = request("a", 9), request("b", 6), request("c", 12)
    begin(server, running, **asked)
    step(server, running, [(a, 4), (c, 7)])
    step(server, running, [(c, 5)])
    step(server, running, [(b, 5), (a, 4)])
    running.finished(["c"])
    step(server, running, [(a, 1), (b, 1)])
    running.finished(["a", "b"])
    return running


def test_who_asks_has_a_file_of_its_own_rows(server: Server, tmp_path: Path) -> None:
    serve(server, tmp_path, {"a": ALL, "b": None, "c": True})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.rank0.safetensors", "c.rank0.safetensors"]
    found = hookattn.load(tmp_path / "a.rank0.safetensors")
    assert [c.step for c in found] == [0, 0, 2, 2, 3, 3]
    assert all(c.certificate.faithful and c.requests == ("a",) for c in found)
    a = request("a", 9)
    a.computed = 9
    difference(found.stitch(), server.alone(a), EXACT)
    statistics = hookattn.load(tmp_path / "c.rank0.safetensors")
    assert statistics[0].captured == ("entropy", "received", "top_k(8)", "top_k_keys(8)")
    assert statistics[0].get("entropy").shape == (1, 4, 7)  # type: ignore[union-attr]
    assert not statistics.notes and not found.notes


def test_who_does_not_ask_costs_a_look(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a session")

    monkeypatch.setattr(tracer, "_Step", never)
    running = serve(server, tmp_path, {"a": None, "b": False})
    assert not list(tmp_path.iterdir()) and not len(running) and running.step == 3


def test_requests_may_ask_by_their_names(server: Server, tmp_path: Path) -> None:
    running = RequestTracer(Settings(tmp_path, prefix="look-"), 0, LOG)
    begin(server, running, **{"look-1": None, "other": None, "look-2": False})
    assert len(running) == 1
    running.close()
    assert [p.name for p in tmp_path.iterdir()] == ["look-1.rank0.safetensors"]
    assert "the server ended" in hookattn.load(tmp_path / "look-1.rank0.safetensors").notes[0]


@pytest.mark.parametrize(
    ("bound", "steps", "says"),
    [
        ({"max_tokens": 8}, [0, 2], "max_tokens=8 was reached after 8 tokens"),
        ({"max_tokens": 3}, [], "max_tokens=3 was reached after 0 tokens"),
        ({"max_bytes": 6_000}, [0], "max_bytes=6000 was reached after 4 tokens"),
        ({"max_seconds": 1e-9}, [0], "max_seconds=1e-09 was reached after 4 tokens"),
    ],
)
def test_a_file_ends_at_a_bound_and_says_so(
    server: Server, tmp_path: Path, bound: dict[str, Any], steps: list[int], says: str
) -> None:
    serve(server, tmp_path, {"a": ALL | bound})
    found = hookattn.load(tmp_path / "a.rank0.safetensors")
    assert sorted({c.step for c in found}) == steps and len(found) == 2 * len(steps)
    assert found.notes == [f"recording ended early: {says}"]
    assert all(torch.isfinite(c.weights).all() for c in found)


def test_a_request_cannot_widen_a_bound(server: Server, tmp_path: Path) -> None:
    serve(server, tmp_path, {"a": {"max_tokens": 1000}}, max_tokens=8)
    assert hookattn.load(tmp_path / "a.rank0.safetensors").notes == [
        "recording ended early: max_tokens=8 was reached after 8 tokens"
    ]


def test_all_files_together_have_a_bound(server: Server, tmp_path: Path) -> None:
    running = serve(server, tmp_path, {"a": ALL, "b": ALL}, max_bytes_in_all=9_000)
    found = hookattn.load(tmp_path / "a.rank0.safetensors")
    assert found.notes == ["recording ended early: max_bytes_in_all=9000 was reached"] and len(found) == 4
    begin(server, running, d=True)
    assert "max_bytes_in_all" in json.loads((tmp_path / "d.rank0.error.json").read_text())["error"]


def test_trouble_is_told_and_the_model_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> KernelCall:
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(request_file, "entries_alone", broken)
    serve(server, tmp_path, {"a": True})
    assert [p.name for p in tmp_path.iterdir()] == ["a.rank0.error.json"]
    said = json.loads((tmp_path / "a.rank0.error.json").read_text())
    assert said == {"request": "a", "rank": 0, "error": "ZeroDivisionError: of a test"}
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("method", ["start", "stop", "finish", "_record"])
def test_trouble_anywhere_is_told(server: Server, tmp_path: Path, method: str) -> None:
    own = getattr(tracer._Step, method)

    def broken(self: Any, *args: Any) -> Any:
        if method != "_record":
            own(self, *args)
        raise ZeroDivisionError("of a test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracer._Step, method, broken)
        serve(server, tmp_path, {"a": True, "b": True})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.rank0.error.json", "b.rank0.error.json"]
    again = tmp_path / "again"
    serve(server, again, {"a": True})  # nothing of it is left
    assert [p.name for p in again.iterdir()] == ["a.rank0.safetensors"]


def test_an_error_of_the_model_goes_through(server: Server, tmp_path: Path) -> None:
    running = RequestTracer(Settings(tmp_path), 0, LOG)
    a = request("a", 5)
    begin(server, running, a=True)
    step(server, running, [(a, 2)])
    with pytest.raises(KeyError, match="of the model"), running.running(server.model, {"a": 1}, None):
        raise KeyError("of the model")
    step(server, running, [(a, 2)])
    running.finished(["a"])
    assert [c.step for c in hookattn.load(tmp_path / "a.rank0.safetensors")] == [0, 0, 2, 2]


def test_where_nothing_can_be_read_it_is_said(tmp_path: Path) -> None:
    running = RequestTracer(Settings(tmp_path), 0, LOG)
    model = torch.nn.Linear(2, 2)
    running.begin("a", "a", True, model)
    with running.running(model, {"a": 1}, lambda: ["a"]):
        model(torch.zeros(1, 2))
    assert "no attention" in json.loads((tmp_path / "a.rank0.error.json").read_text())["error"]


def test_a_server_that_cannot_be_read_tells_each_request(server: Server, tmp_path: Path) -> None:
    running = RequestTracer(Settings(tmp_path), 3, LOG, refused="it is compiled")
    begin(server, running, a=True, b=None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.rank3.error.json"]
    assert json.loads((tmp_path / "a.rank3.error.json").read_text())["error"] == "it is compiled"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("nonsense", "expected true, or settings"),
        (7, "expected true, or an object"),
        ({"folder": "/"}, "'folder' is no setting"),
        ({"capture": ["wings"]}, "'wings'"),
        ({"capture": ["top_k(1, 2, 3)"]}, "top_k with its own parameters"),
        ({"layers": [-1]}, "layers=-1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ('{"dtype": "int8"}', "floating dtype"),
    ],
)
def test_what_there_is_not_to_ask_for_is_told(server: Server, tmp_path: Path, asked: Any, says: str) -> None:
    serve(server, tmp_path, {"a": asked})
    assert [p.name for p in tmp_path.iterdir()] == ["a.rank0.error.json"]
    assert says in json.loads((tmp_path / "a.rank0.error.json").read_text())["error"]


def test_layers_heads_and_dtype(server: Server, tmp_path: Path) -> None:
    asked = json.dumps({"layers": [1], "heads": [0, 3], "dtype": "float16", "capture": ["weights", "local_mass(2)"]})
    serve(server, tmp_path, {"a": asked})
    found = hookattn.load(tmp_path / "a.rank0.safetensors")
    assert {c.site.layer for c in found} == {1} and {c.heads for c in found} == {(0, 3)}
    assert found[0].weights.dtype == torch.float16 and found[0].get("local_mass(2)") is not None


def test_heads_are_numbers_of_the_whole_model(server: Server, tmp_path: Path) -> None:
    shard = hookattn.Shard("H", 4, 8, 2, 4, "tp", 1, 2)
    running = RequestTracer(Settings(tmp_path), 1, LOG, lambda call: shard)
    a = request("a", 5)
    for name, asked in (("a", True), ("some", {"heads": [1, 6]}), ("none", {"heads": [1]})):
        running.begin(name, name, asked, server.model)
    for name in ("a", "some", "none"):
        step(server, running, [(Request(name, a.ids), 5)])
    running.finished(["a", "some", "none"])
    found = {name: hookattn.load(tmp_path / f"{name}.rank1.safetensors") for name in ("a", "some", "none")}
    assert found["a"][0].heads == (4, 5, 6, 7) and found["a"][0].shards == (shard,)
    assert found["some"][0].heads == (6,) and len(found["none"]) == 0
    assert torch.equal(found["some"][0].get("entropy"), found["a"][0].get("entropy")[:, 2:3])  # type: ignore[arg-type,index]


def test_one_that_is_preempted_begins_once(server: Server, tmp_path: Path) -> None:
    running = RequestTracer(Settings(tmp_path), 0, LOG)
    a = request("a", 6)
    begin(server, running, a=ALL)
    step(server, running, [(a, 5)])
    server.preempt(a)
    begin(server, running, a=ALL)
    step(server, running, [(a, 6)])
    running.finished(["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.rank0.safetensors"]
    difference(hookattn.load(tmp_path / "a.rank0.safetensors").stitch(), server.alone(a), EXACT)


NAMES = [
    "a", "A b", "../../etc/passwd", "/abs", ".hidden", "..", ".", "", "x" * 500, "x" * 501, "é", "e\u0301", "日本語",
    "a\0b", "a\nb", "a%2Fb", "a/b", "con:1", "\ud800", "%", "~", "a.rank0",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_is_no_path(name: str) -> None:
    made = file_name(name)
    assert made.isascii() and made.isprintable() and not set(made) & set('/\\:*?"<>|\0') and made not in ("", ".", "..")
    assert len(made) <= 120 and not made.startswith(".") and Path(made).name == made


def test_different_requests_have_different_files() -> None:
    assert len({file_name(name) for name in NAMES}) == len(NAMES)


def test_a_second_request_of_a_name_does_not_replace_the_first(server: Server, tmp_path: Path) -> None:
    running = RequestTracer(Settings(tmp_path), 0, LOG)
    for name in ("a-1", "a-2"):
        running.begin(name, "a", True, server.model)
        step(server, running, [(Request(name, [1, 2, 3]), 3)])
    running.finished(["a-2"])
    running.finished(["a-1"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a%2.rank0.safetensors", "a.rank0.safetensors"]
    assert hookattn.load(tmp_path / "a.rank0.safetensors")[0].requests == ("a-1",)
    assert hookattn.load(tmp_path / "a%2.rank0.safetensors").notes == ["the request is 'a' to its client"]
    assert file_name("a%2") != "a%2"  # no request is called so


def test_a_full_disk_is_told(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = RequestTracer(Settings(tmp_path), 0, LOG)
    begin(server, running, a=True)
    step(server, running, [(request("a", 5), 5)])

    def full(*args: Any) -> None:
        raise hookattn.TraceWriteError("no space left on device")

    monkeypatch.setattr("hookattn.store.stream.Stream.finish", full)
    running.finished(["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.rank0.error.json"]


def test_settings_of_the_environment(tmp_path: Path) -> None:
    assert from_environment({}) is None and from_environment({"HOOKATTN_VLLM": ""}) is None
    file = tmp_path / "hookattn.toml"
    file.write_text('capture = ["entropy"]\nmax_tokens = 7\nprefix = "x"\n')
    made = from_environment(
        {
            "HOOKATTN_VLLM": "/dir",
            "HOOKATTN_VLLM_SETTINGS": str(file),
            "HOOKATTN_VLLM_CAPTURE": "lse, top_k(3), q",
            "HOOKATTN_VLLM_LAYERS": "0, 2",
            "HOOKATTN_VLLM_MAX_SECONDS": "2.5",
        }
    )
    assert made == Settings(Path("/dir"), "x", ("lse", "top_k(3)", "q"), (0, 2), max_tokens=7, max_seconds=2.5)
    assert [s.key for s in made.selection.statistics] == ["lse", "top_k(3)"] and made.selection.fields == ("q",)
    file = tmp_path / "hookattn.json"
    file.write_text('{"verify": "off"}')
    assert from_environment({"HOOKATTN_VLLM": "d", "HOOKATTN_VLLM_SETTINGS": str(file)}).verify == "off"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("WINGS", "2", "'wings' is no setting of hookattn"),
        ("MAX_TOKENS", "many", "HOOKATTN_VLLM_MAX_TOKENS='many': expected a number"),
        ("LAYERS", "1,x", "expected ints"),
        ("CAPTURE", "wings", "no field 'wings'"),
        ("VERIFY", "never", "verify='never'"),
        ("MAX_BYTES", "-1", "max_bytes=-1"),
        ("SETTINGS", "/nowhere.toml", "expected a file in TOML"),
    ],
)
def test_wrong_settings_are_named(name: str, value: str, says: str) -> None:
    with pytest.raises((InputError, SelectionError), match=says):
        from_environment({"HOOKATTN_VLLM": "dir", f"HOOKATTN_VLLM_{name}": value})
