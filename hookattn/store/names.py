"""The names of a trace's tensors: one for each call and field, and one for what calls have in common."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from typing import Any

from torch import Tensor

from ..attention.kernel_call import FIELD_SPECS
from ..calls.fields import InFile, Place
from ..calls.mask_rule import MaskRule
from ..torch_internals.tensor_identity import version_of
from .rawbytes import byte_blocks

SHARED = frozenset(name for name, spec in FIELD_SPECS.items() if spec.shared)
"""The fields that many calls have in common: stored once for each distinct content."""


def own_name(number: int, path: str, field: str) -> str:
    """The name of a field of one call.

    Args:
        number: of the call, from 0.
        path: its site's.
        field: the field.
    """
    return f"calls/{number:04d}/{path or 'model'}/{field}"


class Names:
    """Gives the same name to the same content, of the fields that calls have in common."""

    def __init__(self) -> None:
        self._by_content: dict[tuple[Any, ...], str] = {}
        self._by_identity: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._by_place: dict[tuple[str, MaskRule | InFile], str] = {}
        self._counts: Counter[str] = Counter()

    def known(self, field: str, place: Place) -> str | None:
        """The name of a field that is where one is that was named before; nothing is read for it. None: it is not."""
        if isinstance(place, Tensor):
            ref, then, name = self._by_identity.get(id(place), (None, -1, ""))
            return name if ref is not None and ref() is place and then == version_of(place) else None
        return self._by_place.get((field, place)) if isinstance(place, MaskRule | InFile) else None

    def name(self, field: str, place: Place, x: Tensor) -> tuple[str, bool]:
        """The name of a field's content, and whether it still has to be written.

        Args:
            field: the field.
            place: where it is.
            x: the content.
        """
        digest = hashlib.blake2b(digest_size=16)
        for block in byte_blocks(x):
            digest.update(block)
        content = (field, x.dtype, tuple(x.shape), digest.digest())
        known = self._by_content.get(content)
        name = known or f"shared/{field}/{self._counts[field]:03d}"
        self._counts[field] += known is None
        self._by_content[content] = name
        if isinstance(place, Tensor):
            self._by_identity[id(place)] = (weakref.ref(place), version_of(place), name)
        elif isinstance(place, MaskRule | InFile):
            self._by_place[field, place] = name
        return name, known is None
