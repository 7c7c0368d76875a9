"""All cases in worker processes: one that kills or stalls its worker costs its own row alone."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Case = tuple[str, str]
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """One subprocess that takes cases on its standard input and answers with rows.

    Args:
        options: of :mod:`.worker`.
    """

    def __init__(self, *options: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sweep.worker", *options],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.answers.get(timeout=180)  # it says that it has imported everything

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def run(self, case: Case, timeout: float) -> dict[str, Any]:
        """The row of one case; a crash or a timeout becomes the row."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        try:
            answer = self.answers.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            return failed(case, f"timeout: took more than {timeout:.0f} s")
        if not answer:
            return failed(case, f"crash: the worker ended with {self.process.wait()}")
        return dict(json.loads(answer))

    def alive(self) -> bool:
        """Whether it can take another case."""
        return self.process.poll() is None

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def failed(case: Case, why: str) -> dict[str, Any]:
    """The row of a case that gave none."""
    return {"model_type": case[0], "implementation": case[1], "status": "red", "problems": [why]}


def run_all(
    cases: Iterable[Case], jobs: int, timeout: float, done: Callable[[dict[str, Any]], None], *options: str
) -> None:
    """Run cases in ``jobs`` workers; ``done`` gets each row as it comes, in one thread at a time."""
    waiting: queue.Queue[Case] = queue.Queue()
    for case in cases:
        waiting.put(case)
    lock = threading.Lock()

    def serve() -> None:
        worker = None
        while True:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                break
            if worker is None or not worker.alive():
                worker = Worker(*options)
            row = worker.run(case, timeout)
            if not worker.alive():  # once more: a machine that stood still is not the case's fault
                worker = Worker(*options)
                row = worker.run(case, timeout)
            with lock:
                done(row)
        if worker is not None:
            worker.stop()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
