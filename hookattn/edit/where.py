"""Which calls an edit is for, and which entries of them: said as :meth:`hookattn.Trace.select` takes it, while the
model runs.

A selection is looked at before the whole forward has run, so that what counts from an end has to know where it is. Of
layers the structure of the model mostly tells it; of steps nobody can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from .. import checks
from ..attention.kernel_call import FIELD_SPECS
from ..calls.layer_counts import names_layer
from ..calls.site import Site, without_wrappers
from ..errors import EditError, SelectionError

Numbers = int | Sequence[int] | slice


class Where(TypedDict, total=False):
    """What every edit takes to say where it is done; what is left out is all there is.

    Attributes:
        layer: indices of layers in their stack, a slice of them, negative ones from its end.
        stack, kind, path: of the site.
        step: which forwards of the block, from 0.
        heads: query heads, of ``k`` and ``v`` key heads; negative ones from the last.
        queries, keys: positions in the sequence, which with a cache goes on from step to step; negative ones from the
            last that is there.
        batch: batch entries.
    """

    layer: Numbers | None
    stack: str | None
    kind: str | None
    path: str | None
    step: int | Sequence[int] | None
    heads: Numbers | None
    queries: Numbers | None
    keys: Numbers | None
    batch: Numbers | None


_POSITIONS = {"heads": "HG", "queries": "T", "keys": "S", "batch": "B"}
"""The letters of the axes that each of these chooses from."""


@dataclass(frozen=True)
class Selected:
    """A :class:`Where` that was looked at; the attributes are its own, ints as tuples."""

    layer: tuple[int, ...] | slice | None = None
    stack: str | None = None
    kind: str | None = None
    path: str | None = None
    step: tuple[int, ...] | None = None
    heads: tuple[int, ...] | slice | None = None
    queries: tuple[int, ...] | slice | None = None
    keys: tuple[int, ...] | slice | None = None
    batch: tuple[int, ...] | slice | None = None

    @classmethod
    def of(cls, edit: str, field: str, where: Where) -> Selected:
        """Of an edit of a field.

        Raises:
            InputError: an option that there is none of, or of another kind than it has to be.
            SelectionError: numbers that select nothing, or an axis that the field does not have.
        """
        unknown = [name for name in where if name not in Where.__annotations__]
        if unknown:
            raise checks.wrong("edit." + edit, unknown[0], f"options among {', '.join(Where.__annotations__)}")
        made: dict[str, Any] = {}
        for name in ("stack", "kind", "path"):
            value = where.get(name)
            made[name] = None if value is None else checks.text(name, value)
        for name in ("layer", "heads", "queries", "keys", "batch"):
            made[name] = _numbers(name, where.get(name))
        step = where.get("step")
        if step is not None:
            made["step"] = tuple(checks.whole("step", i, 0, "a step, counted from 0") for i in _ints("step", step))
        axes = "BHTS" if field == "mask" else FIELD_SPECS[field].axes
        for name, letters in _POSITIONS.items():
            if made[name] is not None and not set(letters) & set(axes):
                raise SelectionError(
                    f"edit.{edit}({field!r}, {name}=…): {field} has no axis of {name} (its axes are {' '.join(axes)})."
                )
        return cls(**made)

    def takes(self, site: Site, step: int) -> bool:
        """Whether a call at a site is one of these.

        Raises:
            EditError: layers are counted from an end that is not known while the model runs.
        """
        if self.stack not in (None, site.stack) or self.kind not in (None, site.kind):
            return False
        if self.path is not None and site.path not in (self.path, without_wrappers(self.path)):
            return False
        if self.step is not None and step not in self.step:
            return False
        return self.layer is None or self._takes_layer(site)

    def _takes_layer(self, site: Site) -> bool:
        wanted, layer, count = self.layer, site.layer, site.layers
        if layer is None:
            return False
        if isinstance(wanted, slice):
            ends = [i for i in (wanted.start, wanted.stop) if i is not None]
            if count is None and (any(i < 0 for i in ends) or (wanted.step or 1) < 0):
                raise self._no_end(site)
            # Of a slice that counts from the front the number of layers is of no account, if it is large enough.
            return layer in range(*wanted.indices(max([layer + 1, *ends]) if count is None else count))
        named = [names_layer(i, layer, count) for i in wanted or ()]
        if None in named and True not in named:
            raise self._no_end(site)
        return True in named

    def _no_end(self, site: Site) -> EditError:
        return EditError(
            f"{site.label}: layer={self.layer} counts from the end, and how many layers there are is not known while "
            "this model runs; count from 0, or say path=."
        )

    def __str__(self) -> str:
        given = {name: value for name in Where.__annotations__ if (value := getattr(self, name)) is not None}
        return ", ".join(f"{name}={_shown(value)}" for name, value in given.items())


def chosen(
    name: str,
    wanted: tuple[int, ...] | slice | None,
    there: Sequence[int],
    whole: bool,
    where: str,
    end: int | None = None,
) -> tuple[int, ...] | None:
    """The places of what is wanted among what is there; None: all of it.

    Args:
        name: heads, queries, keys or batch.
        wanted: numbers; negative ones from the last that is there.
        there: the numbers that are there, one each, going up.
        whole: whether there are no others, so that one that is not there is an error.
        where: of the call.
        end: what negative numbers count from; None: from the last that is there.

    Raises:
        EditError: one is not there.
    """
    if wanted is None:
        return None
    end = max(there, default=-1) + 1 if end is None else end
    place = {number: i for i, number in enumerate(there)}
    if isinstance(wanted, slice):
        return tuple(place[i] for i in range(*wanted.indices(end)) if i in place)
    found = []
    for i in wanted:
        number = i + end if i < 0 else i
        if number in place:
            found.append(place[number])
        elif whole:
            raise EditError(
                f"{where}: {name}={list(wanted)} names {i}, and this call has {len(there)} {name}, counted from 0."
            )
    return tuple(sorted(set(found)))


def _ints(name: str, value: Any) -> list[int]:
    found = checks.several_ints(name, value)
    if not found:
        raise SelectionError(f"{name}=[] selects nothing; leave it out to select all.")
    return found


def _numbers(name: str, value: Any) -> tuple[int, ...] | slice | None:
    if value is None:
        return None
    return checks.int_slice(name, value) if isinstance(value, slice) else tuple(_ints(name, value))


def _shown(value: Any) -> str:
    if isinstance(value, slice):
        parts = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if i is None else str(i) for i in parts)
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else str(list(value))
    return repr(value)
