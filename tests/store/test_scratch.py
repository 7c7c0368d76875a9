"""Temporary directories, and those of processes that are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hookattn.store.scratch import remove_left_directories, scratch

_HOLDS = """
import sys, time
from hookattn.store.scratch import scratch
with scratch() as folder:
    open(folder + "/trace.safetensors", "w").write("secret")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process that has such a directory."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_for_its_user_alone_and_gone_after_the_block(root: Path) -> None:
    with scratch() as folder:
        assert os.stat(folder).st_mode & 0o777 == 0o700 and Path(folder).parent == root
        Path(folder, "x").write_text("x")
    assert not list(root.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next(root: Path) -> None:
    process, left = holder()
    assert (left / "trace.safetensors").exists()
    with scratch():  # of a live process nothing is
        assert left.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.exists()
    with scratch() as mine:
        assert not left.exists() and Path(mine).exists()
    assert not list(root.iterdir())


def test_what_only_looks_like_it_is_left_alone(root: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    gone = process.pid
    kept = [root / name for name in (f"hookattn-{gone}", f"hookattn-{gone}-a-b", f"other-{gone}-abc", "hookattn-x-abc")]
    for path in kept:
        path.mkdir()
    target = root / "target"
    target.mkdir()
    (target / "file").write_text("precious")
    link, file = root / f"hookattn-{gone}-link", root / f"hookattn-{gone}-file"
    link.symlink_to(target)
    file.write_text("a file")
    empty = root / f"hookattn-{gone}-empty"
    empty.mkdir()
    unlocked = root / f"hookattn-{gone}-full"
    unlocked.mkdir()
    (unlocked / "theirs").write_text("without a lock it is none of ours")
    remove_left_directories()
    assert all(path.exists() for path in (*kept, target / "file", link, file, unlocked / "theirs"))
    assert not empty.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_process_that_is_not_seen_from_here_keeps_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one in another container that shares the directory."""
    process, left = holder()
    monkeypatch.setattr("hookattn.store.scratch.lives", lambda _: False)
    remove_left_directories()
    assert (left / "trace.safetensors").exists()
    process.kill()
    process.wait()
    for _ in range(50):
        remove_left_directories()
        if not left.exists():
            break
        time.sleep(0.1)
    assert not left.exists()
