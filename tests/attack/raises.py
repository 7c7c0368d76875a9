"""A forward that raises in a module of its own, before it, in it or after it."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import Figure
from .interrupts import KINDS
from .scenes import Scene, left, scenes

_NOTE = "nothing is left on the model"


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    draw = random.Random(seed)
    torch.set_num_threads(1)
    bad = []
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(made)
        given = scenes(folder)
        for _ in range(rounds):
            scene = draw.choice(given)
            if why := broken(scene, draw, folder):
                bad.append(f"{scene.name}: {why}")
    return [
        Figure("forwards that raised in a random module", rounds),
        Figure("left states, wrong notes or wrong next traces", len(bad), 0, tuple(bad[:8])),
    ]


def broken(scene: Scene, draw: random.Random, folder: Path) -> str:
    """What is wrong after a forward that raises; empty: nothing."""
    name, module = draw.choice([x for x in scene.model.named_modules() if not isinstance(x[1], nn.ModuleList)])
    kind = draw.choice((*KINDS, ValueError))
    error = kind(f"raised in {name}")
    forward, when = module.forward, draw.choice(("before", "in", "after"))

    called = False

    def raises(*_: Any, **__: Any) -> Any:
        nonlocal called
        called = True
        raise error

    def ends(*args: Any, **kwargs: Any) -> Any:
        forward(*args, **kwargs)
        return raises()

    handle = module.register_forward_pre_hook(raises) if when == "before" else None
    if when != "before":
        module.forward = raises if when == "in" else ends
    caught: BaseException | None = None
    try:
        scene.run()
    except BaseException as got:  # noqa: BLE001 - it is held against what was raised
        caught = got
    finally:
        if handle is not None:
            handle.remove()
        vars(module).pop("forward", None)
    found = (
        _judged(error, caught) if called else ""
    )  # not all parts of a model are called: torch's fused layers are one
    caught = None
    if not found:
        found = "; ".join(left(scene.model, folder))
    if not found and not scene.is_right(scene.run()):
        found = "the next trace is wrong"
    return found and f"{kind.__name__} {when} {name}: {found}"


def _judged(error: BaseException, caught: BaseException | None) -> str:
    if caught is not error:
        return f"it became {caught!r}"
    if isinstance(error, Exception) and _NOTE not in "".join(getattr(error, "__notes__", ())):
        return f"it has no note: {getattr(error, '__notes__', None)}"
    return ""
