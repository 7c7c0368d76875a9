"""Tests run in a fork of a process that has loaded everything but hookattn, with a mutant in place of its module.

A mutant is a file in a folder of its own, for some modules are read again from their file: by Triton, and by
tracebacks. No file of the working tree is written, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from . import ROOT

LOADED = "torch numpy scipy pandas einops safetensors.torch hypothesis pytest transformers xdist".split()
"""What tests import that isn't ours and takes long."""

MEMORY = 8 << 30
"""Bytes of data that a run may have: a mutant may allocate without end."""


def load() -> None:
    """Import what all runs need. Threads don't live through a fork, so nothing is computed here."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GENERATOR_SEED", "20260101000")  # the cases of the day would differ from run to run
    for name in LOADED:
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    if any(name.split(".")[0] in ("hookattn", "hookattn_adapters") for name in sys.modules):
        raise RuntimeError("hookattn was imported before its mutants could be")


class InPlace(importlib.abc.MetaPathFinder):
    """Finds the mutant where its module is asked for."""

    def __init__(self, name: str, file: Path, package: Path | None) -> None:
        self.name, self.file, self.package = name, file, package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        folders = None if self.package is None else [str(self.package)]
        return importlib.util.spec_from_file_location(fullname, self.file, submodule_search_locations=folders)


def put_in_place(path: str, source: str, folder: Path) -> None:
    """Have imports of a module, named by its path from the root, meet a source."""
    parts = Path(path).with_suffix("").parts
    package = (ROOT / path).parent if parts[-1] == "__init__" else None
    file = folder / Path(path).name
    file.write_text(source)
    sys.meta_path.insert(0, InPlace(".".join(parts[:-1] if package else parts), file, package))


class Chosen:
    """A plugin of pytest: runs only some tests, in an order, and keeps what became of each."""

    def __init__(self, order: Sequence[str] | None) -> None:
        self.rank = None if order is None else {name: i for i, name in enumerate(order)}
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        if self.rank is None:
            return
        known = [item for item in items if item.nodeid in self.rank]
        items[:] = sorted(known, key=lambda item: self.rank[item.nodeid])  # type: ignore[index]

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        self.failed[node.nodeid] = call.excinfo.typename

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.setdefault(report.nodeid, "?")


def _run(names: Sequence[str], chosen: Chosen, more: Sequence[object]) -> int:
    import pytest

    os.chdir(ROOT)
    # Long failures are shown by nobody, and a mutant that builds a huge value would have it printed.
    options = "-q -x --tb=no -W ignore -p no:cacheprovider -p no:xdist --hypothesis-seed=0".split()
    if not chosen.rank:
        options.remove("-x")
    marks = ["-m", "not slow and not gpu and not browser and not notebook"]
    return int(pytest.main([*options, *marks, *names], plugins=[chosen, *more]))


def in_fork(work: Callable[[Path], Any], limit: float) -> Any:
    """What `work` returns in a process of its own, or None where it takes longer than a limit or the process dies.

    Args:
        work: is given a folder that is removed afterwards.
        limit: seconds.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.setsid()  # what it starts is ended with it
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
                said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY)
                for stream in (1, 2):
                    os.dup2(said, stream)
                done = work(folder)
                (folder / "done").write_text(json.dumps(done))
                code = 0
            finally:
                os._exit(code)
        ends, state = time.monotonic() + limit, 0
        try:
            while not state:
                state, _ = os.waitpid(child, os.WNOHANG)
                if not state:
                    if time.monotonic() > ends:
                        return None
                    time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            if not state:
                os.waitpid(child, 0)
        done = folder / "done"
        return json.loads(done.read_text()) if done.exists() else {"died": (folder / "said").read_text()[-2000:]}


def run_tests(
    names: Sequence[str],
    order: Sequence[str] | None = None,
    mutant: tuple[str, str] | None = None,
    limit: float = 600.0,
    around: Callable[[], tuple[Sequence[object], Callable[[], Any]]] | None = None,
) -> dict[str, Any] | None:
    """Run test files in a fork.

    Args:
        names: of the files.
        order: the tests to run of them, which stop at the first that fails; None: all, to the end.
        mutant: path and source of a module put in place of the one there is.
        limit: seconds.
        around: called first; returns more plugins, and what to call last, whose result is `"more"`.

    Returns:
        `code` of pytest, `seconds` by test, `failed`: the exception by test, `more`; `died` and the end of what it said
        where the process ended otherwise; None where it was out of time.
    """

    def work(folder: Path) -> dict[str, Any]:
        if mutant is not None:
            put_in_place(*mutant, folder)
        plugins, last = around() if around else ((), lambda: None)
        chosen = Chosen(order)
        code = _run(names, chosen, plugins)
        return {"code": code, "seconds": chosen.seconds, "failed": chosen.failed, "more": last()}

    done: dict[str, Any] | None = in_fork(work, limit)
    return done
