"""What goes through the model together: examples, and what encoded them made of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ... import checks
from ...calls.token_lists import token_lists
from ...errors import InputError
from ..call_view import as_real

Value = str | list[int]
"""An example: a text, or token ids."""


@dataclass
class Batch:
    """Examples that go through the model together.

    Attributes:
        inputs: as :func:`hookattn.trace` takes them.
        count: how many examples these are, B.
        tokens: one list of strings for each, where there are any.
        real: B S, an ``attention_mask``; None: there is no padding.

    Raises:
        InputError, MeasureError: one of these is something else.
    """

    inputs: Any
    count: int
    tokens: list[list[str]] | None = None
    real: Tensor | None = None

    def __post_init__(self) -> None:
        self.count = checks.whole("Batch: count", self.count, 1, error=InputError)
        if self.tokens is not None:
            self.tokens = token_lists(self.tokens)
        self.real = as_real(self.real)


Encode = Callable[[Sequence[Value]], Iterable[Batch]]
