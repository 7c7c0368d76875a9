"""An exception at any moment of a trace: at each line of this library that it runs, and by a signal at random.

A line is hit by a trace function of Python (``sys.settrace``) that raises, a moment by a timer whose handler does. Both
stop after the one exception. Afterwards nothing may be left, and the next trace has to be right.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import hookattn

from . import Figure
from .scenes import Scene, left, scenes

_PACKAGE = str(Path(hookattn.__file__).parent)


class Broken(BaseException):
    """What a signal handler of the user's own raises."""


KINDS: tuple[type[BaseException], ...] = (
    KeyboardInterrupt,
    MemoryError,
    SystemExit,
    torch.OutOfMemoryError,
    GeneratorExit,
    Broken,
)


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    """Half of the rounds by lines, half by signals."""
    draw = random.Random(seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(made)
        given = scenes(folder)
        lines = [(scene, place) for scene in given for place in places(scene)]
        chosen = lines if rounds >= 2000 else draw.sample(lines, min(len(lines), rounds // 2))
        by_line = [
            (f"{s.name}, {place[0]}:{place[1]}", at_line(s, place, draw.choice(KINDS), folder)) for s, place in chosen
        ]
        by_signal = [
            (s.name, at_moment(s, draw, folder)) for s in (draw.choice(given) for _ in range(rounds - rounds // 2))
        ]
    return [
        Figure("lines of set-up, take-down and recording that were hit", len(by_line)),
        _figure("left states or wrong traces after them", by_line, 0),
        Figure("signals at random moments", len(by_signal)),
        _figure("left states or wrong traces after them", by_signal, 0),
    ]


def _figure(what: str, found: Sequence[tuple[str, str]], bar: int) -> Figure:
    bad = [f"{where}: {why}" for where, why in found if why]
    return Figure(what, len(bad), bar, tuple(bad[:8]))


Place = tuple[str, int, int]
"""A file of the library, a line in it, and which time of a trace it is run: the first or the last."""


def places(scene: Scene) -> list[Place]:
    """Every line of this library that a trace of the scene runs, with its first and its last time."""
    counts: dict[tuple[str, int], int] = {}

    def note(file: str, line: int) -> None:
        counts[file, line] = counts.get((file, line), 0) + 1

    with watched(note):
        scene.run()
    return [(file, line, n) for (file, line), last in counts.items() for n in sorted({1, last})]


@contextmanager
def watched(tell: Any) -> Iterator[None]:
    """Tell the file and line of each line of this library that is about to run."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            tell(frame.f_code.co_filename[len(_PACKAGE) + 1 :], frame.f_lineno)
        return local

    def outside(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(_PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(outside)
    try:
        yield
    finally:
        sys.settrace(before)


def at_line(scene: Scene, place: Place, kind: type[BaseException], folder: Path) -> str:
    """What is wrong after an exception at a line; empty: nothing."""
    seen = 0

    def hit(file: str, line: int) -> None:
        nonlocal seen
        if (file, line) == place[:2]:
            seen += 1
            if seen == place[2]:
                sys.settrace(None)
                raise kind

    try:
        with watched(hit):
            scene.run()
    except KINDS:
        pass
    except hookattn.HookattnError as error:
        if not issubclass(kind, (MemoryError, torch.OutOfMemoryError)):
            return f"{kind.__name__} became {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - it is what the figure is about
        return f"{kind.__name__} became {type(error).__name__}: {error}"
    return after(scene, folder, kind.__name__)


def at_moment(scene: Scene, draw: random.Random, folder: Path) -> str:
    """What is wrong after a signal at a random moment of a trace."""
    kind = draw.choice((KeyboardInterrupt, Broken))

    def hit(*_: Any) -> None:
        raise kind

    before = signal.signal(signal.SIGALRM, hit)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 8e-3))
            for _ in range(20):
                scene.run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (KeyboardInterrupt, Broken):
        pass
    finally:
        signal.signal(signal.SIGALRM, before)
    return after(scene, folder, kind.__name__)


def after(scene: Scene, folder: Path, kind: str) -> str:
    """What is left, or is wrong with the next trace."""
    wrong = left(scene.model, folder, settled=False)
    if wrong:
        heal(scene, folder)
        return f"{kind}: {'; '.join(wrong)}"
    try:
        again = scene.run()
    except Exception as error:  # noqa: BLE001 - it is what the figure is about
        heal(scene, folder)
        return f"{kind}: the next trace raises {type(error).__name__}: {error}"
    if not scene.is_right(again):
        return f"{kind}: the next trace is wrong: {again.skipped or [c.certificate.status for c in again.calls]}"
    return "; ".join(left(scene.model, folder))


def heal(scene: Scene, folder: Path) -> None:
    """Take away by force what is left, so that what comes next is judged by itself."""
    from hookattn.recording import live
    from hookattn.taps import active
    from hookattn.torch_internals import code_patching, function_modes, undo

    torch.set_grad_enabled(True)
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    undo._open.changes.clear()
    live._live.clear()
    for path in folder.glob(".*"):
        path.unlink()
    while function_modes.depth():
        function_modes._pop()
    active.set_current(None)
    for exchange in code_patching._known.values():
        if exchange.users:
            exchange.remove()
            exchange.users, exchange.installed = frozenset(), False
    for module in scene.model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._forward_hooks_always_called.clear()
    torch.nn.modules.module._global_forward_pre_hooks.clear()
