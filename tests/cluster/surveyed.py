"""Models that the processes of a cluster build: what a survey names as ``module:function``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hookattn.analyze.survey import Batch
from hookattn.demo.induction import load_pretrained


def one_by_one(values: Sequence[Any]) -> Iterator[Batch]:
    for ids in values:
        yield Batch(torch.tensor([ids]), 1)


def induction() -> tuple[nn.Module, Any]:
    return load_pretrained(), one_by_one


def examples(n: int, length: int = 12) -> list[list[int]]:
    drawn = torch.randint(1, 128, (n, length), generator=torch.Generator().manual_seed(n))
    return [row[: 5 + i % (length - 4)].tolist() for i, row in enumerate(drawn)]
