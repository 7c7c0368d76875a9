"""A run of a model's operations that is held against what was learned, or learned.

While a run goes as one before it, nothing is followed: each operation is compared with the step that is expected, and
only what the attention calls are made of is kept. At the first difference :class:`.follower.Follower` follows all that
ran so far, on what is left of its tensors, and then goes on as if it had never done anything else; what it sees is
learned as a branch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...torch_internals.isolation import no_gradients
from ...torch_internals.tensor_identity import storage_of, version_of
from ...torch_internals.transforms import is_wrapped
from .axis_history import Origin
from .correspondence import Correspondence, sight_by
from .learning import Lesson
from .origins import Origins
from .recipe import (
    CONSTANT,
    NEW,
    SEVERAL,
    SLOT,
    Beginning,
    End,
    Made,
    Outside,
    Recipes,
    Result,
    Step,
    filled,
)
from .score_side import Ingredients
from .view_rules import map_of

_ref = weakref.ref


class Run:
    """One run.

    Args:
        recipes: what was learned of the model.
        beginning: where the runs of this kind begin.
        origins: what is known of where the tensors' axes come from.
        is_part: whether a tensor is part of an attention of an earlier run.
        before: which axes were which in the run before, if that was recognised.

    Attributes:
        beginning: where it began.
        path: the steps so far.
        next: those that may come.
        tensors: by slot; a weak reference where no operation needs the tensor any more. While it is learned all are.
        lesson: what is learned of it; None: it is recognised, or over.
        followed: whether it was followed, all of it.
        quick: whether it is recognised, and one step alone may come, which is quick.
        origins: what is known of where the tensors' axes come from.
        given: by slot, what was known of the axes of a tensor from outside when it was first used.
        here: which axes are which of the recipe's.
        wheres: by the number of a step, the path of the module that ran then.
    """

    def __init__(
        self,
        recipes: Recipes,
        beginning: Beginning,
        origins: Origins,
        is_part: Callable[[Tensor], bool],
        before: Correspondence | None,
    ):
        self.beginning = beginning
        self.path: list[Step] = []
        self.next = beginning.first
        self.tensors: list[Any] = []
        self.followed = self.quick = False
        self.lesson: Lesson | None = None if beginning.first else Lesson(self)
        self.here = Correspondence(before, recipes.context)
        self.wheres: dict[int, str | None] = {}
        self.recipes, self.origins, self.is_part = recipes, origins, is_part
        self._ids: set[int] = set()
        self._versions: dict[tuple[int, int], int] = {}  # by slot and step, of those that are watched
        self._addresses: dict[int, Any] = {}
        self.given: dict[int, Origin] = {}
        self._parts: list[tuple[int, list[Tensor]]] = []  # of a run that is over
        self._writes: list[tuple[int, int, int]] = []  # which step wrote to which storage, and its version since
        self._given_versions: dict[int, int] = {}  # by slot, of tensors from outside when they were first used

    # One operation of a run that is known

    def expect(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Step | None:
        """The step that an operation is; None: none of those that are expected."""
        for step in self.next:
            if step.func is not func and not (step.reads and step.func == func):
                continue
            count = len(self.tensors)
            before = self.here.copy() if step.pairs else None
            if step.fits(args, kwargs, self.tensors, self):
                if step is not self.next[0]:  # what ran last comes first: in a generation the other lengths are over
                    self.next.remove(step)
                    self.next.insert(0, step)
                return step
            if before is not None:
                self.here = before
            self.cut(count)
        return None

    def cut(self, count: int) -> None:
        """Forget the tensors that an operation brought which is not the expected one; ``count``: those before."""
        del self.tensors[count:]
        for known in (self.given, self._given_versions):
            for slot in [slot for slot in known if slot >= count]:
                del known[slot]

    def holds(self, slot: int, x: Any) -> bool:
        """Whether a tensor is that of a slot which was thought to be needed no more."""
        held = self.tensors[slot]
        return type(held) is _ref and held() is x

    def meets(self, want: Outside, x: Any) -> bool:
        """Whether a tensor from outside is alike to the recipe's; then it has the next slot."""
        if want.parameter:
            if type(x) is not nn.Parameter:
                return False
        elif type(x) is not Tensor or is_wrapped(x):
            return False
        if x.layout is not torch.strided or x.is_nested:  # which have no strides, and may have no shape
            return False
        if x.shape != want.shape or x.stride() != want.stride:
            return False
        if x.dtype is not want.dtype or x.device != want.device or self.is_part(x):
            return False
        key = id(x)
        if key in self._ids and self._slot_here(x) is not None:
            return False
        origin = self.origins.peek(x)
        if origin is not None:
            if want.origin is None or not self.here.meets(want.origin, origin):
                return False
            self.given[want.slot] = origin
        elif want.origin is not None:
            return False
        mark = self.origins.peek_mark(x)
        if mark is not want.mark and (mark is None or want.mark is None or not self.here.pair_marks(want.mark, mark)):
            return False
        if not want.parameter:
            self._given_versions[want.slot] = version_of(x)
        self.tensors.append(x)
        self._ids.add(key)
        return True

    def has(self, x: Tensor) -> bool:
        """Whether a tensor is one of the run."""
        return self._slot_here(x) is not None

    def _slot_here(self, x: Tensor) -> int | None:
        return next((i for i, held in enumerate(self.tensors) if held is x or self.holds(i, x)), None)

    def spares(self, step: Step, target: Any) -> bool:
        """Whether an operation that writes to memory leaves alone what it left alone when it was learned."""
        if not step.guards or not isinstance(target, Tensor):
            return True
        storage = storage_of(target)
        return all(storage_of(self.tensor(slot)) != storage for slot in step.guards)

    def other(self, than: Step, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Step | None:
        """Another step that an operation is, whose result is not that of the one that was expected; None: none."""
        self.back()
        for step in self.next:
            if step is than or step.func != func:
                continue
            before = self.here.copy()
            if step.fits(args, kwargs, self.tensors, self) and self.advance(step, out):
                return step
            self.here = before
            self.back()
        return None

    def advance(self, step: Step, out: Any) -> bool:
        """An operation ran as it was expected; whether its result is as expected, too."""
        if not self._takes(*step.out, out):
            return False
        if step.asked and not self._decided(step):
            return False
        self._passed(step)
        return True

    def made(self, step: Step, out: Tensor) -> None:
        """As :meth:`advance`, of a quick step whose result is as expected."""
        self.tensors.append(out)
        self._ids.add(id(out))
        self._passed(step)
        if step.drops:
            self.drop(step)

    def _passed(self, step: Step) -> None:
        self.path.append(step)
        after = self.next = step.next
        self.quick = len(after) == 1 and after[0].quick

    def drop(self, step: Step) -> None:
        """A step is over: what it was the last to need is held weakly."""
        tensors = self.tensors
        for slot in step.drops:
            held = tensors[slot]
            if type(held) is not _ref:
                tensors[slot] = _ref(held)

    def _takes(self, code: int, want: Any, out: Any) -> bool:
        if code == NEW:
            if type(out) is not Tensor or out.shape != want.shape or out.dtype is not want.dtype:
                return False
            self.tensors.append(out)
            self._ids.add(id(out))
            return True
        if code == SLOT:
            return self.tensors[want] is out or self.holds(want, out)
        if code == CONSTANT:
            return not isinstance(out, (Tensor, list, tuple))
        cls, inner = want
        if type(out) is not cls or len(out) != len(inner):
            return False
        return all(self._takes(code, want, one) for (code, want), one in zip(inner, out, strict=True))

    def back(self) -> None:
        """Forget what the operation that is looked at brought from outside or made, which is none of the expected."""
        self.cut(sum(1 for step in self.path for _ in step.new()))

    def _decided(self, step: Step) -> bool:
        """Whether what was decided by values is decided as it was."""
        with no_gradients():
            return all(
                ask(*[place.of(self.tensor(place.number)) for place in places]) == answer
                for ask, places, answer in step.asked
            )

    def note(self, step: Step) -> None:
        """Keep what is to be known later of how the tensors of a step are now."""
        for slot in step.watched:
            self._versions[slot, step.number] = version_of(self.tensor(slot))
        for slot in step.addresses:
            self._addresses[slot] = map_of(self.tensor(slot))

    def tensor(self, slot: int) -> Any:
        """The tensor of a slot; None where it is gone."""
        held = self.tensors[slot]
        return held() if type(held) is _ref else held

    def ingredients(self, made: Made) -> Ingredients:
        """The tensors that a call is made of."""
        slots = made.slots
        untouched = self._unwritten(slots["a"].number, made.product) and self._unwritten(
            slots["b"].number, made.product
        )
        finite = made.finite is None or self._unwritten(slots["finite"].number, made.finite)
        return filled(slots, self.tensors, untouched, finite)

    def _unwritten(self, slot: int, since: int) -> bool:
        return self._versions[slot, since] == version_of(self.tensor(slot))

    def _map(self, slot: int) -> Any:
        """What tells the learned map that a tensor is from others."""
        if slot in self._addresses:
            return self._addresses[slot]
        x = self.tensor(slot)
        return (id(self), slot) if x is None else map_of(x)

    def is_clear(self, end: End) -> bool:
        """The run ends as one did before: let go of its tensors. Whether nothing is left of what was gone then.

        What a part of an attention is made of is kept for as long as that part is there, by whatever else than the run.
        """
        held = {slot: self.tensor(slot) for _, needed in end.parts for slot in needed}
        self.tensors = [x if type(x) is _ref else _ref(x) for x in self.tensors]
        kept: set[int] = set()
        waiting = list(end.parts)
        while waiting:
            # One that no other is made of, if there is one: it alone tells of itself whether it is there.
            others = [n for slot, needed in waiting for n in needed if n != slot]
            part = next((part for part in waiting if part[0] not in others), waiting[0])
            waiting.remove(part)
            slot, needed = part
            made_of = [held[n] for n in needed if n != slot and n in held]
            if slot not in kept:
                held.pop(slot, None)
            if self.tensors[slot]() is not None:
                self._parts.append((slot, made_of))
                kept.update(needed)
        held.clear()
        return all(self.tensors[slot]() is None for slot in end.unclear)

    def finish(self, end: End) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Say where the axes of the tensors come from that are there still.

        Returns:
            Those that are part of an attention, each with what it is made of.
        """
        origins = self.origins
        for key, slot in end.maps.items():
            self.here.apply(key, self._map(slot))
        for slot, learned in end.known:
            x = self.tensor(slot)
            if x is not None:
                origins.set(x, self.here.origin(learned))
        for slot, mark in end.marks:
            x = self.tensor(slot)
            if x is not None:
                origins.set_mark(x, self.here.mark(mark))
        parts, self._parts = self._parts, []  # a part that knows the run would else be kept by it
        for slot, made_of in parts:
            x = self.tensor(slot)
            if x is not None:
                yield x, made_of

    # What ran so far

    def past(self) -> Iterator[tuple[Step, Sequence[Any], dict[str, Any], Any]]:
        """The operations that ran, each with its arguments and its result; for a tensor that is gone stands another."""
        known: dict[int, Outside | Result] = {}
        for step in self.path:
            known.update((one.slot, one) for one in step.new())
            args = [self._past(code, want, known) for code, want in step.args]
            kwargs = {name: self._past(code, want, known) for name, (code, want) in step.kwargs.items()}
            code, want = step.out
            yield step, args, kwargs, self._past(code, want, known)

    def sights(self, step: Step) -> list[Any]:
        """What was seen of where the tensors of a step lie, as it is in this run."""
        return [sight_by(self.here, one) for one in step.seen]

    def _past(self, code: int, want: Any, known: Mapping[int, Outside | Result]) -> Any:
        if code == CONSTANT:
            return want
        if code == SEVERAL:
            cls, inner = want
            values = [self._past(kind, one, known) for kind, one in inner]
            return cls(*values) if cls is slice or hasattr(cls, "_fields") else cls(values)
        slot = want if code == SLOT else want.slot
        x = self.tensor(slot)
        if x is None:
            x = self.tensors[slot] = _stand_in(known[slot])
            assert self.lesson is not None
            self.lesson.is_in(x, slot)
            if slot in self.given:
                self.origins.set(x, self.given[slot])
        return x

    def touched(self) -> frozenset[int]:
        """The tensors, by identity, that were written to by something that nobody saw."""
        there = {slot: x for slot in range(len(self.tensors)) if (x := self.tensor(slot)) is not None}
        given = {storage_of(there[slot]): version for slot, version in self._given_versions.items() if slot in there}
        parameters = {storage_of(x) for x in there.values() if type(x) is nn.Parameter}
        found = set()
        for step in self.path:
            for one in step.new():
                x = there.get(one.slot)
                storage = 0 if x is None else storage_of(x)
                if x is None or storage in parameters:  # which are written to between runs
                    continue
                # A write before there was the tensor is counted by it if it is a view, as its result told; or it was to
                # something else, which had this memory and is gone, unless the memory is of what was given. And one is
                # not counted by a tensor that was made of the same memory by other means than a view.
                first = 0 if storage in given else step.number
                known = {v for n, where, v in self._writes if where == storage and n >= first}
                known.add(given.get(storage, one.version if isinstance(one, Result) else 0))
                if version_of(x) not in known:
                    found.add(id(x))
        return frozenset(found)

    def version_at(self, number: int, x: Tensor) -> int | None:
        """How often a tensor had been written to when the step of a number had run; None: that was not noted."""
        found = [version for (slot, n), version in self._versions.items() if n == number and self.tensor(slot) is x]
        return found[0] if found else None

    def wrote(self, step: Step, target: Any) -> None:
        """A step wrote to the memory of a tensor."""
        if isinstance(target, Tensor):
            self._writes.append((step.number, storage_of(target), version_of(target)))

    def writes_since(self, number: int, x: Tensor) -> int:
        """How often steps of the run have written to the memory of a tensor, from the step of a number on."""
        storage = storage_of(x) if self._writes else 0
        return sum(n >= number and one == storage for n, one, _ in self._writes)

    def recall(self) -> Lesson:
        """All that ran is about to be followed, and the run learned from there on."""
        self.quick = False
        self.lesson = Lesson(self)
        self.lesson.recall()
        return self.lesson

    def let_go(self) -> None:
        """All that ran has been followed: what is needed of its tensors is held by what is known of them."""
        self.tensors = [x if x is None or type(x) is _ref else _ref(x) for x in self.tensors]

    def learned(self) -> None:
        """It has been followed to its end."""
        self.followed, self.lesson = True, None  # which know each other


def _stand_in(want: Outside | Result) -> Tensor:
    """A tensor without values for one that is gone: nothing but its shape is asked for."""
    made = torch.empty_strided(want.shape, want.stride, dtype=want.dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(want, Outside) and want.parameter else made
