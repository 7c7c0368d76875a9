"""The file layer when writing fails: what was there before stays, and nothing half written is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.errors import TraceFileError, TraceWriteError
from hookattn.store import LazyFile, StreamWriter, partial, write_file

X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_killed_while_writing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from hookattn.store import StreamWriter\n"
        "writer = StreamWriter(sys.argv[1]); writer.add('x', torch.ones(1000))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".f.") and left.endswith(".partial")
    write_file(tmp_path / "f", {"x": X}, {})  # what is left is in nobody's way
    assert torch.equal(LazyFile(tmp_path / "f").tensor("x"), X)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_the_file_alone(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "f") as writer:
        child = os.fork()
        if child == 0:
            writer.abort()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        writer.add("x", X)
        writer.finish({})
    assert torch.equal(LazyFile(tmp_path / "f").tensor("x"), X)


class Full(partial.FileIO):
    """A file on a disk with room for ``room`` bytes."""

    room = 0

    def write(self, data: Any) -> int:
        if self.tell() >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[: self.room - self.tell()])


@pytest.mark.parametrize("room", [0, 100, 1040, 1050, 4 << 20])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """While a tensor is written, and while the file is finished."""
    older = write_file(tmp_path / "f", {"x": X}, {}).read_bytes()
    monkeypatch.setattr(Full, "room", room)
    monkeypatch.setattr(partial, "FileIO", Full)
    with (
        pytest.raises(TraceWriteError, match=r"No space left.*Free some space") as caught,
        StreamWriter(tmp_path / "f", reserve=1024) as writer,
    ):
        writer.add("x", X)
        writer.add("y", torch.ones(1 << 20))
        writer.finish({"pad": "x" * 2000})
    assert "bytes needed" in str(caught.value) and " free)" in str(caught.value)
    with pytest.raises(TraceWriteError, match="aborted"):
        writer.add("z", X)
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == older


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_last_steps_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    older = write_file(tmp_path / "f", {"x": X}, {}).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(TraceWriteError, match="finish the file"):
            write_file(tmp_path / "f", {"y": X}, {})
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == older


LIMITED = """
import resource, sys, torch; from hookattn.store import write_file; import hookattn
from hookattn.errors import TraceFileError, TraceWriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_file(sys.argv[1], {"x": torch.ones(1_000_000)}, {})
except TraceWriteError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_real_limit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "4000000 bytes needed" in done.stdout and "ulimit -f" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_real_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        write_file(tmp_path / "f", {"x": X}, {})
        for write in (lambda x: write_file(tmp_path / "f", x, {}), lambda x: write_file(tmp_path / "g", x, {})):
            with pytest.raises(TraceWriteError, match=r"4000000 bytes needed, \d+ free"):
                write({"x": torch.ones(1_000_000)})
        assert os.listdir(tmp_path) == ["f"] and torch.equal(LazyFile(tmp_path / "f").tensor("x"), X)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = [
        (tmp_path / "none" / "f", "Create the directory"),
        (tmp_path / "file" / "f", "parent is a directory"),
        (tmp_path, "name of a file in it"),
        (tmp_path / ("x" * 300), "shorter name"),
        (Path(os.devnull), "could not create the file"),
    ]
    for path, message in places:
        with pytest.raises(TraceWriteError, match=message) as caught:
            StreamWriter(path)
        assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["file"] and not Path(os.devnull).is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(TraceWriteError, match="that you may write to"):
            StreamWriter(tmp_path / "f")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_is_being_streamed_says_so(tmp_path: Path) -> None:
    class Attend(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    target = tmp_path / ("long" * 15 + ".safetensors")
    with hookattn.tracing(model := Attend(), to=target) as trace:
        model(torch.randn(1, 2, 5, 4))
        for path in (target, *tmp_path.iterdir()):
            with pytest.raises(TraceFileError, match="still being written, and has its name and header"):
                hookattn.load(path)
        assert trace[0].q.shape == (1, 2, 5, 4)
    assert len(hookattn.load(target)) == 1
    with pytest.raises(TraceFileError, match="cannot open the file: No such file"):
        hookattn.load(tmp_path / "other.safetensors")
