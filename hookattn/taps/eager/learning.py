"""What is learned of a run while it is followed: the slots of its tensors, its steps, and what comes of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ...torch_internals.tensor_identity import storage_of
from .assemble import CallBuilder
from .axis_history import Origin
from .correspondence import Correspondence, frozen, maps_in, sight_by
from .operation import OperationKind
from .origins import Origins
from .products import LayoutError, Product
from .recipe import (
    CONSTANT,
    NEW,
    SEVERAL,
    SLOT,
    Asked,
    Beginning,
    End,
    Made,
    Outside,
    PartOfEarlier,
    Pattern,
    Recipes,
    Slot,
    Step,
    Told,
    Unlearnable,
    View,
    numbers_in,
    outside_of,
    pattern_of,
    result_of,
    slots_of,
    tensors_in,
)
from .states import Scores, SoftmaxUse, State, Weights
from .view_rules import map_of

# So many operations are learned as one run; what is longer is followed.
_LONGEST = 4000

StateOf = Callable[[Tensor], State | None]


class RunSoFar(Protocol):
    """The part of a run (:class:`.replay.Run`, which makes lessons) that a lesson needs."""

    recipes: Recipes
    beginning: Beginning
    path: list[Step]
    next: list[Step]
    tensors: list[Any]
    origins: Origins
    given: dict[int, Origin]
    here: Correspondence
    is_part: Callable[[Tensor], bool]

    def tensor(self, slot: int) -> Any:
        """The tensor of a slot; None where it is gone."""


class Lesson:
    """What is learned of one run.

    Args:
        run: the run; it holds its tensors weakly while it is learned.
    """

    def __init__(self, run: RunSoFar):
        self.run = run
        self._slots: dict[int, int] = {}  # by the identity of a tensor
        self._found: dict[int, Origin] = {}  # by slot, where the axes come from
        self._outside: dict[int, Outside] = {}
        # By the identity of a state: the slots of its tensors, and whether it has others.
        self._holding: dict[int, tuple[State, frozenset[int], bool]] = {}
        self._needed: set[int] = set()  # by states now
        self._last: dict[int, int] = {}  # by slot, the last step that needs it, or after which a state or a call does
        self._products: dict[int, tuple[Product, int]] = {}  # by its identity, and the step that made it
        self._finite: dict[int, int] = {}  # by slot, the step since which scores are kept as they were then
        self._softmaxes: dict[int, tuple[SoftmaxUse, int]] = {}
        self._maps: dict[Any, int] = {}
        self._frozen: dict[int, tuple[Origin, Origin]] = {}
        # Of a run that was recognised at first: the first step that is new, and which axes of it are which of the
        # recipe's.
        self._fork = 0
        self._back: Correspondence | None = None

    def recall(self) -> None:
        """The run was recognised up to here."""
        run = self.run
        self._back, self._fork = run.here.turned(), len(run.path)
        for slot in range(len(run.tensors)):
            x = run.tensor(slot)
            if x is not None:
                self._slots[id(x)] = slot
        for step in run.path:
            self._needs(step.slots(), step)
            for effect in step.effects:
                if type(effect) is Made:
                    self._needs(numbers_in(effect.slots), step)
            self._outside.update((one.slot, one) for one in step.given())

    def _needs(self, slots: Iterable[int], step: Step, later: int = 0) -> None:
        """Tensors are needed in a step, or as long as so many that come later may turn out to be others."""
        for slot in slots:
            self._last[slot] = max(self._last.get(slot, 0), step.number + later)

    def is_in(self, x: Tensor, slot: int) -> None:
        """A tensor is that of a slot."""
        self._slots[id(x)] = slot

    def give_up(self, number: int) -> None:
        """It can't be learned, or not further than before the step of a number."""
        path = self.run.path
        if len(path) > number:
            path.pop()
            before = path[-1].next if path else self.run.beginning.first
            before.pop()
        if path:
            self._drop(path[-1])
            path[0].hopeless += 1
            path[-1].follows = path[-1].extra = True
            path[-1].quick = False

    def describe(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Pattern, ...], dict[str, Pattern]]:
        """The patterns of the arguments of an operation that is about to run.

        Raises:
            Unlearnable: it can't be recognised again.
        """
        if len(self.run.path) >= _LONGEST:
            raise Unlearnable("too many operations")
        return tuple(pattern_of(x, self._given_slot) for x in args), {
            name: pattern_of(x, self._given_slot) for name, x in kwargs.items()
        }

    def _given_slot(self, x: Tensor) -> Pattern:
        slot = self._slot(x)
        if slot is not None:
            return SLOT, slot
        if self.run.is_part(x):
            raise PartOfEarlier
        origin = self.run.origins.peek(x)
        mark = self.run.origins.peek_mark(x)
        learned = None if origin is None else self._freeze(origin)
        want = outside_of(len(self.run.tensors), x, learned, None if mark is None else self._mark(mark))
        self._outside[want.slot] = want
        if origin is not None:
            self.run.given[want.slot] = origin
        self._add(x)
        return NEW, want

    def _freeze(self, origin: Origin) -> Origin:
        """An origin as the recipe keeps it; of a branch, by the axes of the run that its beginning was learned of."""
        try:
            made = frozen(origin, self._frozen)
            return made if self._back is None else frozen(self._back.origin(made), self._frozen)
        except LayoutError as error:
            raise Unlearnable(str(error)) from error

    def _mark(self, here: object) -> object:
        return here if self._back is None else self._back.mark(here)

    def _slot(self, x: Tensor) -> int | None:
        slot = self._slots.get(id(x))
        return slot if slot is not None and self.run.tensor(slot) is x else None

    def _add(self, x: Tensor) -> None:
        self._slots[id(x)] = len(self.run.tensors)
        self.run.tensors.append(weakref.ref(x))

    def place(self, x: Tensor) -> Slot | View:
        """The slot of a tensor, or of which one it is a view.

        Raises:
            Unlearnable: it is none of the run.
        """
        found = self._slot(x)
        if found is not None:
            return Slot(found)
        storage = storage_of(x)
        for slot in range(len(self.run.tensors)) if storage else ():
            of = self.run.tensor(slot)
            if of is None or storage_of(of) != storage or of.dtype != x.dtype:
                continue
            return View(slot, x.shape, x.stride(), int(x.storage_offset()) - int(of.storage_offset()))
        raise Unlearnable("a tensor that no operation was seen to make")

    def _made_slot(self, x: Tensor) -> Pattern:
        slot = self._slot(x)
        if slot is not None:
            return SLOT, slot
        want = result_of(len(self.run.tensors), x)
        self._add(x)
        return NEW, want

    def result(self, out: Any) -> Pattern:
        """The pattern of a result.

        Raises:
            Unlearnable: it is no tensor of torch's own.
        """
        if isinstance(out, Tensor):
            return self._made_slot(out)
        if isinstance(out, (list, tuple)):
            return SEVERAL, (type(out), tuple(self.result(one) for one in out))
        return CONSTANT, None

    def append(
        self,
        func: Any,
        name: str,
        kind: OperationKind,
        patterns: tuple[tuple[Pattern, ...], dict[str, Pattern]],
        out: Any,
        asked: Sequence[tuple[Any, tuple[Tensor, ...], Any]],
        seen: Sequence[Any],
        where: bool,
        written: Any,
    ) -> Step:
        """A step was learned.

        Args:
            func: the function.
            name: its name.
            kind: its row in the table.
            patterns: of its arguments, as :meth:`describe` gave them.
            out: its result.
            asked: what was decided by values: the question, its tensors, the answer.
            seen: what was seen of where its tensors lie.
            where: whether it was asked which module runs.
            written: the tensor that was written to; None: none was.

        Raises:
            Unlearnable: it can't be recognised again.
        """
        step = Step(func, name, kind, *patterns, self.result(out), len(self.run.path))
        step.asked = tuple(Asked(ask, tuple(map(self.place, tensors)), answer) for ask, tensors, answer in asked)
        step.seen = tuple(seen if self._back is None else [sight_by(self._back, one) for one in seen])
        step.where = where
        if isinstance(written, Tensor):
            storage = storage_of(written)
            needed = [(slot, self.run.tensor(slot)) for slot in sorted(self._needed)]
            step.guards = tuple(slot for slot, x in needed if x is not None and storage_of(x) != storage)
        self.run.next.append(step)
        self.run.recipes.steps += 1
        self.run.path.append(step)
        self.run.next = step.next
        self._needs(step.slots(), step)
        return step

    def seen(
        self,
        step: Step,
        tensors: Sequence[Tensor],
        live: Sequence[Tensor],
        state_of: StateOf,
        uses: Sequence[SoftmaxUse],
    ) -> None:
        """What following made of a step.

        Args:
            step: the step.
            tensors: its arguments and results.
            live: those that are part of an attention, of this run or not.
            state_of: gives the state of a tensor.
            uses: the softmaxes that are new.
        """
        for x in tensors:
            slot = self._slot(x)
            if slot is None:
                continue
            origin = self.run.origins.peek(x)
            if origin is not None:
                self._found[slot] = origin
            state: State | None = state_of(x)
            if state is not None:
                self._note_made(step, state)
                if self._holds_others(state):  # which would have to be made again
                    self._needs(step.slots(), step, _LONGEST)
        for use in uses:
            self._softmaxes[id(use)] = use, step.number
        # A map is applied by a product, or looked up in, as a table of biases is.
        maps = step.kind.sums_axis or step.kind.product
        for x in tensors:
            if (maps or isinstance(x, nn.Parameter)) and (slot := self._slot(x)) is not None:
                self._maps.setdefault(map_of(x), slot)
        self._needed = set()
        for x in live:
            if self._slot(x) is not None and (state := state_of(x)) is not None:
                self._needed |= self._slots_in(state)
        self._needs(self._needed, step, 1)
        step.waits = self.waits()

    def _slots_in(self, state: State) -> frozenset[int]:
        """The slots of the tensors that a state holds."""
        known = self._holding.get(id(state))
        if known is None:
            slots = [self._slot(x) for x in tensors_in(state)]
            known = self._holding[id(state)] = (
                state,
                frozenset(slot for slot in slots if slot is not None),
                None in slots,
            )
        return known[1]

    def _holds_others(self, state: State) -> bool:
        """Whether a state holds a tensor that was made for it, of the values of others."""
        self._slots_in(state)
        return self._holding[id(state)][2]

    def _note_made(self, step: Step, state: State) -> None:
        scores = state if isinstance(state, Scores) else state.scores if isinstance(state, Weights) else None
        if scores is None:
            return
        self._products.setdefault(id(scores.product), (scores.product, step.number))
        if scores.finite is not None and (slot := self._slot(scores.finite[0])) is not None:
            self._finite.setdefault(slot, step.number)
        if isinstance(state, Weights) and state.use is not None:
            self._softmaxes.setdefault(id(state.use), (state.use, step.number))

    def effects(self, step: Step, happened: Sequence[tuple[CallBuilder, SoftmaxUse | None] | str]) -> None:
        """What came of a step: calls, as builders with the softmax they are of, and what was told.

        Raises:
            Unlearnable: a call can't be made again.
        """
        for one in happened:
            if isinstance(one, str):
                step.effects.append(Told(one))
                continue
            builder, use = one
            if not builder.again or (use is not None and id(use) not in self._softmaxes):
                raise Unlearnable("a call that is not made of views of its tensors alone")
            given = builder.given
            assert given is not None
            slots = slots_of(given, self.place)
            if id(builder.product) not in self._products:
                raise Unlearnable("a product that was made elsewhere")
            since, kept = self._products[id(builder.product)][1], None
            for side in ("a", "b"):
                self._watch(since, slots[side].number)
            if "finite" in slots:
                kept = self._finite[slots["finite"].number]
                self._watch(kept, slots["finite"].number)
            softmax = None if use is None else self._softmaxes[id(use)][1]
            if softmax is not None:
                at = self.run.path[softmax]
                at.where, at.extra, at.quick = True, True, False
            step.effects.append(Made(builder, slots, softmax, since, kept))
            self._needs(numbers_in(slots), step)

    def _watch(self, number: int, slot: int) -> None:
        step = self.run.path[number]
        step.extra, step.quick = True, False
        if slot not in step.watched:
            step.watched.append(slot)

    def waits(self) -> bool:
        """Whether a softmax ran of which nothing came yet."""
        return any(not use.done for use, _ in self._softmaxes.values())

    def close(self, state_of: StateOf) -> End:
        """The run ends here: say what there is.

        Raises:
            Unlearnable: what there is can't be made again.
        """
        if self.waits():
            raise Unlearnable("a softmax of which nothing came")
        known, parts, unclear, marks = [], [], [], []
        for slot in range(len(self.run.tensors)):
            x = self.run.tensor(slot)
            if x is None:
                if slot in self._found:
                    unclear.append(slot)
                continue
            origin, given = self.run.origins.peek(x), self._outside.get(slot)
            if origin is not None and (given is None or self.run.given.get(slot) is not origin):
                known.append((slot, self._freeze(origin)))
            if (state := state_of(x)) is not None:
                parts.append((slot, tuple(sorted(self._slots_in(state)))))
            if (mark := self.run.origins.peek_mark(x)) is not None:
                marks.append((slot, self._mark(mark)))
        used = maps_in(origin for _, origin in known)
        maps = {key: slot for key, slot in self._maps.items() if key in used}
        last = self.run.path[-1]
        last.end = End(tuple(known), tuple(parts), tuple(unclear), maps, tuple(marks))
        self.run.path[0].hopeless = 0
        for key, slot in maps.items():
            if type(key) is tuple:  # an address: it is gone with its tensor
                step = next(step for step in self.run.path if slot in step.slots())
                step.addresses = [*step.addresses, slot] if slot not in step.addresses else step.addresses
        self._drop(last)
        for step in self.run.path:
            step.settle()
            for effect in step.effects:
                if type(effect) is Made and effect.builder.given is not None:
                    builder = effect.builder
                    builder.forget_tensors()
                    if builder.piece is not None:
                        builder.piece = builder.piece._replace(whole=self._mark(builder.piece.whole))
        return last.end

    def _drop(self, last: Step) -> None:
        """Say after which step each tensor is needed no more."""
        for step in self.run.path:
            step.drops = [slot for slot in step.drops if self._last[slot] <= step.number]
        for slot, number in self._last.items():
            if self._fork <= number < last.number:
                self.run.path[number].drops.append(slot)
