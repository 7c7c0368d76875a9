"""The served page: ranges, changes of the file, and who may ask."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import hookattn
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import CorruptFileError, RenderError, TraceFileError

pytest.importorskip("starlette")
pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

from starlette.testclient import TestClient

from hookattn.cli.commands import app as command_line
from hookattn.render.options import viewer_options
from hookattn.render.server import HOST, application, listen
from hookattn.render.trace_files import trace_file
from tests.serving import TOKEN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ids = example_tokens(0, length=8)
    with torch.no_grad():
        trace = hookattn.trace(load_pretrained(), ids, tokens=[[str(i) for i in ids[0].tolist()]])
    return Path(trace.save(tmp_path / "Lauf é.safetensors"))


def client(path: Path, **options: Any) -> TestClient:
    """Who knows the token; paths are below it."""
    return TestClient(application(str(path), token=TOKEN, **options), base_url=f"http://{HOST}:8765/{TOKEN}/")


def ask(asker: TestClient, start: int, end: int, **headers: str) -> Any:
    """Bytes from ``start`` up to ``end``, the end excluded."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asker.get("trace", headers={"range": f"bytes={start}-{end - 1}", **named})


@pytest.mark.parametrize(
    "given",
    [
        f"bytes=0-{'9' * 5000}",
        "bytes=0-1,3-4",
        "bytes=-5",
        "bytes=5-2",
        "bytes=--1",
        "lines=0-1",
        "bytes",
        "",
        "bytes=٣-٤",
    ],
)
def test_a_range_that_is_none_gets_nothing(path: Path, given: str) -> None:
    got = client(path).get("trace", headers={"range": given.encode()})
    assert got.status_code == 416 and got.content == b""


def test_two_ranges_get_nothing(path: Path) -> None:
    got = client(path).get("trace", headers=[("range", "bytes=0-1"), ("range", "bytes=2-3")])
    assert got.status_code == 416 and got.content == b""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_leaves_no_file(tmp_path: Path, how: signal.Signals) -> None:
    code = (
        "import hookattn, torch\n"
        "from hookattn.demo.induction import example_tokens, load_pretrained\n"
        "from hookattn import render\n"
        "trace = hookattn.trace(load_pretrained(), example_tokens(0, length=8))\n"
        "render.serve(trace, port=0, open_browser=False, ready=lambda url: print(url, flush=True))\n"
    )
    environment = os.environ | {
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "adapters"))),
    }
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with urllib.request.urlopen(url) as page:  # it answers, so that it runs
        assert page.status == 200
    assert list(tmp_path.rglob("*.safetensors"))
    process.send_signal(how)
    process.wait(20)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_parts_of_the_file(path: Path) -> None:
    asker, data = client(path), path.read_bytes()
    for start, end in ((0, 8), (8, 1000), (len(data) - 5, len(data)), (0, len(data))):
        got = ask(asker, start, end)
        assert got.status_code == 206 and got.content == data[start:end]
        assert got.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
    assert got.headers["cache-control"] == "no-store" and got.headers["x-name"] == "Lauf%20%C3%A9.safetensors"
    assert ask(asker, len(data), len(data) + 9).status_code == 416
    whole = asker.get("trace")
    assert whole.status_code == 200 and whole.content == data
    assert asker.head("trace").headers["content-length"] == str(len(data))


@pytest.mark.parametrize("header", ["if_range", "if_match"])
def test_a_file_that_changes_is_noticed(path: Path, header: str) -> None:
    asker = client(path)
    tag = ask(asker, 0, 8).headers["etag"]
    assert ask(asker, 0, 8, **{header: tag}).status_code == 206
    assert ask(asker, 0, 8, **{header: '"another"'}).status_code == 412
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    for asked in ({header: tag}, {}):
        answer = ask(asker, 0, 8, **asked)
        assert answer.status_code == 412 and "has changed" in answer.text and bytes(data[:8]) not in answer.content


@pytest.mark.parametrize("how", ["replaced", "linked elsewhere", "removed", "a directory"])
def test_a_file_is_served_as_it_was_opened(path: Path, how: str) -> None:
    """What takes its name is another file, which nobody asked to have served."""
    data, other = path.read_bytes(), path.with_name("other")
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    asker = client(link if how == "linked elsewhere" else path)
    tag = ask(asker, 0, 8).headers["etag"]
    other.write_bytes(bytes(len(data)))
    if how == "replaced":
        other.replace(path)
    elif how == "linked elsewhere":
        link.unlink()
        link.symlink_to(other)
    else:
        path.rename(path.with_name("elsewhere"))
        if how == "a directory":
            path.mkdir()
    for asked in ({}, {"if_range": tag}):
        got = ask(asker, 0, len(data), **asked)
        assert got.status_code == 206 and got.content == data
    assert asker.get("").status_code == 200


def test_a_file_that_is_exchanged_while_it_is_opened_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, real = path.with_name("other"), os.open
    other.write_bytes(path.read_bytes())

    def swapping(name: Any, *given: Any, **more: Any) -> int:
        made = real(name, *given, **more)
        if name == str(path):
            other.replace(path)
        return made

    monkeypatch.setattr("os.open", swapping)
    with pytest.raises(TraceFileError, match="was exchanged while it was opened"):
        application(str(path), token=TOKEN)


def test_a_file_that_is_cut_short_while_it_is_read_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker, size, real = client(path), path.stat().st_size, os.pread

    def cutting(descriptor: int, count: int, at: int) -> bytes:
        os.truncate(path, size - 4)
        return real(descriptor, count, at)

    monkeypatch.setattr("os.pread", cutting)
    assert ask(asker, size - 8, size).status_code == 412


def test_a_file_that_cannot_be_read_any_more_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = client(path)

    def failing(*given: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pread", failing)
    answer = ask(asker, 0, 8)
    assert answer.status_code == 410 and "cannot be read any more: Input/output error" in answer.text


def test_the_page_and_its_parts(path: Path) -> None:
    asker = client(path, options=viewer_options(state={"layer": 1}, theme="dark"))
    page = asker.get("")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert re.search(r'import\("\./hookattn-viewer\.js"\)', page.text)
    assert "<title>InductionTransformer · Lauf é.safetensors</title>" in page.text
    module = asker.get("hookattn-viewer.js")
    assert module.headers["content-type"].startswith("text/javascript")
    assert module.content == (ROOT / "hookattn/render/viewer/hookattn-viewer.js").read_bytes()
    assert asker.get("options").json() == {"theme": "dark", "state": {"layer": 1}, "compare": False}
    assert asker.get("compare").status_code == 404
    two = client(path, compare=str(path))
    assert two.get("options").json()["compare"] is True and two.get("compare").content == path.read_bytes()


def test_what_is_no_trace_is_refused_at_once(path: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="cannot open"):
        application(str(tmp_path / "none"), token=TOKEN)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError):
        application(str(path), token=TOKEN)


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RenderError, match=rf"port {port}: Address already in use\. Choose another"):
            listen(port)
    with listen(port) as free:
        assert free.getsockname()[1] == port
    with listen() as one, listen() as two:
        assert two.getsockname()[1] > one.getsockname()[1] >= 8765


def test_a_trace_is_served_from_its_own_file_only_while_that_holds_it(path: Path) -> None:
    loaded = hookattn.load(path)
    with trace_file(loaded) as own:
        assert own == str(path)
    with trace_file(path) as own:
        assert own == str(path)
    renamed = hookattn.load(path)
    renamed.tokens = [["other"] * 8]
    for changed in (loaded[:1], renamed, hookattn.trace(load_pretrained(), example_tokens(0, length=8))):
        with trace_file(changed) as other:
            assert other != str(path) and hookattn.load(other).tokens == changed.tokens
            assert len(hookattn.load(other)) == len(changed)
        assert not Path(other).exists()


def ten_gigabytes(like: Path) -> Path:
    """12 layers of 12 heads at 4,096 tokens, all of it a hole: the disk holds the header alone."""
    raw = like.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    document = json.loads(header["__metadata__"]["hookattn"])
    call, shape = document["calls"][0] | {"derivable": []}, [1, 12, 4096, 4096]
    size, names = 4 * 12 * 4096**2, [f"calls/{i:04d}/blocks.{i}/weights" for i in range(12)]
    document["tokens"] = None
    document["calls"] = [
        call | {"fields": {"weights": name}, "site": call["site"] | {"layer": i, "path": f"blocks.{i}"}}
        for i, name in enumerate(names)
    ]
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"format": "pt", "hookattn": json.dumps(document)}, **entries}).encode()
    big = like.with_name("big.safetensors")
    with big.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 12 * size)
    assert big.stat().st_size > 9.6e9 and big.stat().st_blocks * 512 < 1 << 20
    return big


def test_ten_gigabytes_open_at_once(path: Path) -> None:
    """``hookattn view`` as a process of its own, which answers from the end of the file and has read none of it."""
    code = "from hookattn.cli import main; import sys; main(sys.argv[1:])"
    big = ten_gigabytes(path)
    options = ["view", str(big), "--no-open", "--json", "--port", "0"]
    command = [sys.executable, "-c", code, *options]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            said = "".join(iter(process.stdout.readline, "}\n")) + "}"
            url = json.loads(said)["url"]
            size = big.stat().st_size
            request = urllib.request.Request(f"{url}trace", headers={"Range": f"bytes={size - 4}-{size - 1}"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.status == 206 and answer.read() == bytes(4)
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            assert peak is not None and int(peak[1]) < 2 << 20, "no ten gigabytes were read"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_the_command_writes_a_page(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    runner = CliRunner()
    done = runner.invoke(command_line, ["view", str(path), str(path), "--html", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"html": str(out), "bytes": out.stat().st_size}
    assert 'id="compare"' in out.read_text("utf-8")
    pytest.importorskip("pandas")
    done = runner.invoke(command_line, ["view", str(path), "--html", str(out), "--scores"])
    assert done.exit_code == 0 and '"induction":{"unit"' in out.read_text("utf-8")
    (tmp_path / "a.png").write_bytes(b"png")
    pictures = ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "a.png"), "--grid", "2", "3"]
    done = runner.invoke(command_line, ["view", str(path), "--html", str(out), *pictures])
    assert done.exit_code == 0, done.output
    assert (
        '"images":{"urls":["data:image/png;base64,cG5n","data:image/png;base64,cG5n"],"grid":[2,3]}' in out.read_text()
    )
    done = runner.invoke(command_line, ["view", str(path), "--html", str(out), "--grid", "2", "3"])
    assert done.exit_code == 2 and "give that with --image" in done.output
    done = runner.invoke(command_line, ["view", str(path), "--html", str(out), "--port", "1"])
    assert done.exit_code == 2 and "leave them out with --html" in done.output
    done = runner.invoke(command_line, ["view", str(tmp_path / "none")])
    assert done.exit_code == 1 and "error:" in done.output and "cannot open" in done.output


def test_the_command_says_which_port_is_taken(path: Path) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(command_line, ["view", str(path), "--no-open", "--port", str(port)])
    assert done.exit_code == 1 and f"port {port}: Address already in use" in done.output
