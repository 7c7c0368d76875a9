"""What a tap is, and what it reports to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..record import KernelCall


class Recorder(Protocol):
    """Gets the attention calls that the taps see (the running trace)."""

    def record(self, call: KernelCall) -> None:
        """Take one call."""

    def skip(self, reason: str, path: str | None = None) -> None:
        """Attention ran that cannot be read; ``path`` None: the module that is running now."""

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""

    def where(self) -> str | None:
        """The path of the module that is running now; None outside the model."""

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """:func:`hookattn.attention.split_additive`, once for a tensor that many layers share."""


class Patch(NamedTuple):
    """A Python function whose body is exchanged while a trace runs anywhere in the process.

    ``body`` has the original's signature and is given the original as its first argument; it must behave like the
    original in threads that trace nothing (:func:`current` is None there).
    """

    owner: Any
    name: str
    body: Callable[..., Any]


@dataclass(frozen=True)
class Tap:
    """One attention kernel.

    Attributes:
        name: as it appears in ``call.tap``.
        kernels: torch function name -> handler ``(watch, func, args, kwargs) -> result``, called inside the mode.
        patches: the functions that don't dispatch to function modes; made only when a trace starts, since some live
            in optional packages that may be imported later.
        covers: of some modules, by identity, those in which this tap alone sees every attention call, so that the mode
            can stay closed in them.
    """

    name: str
    kernels: dict[str, Callable[..., Any]] | None = None
    patches: Callable[[], Iterable[Patch]] | None = None
    covers: Callable[[Iterable[Any]], set[int]] | None = None
