"""Whatever model a test of a library traces is traced some times more, and followed beside what is recognised of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import hookattn
from tests.beside import trace_beside
from tests.field.common import run


@pytest.fixture(autouse=True)
def followed_beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test, so that it sees the models as they are without."""
    honest = hookattn.trace
    traced: dict[int, tuple[nn.Module, Any]] = {}

    def trace(model: nn.Module, inputs: Any, **options: Any) -> hookattn.Trace:
        traced.setdefault(id(model), (model, inputs))
        return honest(model, inputs, **options)

    monkeypatch.setattr(hookattn, "trace", trace)
    yield
    monkeypatch.setattr(hookattn, "trace", honest)
    for model, inputs in traced.values():
        try:
            run(model, copy.copy(inputs))
        except Exception:  # noqa: BLE001 - the test has changed it so that it takes other inputs now
            continue
        problem = trace_beside(model, lambda given=inputs: copy.copy(given)).problem
        assert not problem, f"{type(model).__name__}: {problem}"
