"""fork() beside a thread that traces, and inside a block that is traced to a file."""

from __future__ import annotations

import faulthandler
import os
import select
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import hookattn

from . import Figure
from .scenes import IDS, Scene, left, scenes

_SECONDS = 30.0
"""A child that has not answered by then hangs."""


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    torch.set_num_threads(1)  # a fork takes no thread of torch's own with it
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(made)
        given = [scene for scene in scenes(folder) if scene.name in ("fused, trace", "plain, trace", "fused, to")]
        answers = beside(given, rounds, folder)
        inside = [in_block(given[0], folder, n) for n in range(max(2, rounds // 20))]
    unclean = [a for a in answers if a not in ("", "hung")]
    harmed = [a for a in inside if a]
    return [
        Figure("children beside a tracing thread", len(answers)),
        Figure("of these unclean", len(unclean), 0, tuple(unclean[:8])),
        Figure("of these hung", answers.count("hung"), 0),
        Figure("children that left a block traced to a file", len(inside)),
        Figure("of these that harmed the parent's file", len(harmed), 0, tuple(harmed[:4])),
    ]


def beside(given: Sequence[Scene], rounds: int, folder: Path) -> list[str]:
    """What each child says is wrong with it."""
    stop = threading.Event()
    failed: list[str] = []

    def loop(scene: Scene) -> None:
        while not stop.is_set():
            if not scene.is_right(scene.run()):
                failed.append(f"the parent's own trace is wrong: {scene.name}")

    threads = [threading.Thread(target=loop, args=(scene,), daemon=True) for scene in given]
    for thread in threads:
        thread.start()
    mine = scenes(folder)[0]

    def child() -> str:
        wrong = left_of_process(given, mine)
        if not wrong and not mine.is_right(mine.run()):
            wrong = ["its trace is wrong"]
        if not wrong and not given[1].is_right(given[1].run()):
            wrong = ["its trace of a model that the parent traces is wrong"]
        return "; ".join(wrong or left_of_process(given, mine))

    try:
        return [asked(child) for _ in range(rounds)] + failed
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def left_of_process(given: Sequence[Scene], mine: Scene) -> list[str]:
    """What is left on any of the models; the parent's files are its own."""
    with tempfile.TemporaryDirectory() as empty:
        return [f"{scene.name}: {what}" for scene in (mine, *given) for what in left(scene.model, Path(empty))]


def in_block(scene: Scene, folder: Path, number: int) -> str:
    """A child leaves a block that is traced to a file, by its end or by an exception; the parent goes on."""
    path, pid, published = folder / f"block{number}.safetensors", -1, False
    try:
        with hookattn.tracing(scene.model, to=path):
            scene.model(IDS)
            pid = os.fork()
            if pid == 0 and number % 2:
                raise KeyboardInterrupt
            if pid:
                os.waitpid(pid, 0)
                published = path.exists()
                scene.model(IDS)
    finally:
        if pid == 0:
            os._exit(0)
    if published:
        return "a child has published the parent's file"
    stored = hookattn.load(path)
    if len(stored.calls) != 2 * len(scene.right):
        return f"the parent's file has {len(stored.calls)} calls"
    return "" if all(map(torch.equal, [c.weights for c in stored.calls], scene.right * 2)) else "wrong weights"


def asked(what: Callable[[], str]) -> str:
    """What a forked child answers."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(_SECONDS / 2)  # where it hangs
        try:
            said = what()
        except BaseException as error:  # noqa: BLE001 - the answer
            said = f"{type(error).__name__}: {error}"
        os.write(writes, said.encode()[:2000] or b"clean")
        os._exit(0)
    os.close(writes)
    ready = select.select([reads], [], [], _SECONDS)[0]
    answer = os.read(reads, 4000).decode() if ready else "hung"
    os.close(reads)
    if not ready:
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "" if answer == "clean" else answer
