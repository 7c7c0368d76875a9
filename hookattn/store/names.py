"""The names of a trace's tensors: one for each call and field, and one for what calls have in common."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from typing import Any

from torch import Tensor

from ..attention.kernel_call import FIELD_SPECS
from ..calls.call import Call
from ..torch_internals.tensor_identity import version_of
from .rawbytes import byte_blocks

# Fields that many calls have in common: stored once for each distinct content.
_SHARED = frozenset(name for name, spec in FIELD_SPECS.items() if spec.shared)


class Names:
    """Gives every tensor of a trace its name, and the same name to the same content."""

    def __init__(self) -> None:
        self._by_content: dict[tuple[Any, ...], str] = {}
        self._by_identity: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._counts: Counter[str] = Counter()

    def name(self, call: Call, field: str, x: Tensor) -> tuple[str, bool]:
        """The name of a field, and whether it still has to be written."""
        if field not in _SHARED:
            return f"calls/{call.index:04d}/{call.site.path or 'model'}/{field}", True
        version = version_of(x)
        ref, then, name = self._by_identity.get(id(x), (None, -1, ""))
        if ref is not None and ref() is x and then == version:
            return name, False
        digest = hashlib.blake2b(digest_size=16)
        for block in byte_blocks(x):
            digest.update(block)
        content = (field, x.dtype, tuple(x.shape), digest.digest())
        known = self._by_content.get(content)
        name = known or f"shared/{field}/{self._counts[field]:03d}"
        self._counts[field] += known is None
        self._by_content[content] = name
        self._by_identity[id(x)] = (weakref.ref(x), version, name)
        return name, known is None
