"""Which part of an axis each rank has of a call, and whether all of them are there, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..calls.call import Call
from ..calls.extents import key_heads
from ..calls.shard import Shard
from ..errors import MergeError
from .joined_call import WORDS, Part, Whole, count_along, has_keys, join
from .joined_field import JoinedHistories


class Held(NamedTuple):
    """A call, and the rank that has it.

    Attributes:
        call: the call.
        label: the rank, as messages name it.
    """

    call: Call
    label: str


@dataclass(frozen=True, slots=True)
class Run:
    """What the ranks of one run have in common.

    Attributes:
        selection: what was asked for, as a trace has it.
        histories: of keys that go on from step to step.
        missing: says more of a rank that is missing: the name of its file, or that its trace lacks the call.
    """

    selection: Mapping[str, Any]
    histories: JoinedHistories
    missing: Missing


class Missing:
    """What can be told of the ranks of a run that are not there.

    Args:
        files: the names that the files of the missing ones have, as those of the ones that are there tell.
        ranks: of each rank that is there what messages call it, and where it is on each axis.
    """

    def __init__(self, files: Sequence[str], ranks: Sequence[tuple[str, frozenset[Place]]]):
        self.files, self.ranks = files, ranks

    def told(self, where: str, shards: Sequence[Shard], missing: Sequence[int], held: str) -> str:
        """A message.

        Args:
            where: which call.
            shards: what a rank that is there has of it, that of the axis first.
            missing: the numbers along the axis of those that are not there.
            held: a rank that is there.
        """
        first = shards[0]
        for index in missing:
            place = {(first.axis, first.mesh, index), *(_place(s) for s in shards[1:])}
            for label, known in self.ranks:
                if place <= known:
                    return (
                        f"{where} is in {held} and not in {label}. These are of different runs, or one of them broke "
                        "off: merge the files that one run has written."
                    )
        on = f" on {first.mesh}" if first.mesh else ""
        which = ", ".join(map(str, missing))
        are = f"ranks {which} of {first.count}{on} are" if len(missing) > 1 else f"rank {which} of {first.count}{on} is"
        files = f": {', '.join(self.files)}" if self.files else ""
        return (
            f"{are} missing{files}. Of {where} {held} has {first}, and the other {WORDS[first.axis]} are in none of "
            "the traces: merge those of all ranks."
        )


Place = tuple[str, str, int]
"""Which rank along an axis: the axis, the name of the mesh's dimension, the number."""


def _place(shard: Shard) -> Place:
    return shard.axis, shard.mesh, shard.index


def places_of(call: Call) -> frozenset[Place]:
    """Where the rank that has a call is on each axis that the call is cut along."""
    return frozenset(_place(shard) for shard in call.shards)


def whole_call(held: Sequence[Held], run: Run) -> Call:
    """The call that the ranks have the parts of: along one axis after the other, the heads first.

    Args:
        held: the same call of each rank that has anything of it.
        run: what they have in common.

    Raises:
        MergeError: a part is missing or there twice, or they are not parts of one call.
    """
    where = _where(held[0].call)
    axes = [tuple(s.axis for s in h.call.shards) for h in held]
    if any(a != axes[0] for a in axes):
        other = next(h for h, a in zip(held, axes, strict=True) if a != axes[0])
        raise MergeError(
            f"{where} is cut along {_in_words(axes[0])} in {held[0].label}, and along "
            f"{_in_words([s.axis for s in other.call.shards])} in {other.label}. These are of different runs."
        )
    while held[0].call.shards:
        lines: dict[tuple[Shard, ...], list[Held]] = {}
        for h in held:
            lines.setdefault(h.call.shards[1:], []).append(h)
        held = [Held(_along(line, run), " and ".join(h.label for h in line)) for line in lines.values()]
    if len(held) > 1:
        raise AssertionError("parts of a whole along the last axis are one line")
    return held[0].call


def _in_words(axes: Sequence[str]) -> str:
    return " and ".join(WORDS[a] for a in axes) or "nothing"


def _where(call: Call) -> str:
    return f"{call.site.label} (step {call.step})"


def _along(held: Sequence[Held], run: Run) -> Call:
    """The call that ranks make that differ along the first axis of their shards alone."""
    held = sorted(held, key=lambda h: (h.call.shards[0].start or 0, h.call.shards[0].index))
    shards = [h.call.shards[0] for h in held]
    first, where = shards[0], _where(held[0].call)
    axis = first.axis
    _check_alike(held, shards, where)
    numbers = [_numbers(h, axis, where) for h in held]
    _check_once(held, shards, numbers, where)
    selected = _selected(axis, run.selection)
    of = first.of if first.of is not None else _end(held, shards, numbers, selected, where)
    found = {n for own in numbers for n in own}
    if found and max(found) >= of:
        raise MergeError(f"{where} has {WORDS[axis]} up to {max(found)}, and is said to have {of}. Trace it again.")
    wanted = set(range(of)) if selected is None else _resolved(axis, selected, of)
    lacking = sorted(wanted - found)
    if lacking:
        there = {s.index for s in shards}
        missing = [i for i in range(first.count) if i not in there]
        if missing:
            raise MergeError(run.missing.told(where, held[0].call.shards, missing, held[0].label))
        raise MergeError(
            f"{where}: {WORDS[axis]} {_listed(lacking)} of {of} are in none of the traces. Merge those of all ranks."
        )
    starts = [s.start or 0 for s in shards]
    ends = [*starts[1:], of]
    parts = []
    for h, own, start, end in zip(held, numbers, starts, ends, strict=True):
        full = range(start, end)
        groups = _groups(h, h.call.shards[0], own, full, where) if axis == "H" else None
        parts.append(Part(h.call, h.label, own, full, groups))
    whole = Whole(axis, of, _groups_of(shards[0], parts), len(found) < of)
    _check_groups(whole, parts, where)
    return _alone(parts[0], whole) if len(parts) == 1 else join(parts, whole, run.histories)


def _alone(part: Part, whole: Whole) -> Call:
    """The call of the one rank that has all that was selected."""
    made = replace(part.call, shards=part.call.shards[1:])
    made.gradient = part.call.gradient
    if whole.axis == "H":
        made.heads = tuple(part.numbers) if whole.selected else None
    elif whole.axis == "T":
        made.queries = tuple(part.numbers) if whole.selected else None
        made.of_queries = whole.of if whole.selected else None
    return made


def _check_alike(held: Sequence[Held], shards: Sequence[Shard], where: str) -> None:
    """That the shards are of one whole, and that it is known where each is in it.

    Raises:
        MergeError: they are not, or it is not.
    """
    unknown = next((h for h, s in zip(held, shards, strict=True) if s.start is None), None)
    axis = shards[0].axis
    if unknown is not None:
        raise MergeError(
            f"{where}: which {WORDS[axis]} {unknown.label} has is not known. Trace it again with "
            f"shard=hookattn.Shard({axis!r}, start, of), or set call.shards."
        )
    for name in ("of", "groups_of", "mesh", "count"):
        values = [getattr(s, name) for s in shards]
        for h, value in zip(held, values, strict=True):
            if value != values[0]:
                raise MergeError(
                    f"{where}: the {name} of its shard is {values[0]} in {held[0].label} and {value} in {h.label}. "
                    "These are of different runs: merge the files that one run has written."
                )


def _numbers(held: Held, axis: str, where: str) -> Sequence[int]:
    """The numbers in the whole of what a rank has kept along an axis."""
    call, start = held.call, held.call.shards[0].start or 0
    told = {"H": call.heads, "T": call.queries}.get(axis)
    if told is None:
        n = count_along(call, axis)
        if n is None:
            raise MergeError(f"{where}: nothing that was captured in {held.label} tells how many {WORDS[axis]} it has.")
        return range(start, start + n)
    if min(told) < start:
        raise MergeError(
            f"{where}: {held.label} has {WORDS[axis]} from {start} on, and is said to have kept {min(told)}. "
            "call.heads and call.queries are numbers in the whole model."
        )
    return told


def _check_once(held: Sequence[Held], shards: Sequence[Shard], numbers: Sequence[Sequence[int]], where: str) -> None:
    """That no two ranks have the same.

    Raises:
        MergeError: two have; names both.
    """
    axis = shards[0].axis
    for i, (one, a) in enumerate(zip(held, shards, strict=True)):
        for j in range(i + 1, len(held)):
            other, b = held[j], shards[j]
            twice = a.start == b.start or (a.count > 1 and a.index == b.index)
            if twice:
                raise MergeError(
                    f"{where}: rank {a.index} of {a.count}{f' on {a.mesh}' if a.mesh else ''} is there twice, in "
                    f"{one.label} and in {other.label}: both have its {WORDS[axis]} from {a.start} on. Merge each rank "
                    "once; of ranks that hold other batches a Shard('B', …) in call.shards says which are theirs."
                )
            both = set(numbers[i]) & set(numbers[j])
            if both or (numbers[i] and b.start is not None and max(numbers[i]) >= b.start):
                shared = _listed(sorted(both)) if both else f"from {b.start} on"
                raise MergeError(
                    f"{where}: {one.label} and {other.label} overlap: both have the {WORDS[axis]} {shared}. Merge the "
                    "files of one run, each rank once."
                )


def _end(
    held: Sequence[Held],
    shards: Sequence[Shard],
    numbers: Sequence[Sequence[int]],
    selected: Any,
    where: str,
) -> int:
    """How many the whole has, where no shard says it: up to the last of all ranks, if all are there.

    Raises:
        MergeError: that cannot be told.
    """
    last = shards[-1]
    if last.count > 1 and last.index == last.count - 1 and selected is None and numbers[-1]:
        return max(numbers[-1]) + 1
    raise MergeError(
        f"{where}: how many {WORDS[last.axis]} the whole model has is not known, so that a missing rank would not be "
        f"noticed. Trace again with shard=hookattn.Shard({last.axis!r}, start, of), or set call.shards."
    )


def _selected(axis: str, selection: Mapping[str, Any]) -> Any:
    """What was asked for along an axis; None: all."""
    return selection.get({"H": "heads", "T": "queries", "B": ""}[axis])


def _resolved(axis: str, selected: Any, of: int) -> set[int]:
    """The numbers, from 0, that a selection means, as :meth:`Selection.to_json` writes it."""
    if axis == "T" and not isinstance(selected, Mapping):
        return set(range(of)[slice(*selected)])
    return {n % of for n in (selected["indices"] if axis == "T" else selected)}


def _listed(numbers: Sequence[int]) -> str:
    few = [str(n) for n in numbers[:8]]
    return " ".join(few if len(numbers) <= 8 else [*few, "…"])


def _groups(held: Held, shard: Shard, numbers: Sequence[int], full: range, where: str) -> tuple[int, ...] | None:
    """The key heads in the whole that those of a call are; None: none was kept.

    Raises:
        MergeError: that is not known.
    """
    call = held.call
    g = count_along(call, "G") if has_keys(call) else None
    if g is None:
        return None
    of_heads = key_heads(call, len(numbers), g)
    if shard.group_start is not None and list(numbers) == list(full):
        return tuple(range(shard.group_start, shard.group_start + g))
    found: dict[int, set[int]] = {}
    if shard.of and shard.groups_of and shard.of % shard.groups_of == 0:
        for number, at in zip(numbers, of_heads, strict=True):
            found.setdefault(at, set()).add(number * shard.groups_of // shard.of)
    elif shard.groups_of is None and g == len(numbers) and len(full) > 1:  # a key head for each query head
        found = {at: {number} for number, at in zip(numbers, of_heads, strict=True)}
    if sorted(found) != list(range(g)) or any(len(groups) > 1 for groups in found.values()):
        raise MergeError(
            f"{where}: which key heads {held.label} has is not known. Trace it again with shard=hookattn.Shard('H', "
            "start, of, group_start, groups_of), or set call.shards."
        )
    return tuple(next(iter(found[at])) for at in range(g))


def _groups_of(shard: Shard, parts: Sequence[Part]) -> int | None:
    if shard.groups_of is not None or shard.axis != "H":
        return shard.groups_of
    return max((g + 1 for part in parts for g in part.groups or ()), default=None)


def _check_groups(whole: Whole, parts: Sequence[Part], where: str) -> None:
    """That key heads are there for all ranks or for none, and of a whole all.

    Raises:
        MergeError: they are not.
    """
    if whole.axis != "H":
        return
    without = [part.label for part in parts if part.groups is None]
    if without and len(without) < len(parts):
        with_keys = next(part.label for part in parts if part.groups is not None)
        raise MergeError(f"{where}: keys or values are in {with_keys}, and not in {without[0]}.")
    found = {g for part in parts for g in part.groups or ()}
    lacking = [g for g in range(whole.groups_of or 0) if g not in found]
    if found and lacking and not whole.selected:
        raise MergeError(
            f"{where}: the key heads {_listed(lacking)} of {whole.groups_of} are in none of the traces. The shards' "
            "group_start is wrong, or a rank is missing."
        )
    if found and whole.groups_of is not None and max(found) >= whole.groups_of:
        raise MergeError(f"{where} has key head {max(found)}, and is said to have {whole.groups_of} key heads.")
