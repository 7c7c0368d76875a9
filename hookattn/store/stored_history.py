"""The keys, or the values, of one site through the steps of a generation, in a trace file."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ..calls.derived_cache import DERIVED_CACHE
from ..calls.fields import File
from ..calls.key_history import KeyHistory, Link
from ..torch_internals.isolation import isolated
from .links import Chain

_ANY = torch.empty(0)


class _Joined(NamedTuple):
    """What was read of a history.

    Attributes:
        history: the steps that were read, in memory.
        rows: has as many bytes as these take and no memory, so that the cache can count them.
    """

    history: KeyHistory
    rows: Tensor


class StoredHistory(KeyHistory):
    """A history whose rows are in a file. Nothing is read before it is asked for; safe to use from several threads.

    What was read is joined once for all steps, and held as long as the cache of derived fields has room for it.

    Args:
        file: where the rows are.
        name: of the tensor of the first step, B G S D, none of them 0.

    Attributes:
        file: where the rows are.

    Raises:
        ValueError: the tensor has other axes.
    """

    def __init__(self, file: File, name: str):
        shape, self._dtype = file.shape(name), file.dtype(name)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{name!r} is {list(shape)}, expected four axes, none of them empty")
        self.file = file
        self._names: list[str | None] = [name]  # of the rows of each step
        self._links: list[Link | None] = [None]
        self._b, self._g, first, self._d = shape
        self._sizes, self._rows = [first], [first]  # keys of each step; rows of all steps up to it
        self._chain = Chain(self._b, first)
        self.made: dict[str, Any] = {}
        self._lock = threading.RLock()

    def add(self, batch: tuple[int, ...] | None, dropped: int, at: int, tensor: str | None) -> None:
        """One step more.

        Args:
            batch, dropped, at: as in a :class:`~hookattn.calls.key_history.Link`.
            tensor: the name of its own rows, B G n D; None: it has none.

        Raises:
            ValueError: these do not go on from the last step; says why.
        """
        count = 0
        if tensor is not None:
            shape, dtype = self.file.shape(tensor), self.file.dtype(tensor)
            if len(shape) != 4 or not shape[2] or (shape[0], shape[1], shape[3]) != (self._b, self._g, self._d):
                raise ValueError(f"{tensor!r} is {list(shape)}, expected {[self._b, self._g, 'n', self._d]}")
            if dtype != self.dtype:
                raise ValueError(f"{tensor!r} is {dtype}, and {self._names[0]!r} is {self.dtype}")
            count = shape[2]
        link = Link(batch, dropped, at, count)
        problem = self._chain.problem(link)
        if problem is not None:
            raise ValueError(problem)
        with self._lock:
            self._chain.add(link)
            self._links.append(link)
            self._names.append(tensor)
            self._sizes.append(self._chain.s)
            self._rows.append(self._rows[-1] + count)

    def __len__(self) -> int:
        return len(self._sizes)

    def link(self, step: int) -> Link | None:
        """See :meth:`KeyHistory.link`."""
        return self._links[step]

    def names(self, step: int) -> list[str]:
        """The tensors of the file that the keys of a step are read from."""
        return [name for name in self._names[: step + 1] if name is not None]

    def own(self, step: int) -> Tensor:
        """See :meth:`KeyHistory.own`; read anew each time."""
        name = self._names[step]
        if name is None:
            return torch.empty(self._b, self._g, 0, self._d, dtype=self.dtype)
        return self.file.tensor(name)

    def shape(self, step: int) -> Size:
        """See :meth:`KeyHistory.shape`; nothing is read for it."""
        return Size((self._b, self._g, self._sizes[step], self._d))

    @property
    def dtype(self) -> torch.dtype:
        """That of the keys; nothing is read for it."""
        return self._dtype

    def keys(self, step: int) -> Tensor:
        """See :meth:`KeyHistory.keys`; of what was not read yet, the rows up to this step are."""
        if step == 0:
            return self.own(0)
        with self._lock, isolated(_ANY):
            return self._joined(step).keys(step)

    def _joined(self, step: int) -> KeyHistory:
        """The history in memory, up to a step or further."""
        found: _Joined | None = self.made.get("joined")
        history = KeyHistory(self.own(0)) if found is None else found.history
        if found is None or len(history) <= step:
            for i in range(len(history), step + 1):
                link = self._links[i]
                assert link is not None
                history.extend(link, self.own(i))
            shape = self._b, self._g, self._rows[len(history) - 1], self._d
            found = _Joined(history, torch.empty(shape, dtype=self.dtype, device="meta"))
            self.made.pop("joined", None)  # it has grown, and is counted anew
        return DERIVED_CACHE.get(self, "joined", lambda: found).history

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_lock"} | {"made": {}}  # a pickle reads anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredHistory:
        # What is in the file does not change, and a file that is being written has no second one.
        return self
