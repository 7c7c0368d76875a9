"""Whose requests the batch is that a model is run with: said by who runs it, read as its attention is recorded.

A server puts what several have asked for into one batch, and into another one with the next step. A kernel knows
entries of a batch and nothing of requests; :func:`requests_of_batch` says which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from .. import checks
from ..attention.kernel_call import KernelCall
from ..errors import InputError


@dataclass(frozen=True)
class Batch:
    """The batch that runs.

    Attributes:
        names: gives the request of each entry.
        only: the requests that are recorded; None: all.
    """

    names: Callable[[], tuple[str, ...]]
    only: frozenset[str] | None = None

    @property
    def requests(self) -> tuple[str, ...]:
        """For each batch entry the name of its request.

        Raises:
            InputError: who runs the model gave something else.
        """
        return self.names()

    @property
    def entries(self) -> tuple[int, ...] | None:
        """Which entries are recorded; None: all."""
        only = self.only
        return None if only is None else tuple(i for i, name in enumerate(self.requests) if name in only)

    def name(self, call: KernelCall) -> None:
        """Say of a call whose its batch entries are, where nobody has yet and it has one for each request."""
        if call.requests is None:
            requests = self.requests
            if len(requests) == call.shape[0]:
                call.requests = requests


_running: ContextVar[Batch | None] = ContextVar("hookattn_batch", default=None)


def running_batch() -> Batch | None:
    """The batch that runs in this context; None: nobody has said whose it is."""
    return _running.get()


@contextmanager
def requests_of_batch(
    ids: Sequence[str] | Callable[[], Sequence[str]], only: Collection[str] | None = None
) -> Iterator[None]:
    """Say whose the entries of the batch are that the model runs with in the block: ``call.requests`` has it.

    ::

        with hookattn.tracing(model) as trace:
            while running:
                with requests_of_batch([r.id for r in running]):
                    model(...)
        of = trace.split("request")

    Args:
        ids: the name of a request for each batch entry, in their order; or what gives these, called as attention runs,
            where the order is known only then. A call with another number of batch entries says no request.
        only: the names of the requests whose entries a tap may restrict itself to; None: all.

    Raises:
        InputError: these are no texts.
    """
    if callable(ids):
        ask = ids

        def names() -> tuple[str, ...]:
            return _names(ask())

    else:
        known = _names(ids)

        def names() -> tuple[str, ...]:
            return known

    restricted = None if only is None else frozenset(_names(only, "only"))
    before = _running.get()
    _running.set(Batch(names, restricted))
    try:
        yield
    finally:
        _running.set(before)


def _names(given: object, name: str = "ids") -> tuple[str, ...]:
    items = None if isinstance(given, str) else checks.items_of(given)
    if items is None or not all(isinstance(item, str) for item in items):
        expected = "the name of a request for each batch entry" if name == "ids" else "names of requests"
        raise checks.wrong(f"requests_of_batch: {name}", given, expected, InputError)
    return tuple(items)
