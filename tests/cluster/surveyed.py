"""What the processes of a cluster build and measure. A survey names it as ``module:function``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookattn.analyze.survey import Batch
from hookattn.demo.induction import load_pretrained

DEADLY, BAD = 101, 102
"""Token ids: one whose measuring kills its process, and one that the model's encoder does not take."""


def encode(values: Sequence[Any]) -> Iterator[Batch]:
    for ids in values:
        if DEADLY in ids:
            os.kill(os.getpid(), signal.SIGKILL)
        if BAD in ids:
            raise ValueError(f"there is no token {BAD}")
        yield Batch(torch.tensor([ids]), 1)


def slowly(values: Sequence[Any]) -> Iterator[Batch]:
    time.sleep(0.15)
    return encode(values)


def induction() -> tuple[nn.Module, Any]:
    return load_pretrained(), encode


def slow() -> tuple[nn.Module, Any]:
    return load_pretrained(), slowly


def lost() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def refusing() -> Any:
    raise OSError("the weights are not here")


def examples(n: int, length: int = 12) -> list[list[int]]:
    drawn = torch.randint(1, 100, (n, length), generator=torch.Generator().manual_seed(n))
    return [row[: 5 + i % (length - 4)].tolist() for i, row in enumerate(drawn)]


def ray_processes() -> dict[int, str]:
    """The workers of the Ray that this process started, and what they are at, as they call themselves."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if entry.name.isdigit() and title.startswith("ray::") and os.getpid() in _ancestors(int(entry.name)):
                found[int(entry.name)] = title
        except OSError:
            continue
    return found


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        # The name, in brackets, may have anything in it.
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid
