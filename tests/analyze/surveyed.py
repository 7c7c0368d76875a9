"""What the tests of surveys share: a model that processes can build, examples, and tables compared to the last bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import nn

from hookattn.analyze.survey import Batch
from hookattn.demo.induction import load_pretrained

MODEL = "hookattn.demo.induction:load_pretrained"
CONTEXT = 64  # more tokens than that it does not take


def one_by_one(values: Any) -> Iterator[Batch]:
    """Each example by itself."""
    for ids in values:
        yield Batch(torch.tensor([ids]), 1)


def alike(values: Any) -> Iterator[Batch]:
    """Examples of one length, together."""
    yield Batch(torch.tensor(values), len(values))


def build() -> tuple[nn.Module, Any]:
    """As a Measurer takes it."""
    return load_pretrained(), one_by_one


def build_with_a_warning() -> tuple[nn.Module, Any]:
    """The same, of a library that warns."""
    warnings.warn("of another library", DeprecationWarning, stacklevel=1)
    warnings.warn("of another library", UserWarning, stacklevel=1)
    return build()


def examples(n: int, length: int = 8) -> list[list[int]]:
    """Drawn ones, all of one length."""
    drawn: list[list[int]] = torch.randint(1, 128, (n, length), generator=torch.Generator().manual_seed(n)).tolist()
    return drawn


def written(folder: Path, values: Sequence[Any], name: str = "ids.jsonl") -> Path:
    """A corpus of them."""
    path = folder / name
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def same_table(a: Path, b: Path) -> None:
    """Two tables that nothing tells apart."""
    x, y = pq.read_table(a), pq.read_table(b)
    assert x.schema.equals(y.schema, check_metadata=True), (x.schema, y.schema)
    assert x.equals(y)
    assert a.read_bytes() == b.read_bytes()
