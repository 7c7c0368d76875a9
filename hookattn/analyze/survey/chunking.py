"""Chunks of a corpus: the examples that are encoded together, and which of them a process measures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ... import checks
from ...errors import InputError, SelectionError
from .batches import Value
from .blocks import Block


@dataclass(frozen=True)
class CorpusShard:
    """One of several equal shares of a corpus: the chunks whose number leaves ``index`` when divided by ``of``.

    Not to be confused with :class:`hookattn.Shard`, the part of an attention that one rank computes.

    Attributes:
        index: which one, from 0.
        of: how many there are.

    Raises:
        SelectionError: there is no such shard.
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", checks.whole("CorpusShard: of", self.of, 1))
        object.__setattr__(self, "index", checks.whole("CorpusShard: index", self.index, 0))
        if self.index >= self.of:
            raise checks.wrong("CorpusShard: index", self.index, f"one of 0 to {self.of - 1}", SelectionError)

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def has(self, number: int) -> bool:
        """Whether a chunk is this shard's."""
        return number % self.of == self.index

    def size(self, examples: int, batch: int) -> int:
        """How many of so many examples are its own."""
        chunks = -(-examples // batch)
        own = len(range(self.index, chunks, self.of)) * batch
        return own - (chunks * batch - examples if chunks and self.has(chunks - 1) else 0)


WHOLE = CorpusShard(0, 1)


def as_shard(given: Any) -> CorpusShard:
    """A shard, or its text ``3/64``; None: all of the corpus.

    Raises:
        InputError, SelectionError: it is something else.
    """
    if given is None:
        return WHOLE
    if isinstance(given, CorpusShard):
        return given
    found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", given) if isinstance(given, str) else None
    if found is None:
        raise checks.wrong("shard", given, "a CorpusShard, or its text such as '3/64' (0/64 is the first of 64)")
    return CorpusShard(int(found[1]), int(found[2]))


class Chunk(NamedTuple):
    """Examples that are encoded together.

    Attributes:
        number: from 0.
        first: the number of its first example.
        values: the examples; an error stands for one that could not be read. Empty where nobody wanted them.
        size: how many there are.
    """

    number: int
    first: int
    values: list[Value | InputError]
    size: int


def chunks(examples: Iterable[Any], batch: int, wanted: Callable[[int], bool] | None = None) -> Iterator[Chunk]:
    """All chunks, in order.

    Args:
        examples: a :class:`Corpus`, of which only wanted examples are decoded; or any iterable.
        batch: how many examples are a chunk.
        wanted: of the number of a chunk, whether its values are; None: all are.

    Raises:
        InputError: an argument is something else; a file cannot be read at all.
    """
    batch, examples = checks.whole("batch", batch, 1), as_examples(examples)
    if wanted is not None:
        checks.function("wanted", wanted, "a function of the number of a chunk")
    number, first, size = 0, 0, 0
    values: list[Value | InputError] = []
    blocks = getattr(examples, "blocks", None)
    for block in _blocks(examples, batch) if blocks is None else blocks():
        at = 0
        while at < block.size:
            more = min(batch - size, block.size - at)
            if wanted is None or _is_wanted(wanted, number):
                values += block.values(at, at + more)
            at, size = at + more, size + more
            if size == batch:
                yield Chunk(number, first, values, size)
                number, first, size, values = number + 1, first + size, 0, []
    if size:
        yield Chunk(number, first, values, size)


def _blocks(examples: Iterable[Any], batch: int) -> Iterator[Block]:
    source = iter(examples)
    while values := list(itertools.islice(source, batch)):
        yield Block(len(values), lambda start, stop, values=values: values[start:stop])  # type: ignore[misc]


def _is_wanted(wanted: Callable[[int], bool], number: int) -> bool:
    try:
        return wanted(number)
    except Exception as error:
        raise InputError(f"wanted does not take the number of a chunk, {number}: {error}") from error


def as_examples(given: Any) -> Any:
    """What can be gone through, and is not one text.

    Raises:
        InputError: it is something else.
    """
    if callable(getattr(given, "blocks", None)):
        return given  # a Corpus
    if not isinstance(given, (str, bytes)):
        try:
            return iter(given)
        except Exception:  # noqa: BLE001 - said below
            pass
    raise checks.wrong("examples", given, "examples, one after the other, and not one text")
