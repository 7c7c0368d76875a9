"""Whether all that a file says of one call can be true at once: the shapes and dtypes of its fields, and its numbers.

What a field is like stands in the table of fields (:data:`~hookattn.attention.kernel_call.FIELD_SPECS`), and what a
statistic is like in :func:`~hookattn.statistics.registry.spec_of`; this module has no field of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..attention.kernel_call import DOT, FIELD_SPECS, OUTPUT_GRADIENT, TENSOR_SPECS, FieldSpec
from ..attention.normalizers import is_softmax
from ..calls.edits import AppliedEdit, set_by_edits
from ..calls.shard import Shard
from ..statistics.registry import spec_of

Shown = tuple[torch.dtype, Sequence[int]]
"""What a header says of a tensor: dtype and shape."""

_LARGEST_OF_NONE = 1 << 20
"""The largest axis of a tensor without elements, whose size no bytes bear out: readers may count along it."""
_NEVER_EMPTY = frozenset("HGDE")
"""The axes that have an element in every model; a batch, a sequence or its keys may be empty."""
_SCALE = TENSOR_SPECS["scale"]
_BY_OWN_SCORES = frozenset(("q", "k", "scores"))
"""The fields that a call may be without whose scores are something else than q·k."""
_WITH_BATCH = frozenset(name for name, spec in FIELD_SPECS.items() if spec.axes.startswith("B") and not spec.broadcast)
_MAY_BE_NONE = frozenset(name for name, spec in FIELD_SPECS.items() if spec.optional) | {"output"}


def problem(
    values: Mapping[str, Any],
    fields: Mapping[str, Shown | None],
    scale: Shown | None,
    gradient: Shown | None = None,
) -> str | None:
    """What cannot be true of a call; None: nothing is wrong.

    Args:
        values: its values, as :data:`~hookattn.store.schema.CALL` lists them.
        fields: the header's word on each field; None: the call has none.
        scale: likewise of its scale; None: that is a number.
        gradient: likewise of the gradient of its output; None: there is none.
    """
    return next(_problems(values, fields, scale, gradient), None)


def _problems(
    values: Mapping[str, Any], fields: Mapping[str, Shown | None], scale: Shown | None, gradient: Shown | None
) -> Iterator[str]:
    score, own_scores = values.get("score", DOT), values["own_scores"]
    if score != DOT and not own_scores:
        yield f"'score' is {score!r}, and 'own_scores' is false: such scores are the model's own"
    if values.get("own_by_edits") and not (own_scores and set_by_edits(values.get("edits", ()), "scores")):
        yield "'own_by_edits' is true, and no edit has set any scores, or 'own_scores' is false"
    absent = {name for name, shown in fields.items() if shown is None}
    for name in absent & FIELD_SPECS.keys() - _MAY_BE_NONE - (_BY_OWN_SCORES if own_scores else frozenset()):
        yield f"field {name!r} is null, which such a call cannot be without"
    sizes: dict[str, tuple[int, str]] = {}  # letter → extent, and the field that says so
    for spec, (dtype, shape) in _specified(fields):
        yield from _of_one(spec, dtype, shape)
        if not spec.broadcast:
            yield from _of_all(spec, shape, sizes)
    for spec, (_, shape) in _specified(fields):
        if spec.broadcast:
            yield from _of_all(spec, shape, sizes)
    if gradient is not None:
        yield from _of_one(OUTPUT_GRADIENT, *gradient)
        yield from _of_all(OUTPUT_GRADIENT, gradient[1], sizes)
    if scale is not None:
        yield from _of_one(_SCALE, *scale)
        yield from _of_all(_SCALE, scale[1], sizes)
    yield from _of_lists(values, sizes)
    yield from _of_derivable(values, fields)
    yield from _of_shards(values, sizes)
    yield from _of_requests(values, fields, sizes)
    yield from _of_edits(values, fields, sizes)


def _specified(fields: Mapping[str, Shown | None]) -> Iterator[tuple[FieldSpec, Shown]]:
    for name, shown in fields.items():
        if shown is not None:
            # Of a statistic of somebody's own nobody knows more than the axes that all but a few have.
            own = FieldSpec(name, "BHT*", integer=not shown[0].is_floating_point)
            yield FIELD_SPECS.get(name) or spec_of(name) or own, shown


def _of_one(spec: FieldSpec, dtype: torch.dtype, shape: Sequence[int]) -> Iterator[str]:
    """A field alone: its dtype and the number of its axes."""
    name, axes = spec.name, spec.axes
    kind = "bool" if spec.boolean else "int64" if spec.integer else "floating"
    fits = dtype is torch.bool if spec.boolean else dtype is torch.int64 if spec.integer else dtype.is_floating_point
    if not fits:
        yield f"field {name!r} is {str(dtype).removeprefix('torch.')}, expected {kind}"
    ranks: Collection[int] = (0, 1, 2, 3, 4) if spec.broadcast else (len(axes),)
    if axes.endswith("*"):
        ranks = (len(axes) - 1, len(axes))
    if len(shape) not in ranks:
        yield f"field {name!r} is {list(shape)}, expected {' '.join(axes)}"
    if 0 in shape and max(shape) > _LARGEST_OF_NONE:
        yield f"field {name!r} is {list(shape)}: it is empty, and no axis of an empty one may be so large"


def _of_all(spec: FieldSpec, shape: Sequence[int], sizes: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A field beside the others: each letter has one extent."""
    axes = "H" if spec.is_column and len(shape) == 1 else spec.axes
    # What is broadcast may have fewer axes, from the right.
    for letter, n in zip(axes[len(axes) - len(shape) :] if spec.broadcast else axes, shape, strict=False):
        if letter in "1*":
            if letter == "1" and n != 1:
                yield f"field {spec.name!r} is {list(shape)}, expected {' '.join(spec.axes)}"
            continue
        if n == 1 and (spec.broadcast or letter == "B"):
            continue  # the same for all
        if n == 0 and letter in _NEVER_EMPTY:
            yield f"field {spec.name!r} is {list(shape)}: {letter} is 0"
        known, of = sizes.setdefault(letter, (n, spec.name))
        if known != n:
            yield f"field {spec.name!r} has {letter} = {n}, and {of!r} has {letter} = {known}"


def _of_lists(values: Mapping[str, Any], sizes: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """The numbers of a call beside the extents of its fields."""
    heads, kv_heads, queries = values["heads"], values["kv_heads"], values["queries"]
    counts = {"heads": ("H", heads), "kv_heads": ("H", kv_heads), "queries": ("T", queries)}
    for name, (letter, numbers) in counts.items():
        if numbers is None:
            continue
        if not numbers:
            yield f"{name!r} is empty, expected null where all are kept"
        known, of = sizes.get(letter, (len(numbers), name))
        if known != len(numbers):
            yield f"{name!r} has {len(numbers)} entries, and field {of!r} has {letter} = {known}"
    keys, of_queries = values.get("keys"), values.get("of_queries")
    if keys is not None and "S" in sizes and keys != sizes["S"][0]:
        yield f"'keys' is {keys}, and field {sizes['S'][1]!r} has S = {sizes['S'][0]}"
    if of_queries is not None and queries is None:
        yield f"'of_queries' is {of_queries}, and 'queries' is null: expected both or neither"
    elif of_queries is not None and of_queries <= max(queries, default=-1):
        yield f"'of_queries' is {of_queries}, and query row {max(queries)} was kept"
    if "G" not in sizes:
        return
    h, (g, of) = sizes.get("H", (None, ""))[0], sizes["G"]
    if kv_heads is not None and max(kv_heads, default=0) >= g:
        yield f"'kv_heads' has {max(kv_heads)}, and field {of!r} has {g} heads"
    elif kv_heads is None and h is not None and h % g:
        yield f"field {of!r} has {g} heads for {h} query heads, and 'kv_heads' does not say which is whose"


def _of_shards(values: Mapping[str, Any], sizes: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """The parts of axes that a process has, beside the numbers that are kept and the extents of the fields."""
    shards: Sequence[Shard] = values.get("shards", ())
    axes = [shard.axis for shard in shards]
    if len(set(axes)) < len(axes):
        yield f"'shards' has axis {max(axes, key=axes.count)!r} twice, expected one for each"
    if "H" in axes[1:]:
        yield "'shards' has heads behind another axis, expected them first"
    for shard in shards:
        name = {"H": "heads", "T": "queries"}.get(shard.axis)
        numbers = None if name is None else values[name]
        if numbers and shard.of is not None and max(numbers) >= shard.of:
            yield f"{name!r} has {max(numbers)}, and its shard says that the model has {shard.of}"
        if numbers and shard.start is not None and min(numbers) < shard.start:
            yield f"{name!r} has {min(numbers)}, and its shard begins at {shard.start}"
        of_axis = [(shard.axis, shard.start, shard.of)]
        if shard.axis == "H":
            of_axis.append(("G", shard.group_start, shard.groups_of))
        for letter, start, of in of_axis:
            here, field = sizes.get(letter, (0, ""))
            # Of key heads that were selected nothing says which they are.
            if of is not None and (0 if letter == "G" and values["kv_heads"] else start or 0) + here > of:
                begins = "" if start is None else f" from {start} on"
                yield f"field {field!r} has {letter} = {here}{begins}, and its shard says that the model has {of}"


def _of_requests(
    values: Mapping[str, Any], fields: Mapping[str, Shown | None], sizes: Mapping[str, tuple[int, str]]
) -> Iterator[str]:
    """Whose the batch entries are: one name for each."""
    requests = values.get("requests")
    if requests is None:
        return
    # Of size 1 are all that have an axis of entries, or none: else one of them would have told.
    one = next((name for name, shown in fields.items() if shown is not None and name in _WITH_BATCH), None)
    known = sizes.get("B", None if one is None else (1, one))
    if known is not None and len(requests) != known[0]:
        yield f"'requests' has {len(requests)} entries, and field {known[1]!r} has B = {known[0]}"


def _of_derivable(values: Mapping[str, Any], fields: Mapping[str, Shown | None]) -> Iterator[str]:
    """Fields that are said to follow from others, of which the others have to be there."""
    derivable = values["derivable"]
    if "weights" in derivable and not is_softmax(values.get("normalizer", "softmax")):
        yield f"'derivable' has 'weights', and the normalizer is {values['normalizer']!r}"
    if values["own_scores"] and "scores" in derivable and "scores" not in fields:
        yield "'derivable' has 'scores', and 'own_scores' is true: such scores follow from nothing"
    if "weights" in derivable and set_by_edits(values.get("edits", ()), "weights"):
        yield "'derivable' has 'weights', and an edit set some of them: they follow from nothing"
    for name in derivable:
        lacking = lacks(name, derivable, fields)
        if lacking is not None:
            yield f"'derivable' has {name!r}, which follows from {lacking!r}, and there is none"


def _of_edits(
    values: Mapping[str, Any], fields: Mapping[str, Shown | None], sizes: Mapping[str, tuple[int, str]]
) -> Iterator[str]:
    """The numbers of edits beside the extents that the whole call has, as far as these are known."""
    edits = values.get("edits")
    if not edits:
        return
    known = {letter: n for letter, (n, _) in sizes.items()}
    if any(shown is not None and name in _WITH_BATCH for name, shown in fields.items()):
        known.setdefault("B", 1)
    if values["heads"] is not None:  # the model's number of heads is not told
        known = {letter: n for letter, n in known.items() if letter not in "HG"}
    if values["queries"] is not None:
        known.pop("T", None)
        if values.get("of_queries") is not None:
            known["T"] = values["of_queries"]
    if values.get("keys") is not None:
        known["S"] = values["keys"]
    for number, edit in enumerate(edits):
        axes = FIELD_SPECS[edit.field].axes
        along = {"batch": "B", "heads": "G" if "G" in axes else "H", "queries": "T", "keys": "S"}
        for name, letter in along.items():
            chosen = getattr(edit, name)
            if chosen is None:
                continue
            if letter not in axes:
                yield f"edit {number} names {name}, and {edit.field!r} has no such axis"
            if max(chosen) >= known.get(letter, max(chosen) + 1):
                yield f"edit {number} names {max(chosen)} among its {name}, and {letter} is {known[letter]}"


def derivable_of(
    derivable: Collection[str],
    own_scores: bool,
    normalizer: str,
    fields: Mapping[str, object],
    edits: Sequence[AppliedEdit] = (),
) -> list[str]:
    """Of the fields that are said to follow from others those that do, for whoever writes them down.

    Args:
        derivable: what is said.
        own_scores, normalizer: of the call.
        fields: what is there, None where the call has no such field.
        edits: of the call; weights that one has set follow from nothing.
    """
    follow = is_softmax(normalizer) and not set_by_edits(edits, "weights")
    found = [name for name in derivable if name != "weights" or follow]
    if own_scores and "scores" not in fields:
        found = [name for name in found if name != "scores"]
    return [name for name in found if lacks(name, found, fields) is None]


def lacks(name: str, derivable: Collection[str], fields: Mapping[str, object]) -> str | None:
    """A field that ``name`` follows from, and that neither is among ``fields`` nor follows itself; None: there is none.

    Args:
        name: a field that follows from others.
        derivable: those that do.
        fields: what is there, None where the call has no such field.
    """
    for source in FIELD_SPECS[name].derived_from:
        there = source in fields and (fields[source] is not None or FIELD_SPECS[source].optional)
        if not there and (source not in derivable or lacks(source, derivable, fields) is not None):
            return source
    return None
