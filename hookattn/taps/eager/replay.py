"""A run of a model's operations that is held against what was learned, or learned.

While a run goes as one before it, nothing is followed: each operation is compared with the step that is expected, and
only what the attention calls are made of is kept. At the first difference :class:`.follower.Follower` follows all that
ran so far, on what is left of its tensors, and then goes on as if it had never done anything else; what it sees is
learned as a branch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...torch_internals.tensor_identity import storage_of, version_of
from ...torch_internals.transforms import is_wrapped
from .assemble import Ingredients
from .axis_history import Origin
from .correspondence import Correspondence, frozen, maps_in
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
    Pattern,
    Recipes,
    Result,
    Slot,
    Step,
    Told,
    Unlearnable,
    View,
    filled,
    new_in,
    numbers_in,
    outside_of,
    pattern_of,
    result_of,
    same_constant,
    slots_of,
    tensors_in,
)
from .states import Scores, SoftmaxUse, State, Weights
from .view_rules import map_of

_ref = weakref.ref
# So many operations are learned as one run; what is longer is followed.
_LONGEST = 4000


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
        learning: whether it is followed and learned.
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
        self.learning = not beginning.first
        self.here = Correspondence(before, recipes.context)
        self.wheres: dict[int, str | None] = {}
        self._recipes, self._origins, self._is_part = recipes, origins, is_part
        self._ids: set[int] = set()
        self._versions: dict[int, list[int]] = {}  # by slot, of each that is watched, in the order of the steps
        self._addresses: dict[int, Any] = {}
        self._came_with: dict[int, Origin] = {}  # by slot, what was known of a tensor from outside
        # While it is learned:
        self._slots: dict[int, int] = {}  # by the identity of a tensor
        self._found: dict[int, Origin] = {}  # by slot, where the axes come from
        self._given: dict[int, Outside] = {}
        self._needed: set[int] = set()  # by a state
        self._last: dict[int, int] = {}  # by slot, the last step that needs it
        self._products: dict[int, tuple[Product, int]] = {}  # by its identity, and the step that made it
        self._finite: dict[int, int] = {}  # by slot, the step since which scores are kept as they were then
        self._frozen: dict[int, tuple[Origin, Origin]] = {}
        self._fork = 0  # the first step that is new
        self._back: Correspondence | None = None  # to the axes of the recipe that it began with
        self._softmaxes: dict[int, tuple[SoftmaxUse, int]] = {}
        self._maps: dict[Any, int] = {}

    # One operation of a run that is known

    def expect(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Step | None:
        """The step that an operation is; None: none of those that are expected."""
        for step in self.next:
            if step.func is not func and not (step.reads and step.func == func):
                continue
            if len(args) != len(step.args) or len(kwargs) != len(step.kwargs):
                continue
            count = len(self.tensors)
            before = self.here.copy() if step.pairs else None
            if self._fits(step, args, kwargs):
                return step
            del self.tensors[count:]
            if before is not None:
                self.here = before
        return None

    def _fits(self, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        tensors = self.tensors
        for (code, want), x in zip(step.args, args, strict=True):
            if code == SLOT:
                if tensors[want] is not x and not self._is(want, x):
                    return False
            elif code == CONSTANT:
                if x is not want and not same_constant(x, want):
                    return False
            elif not self._fits_other(code, want, x):
                return False
        for name, (code, want) in step.kwargs.items():
            if name not in kwargs or not self._fits_any(code, want, kwargs[name]):
                return False
        return True

    def _fits_any(self, code: int, want: Any, x: Any) -> bool:
        if code == SLOT:
            return self.tensors[want] is x or self._is(want, x)
        if code == CONSTANT:
            return x is want or same_constant(x, want)
        return self._fits_other(code, want, x)

    def _fits_other(self, code: int, want: Any, x: Any) -> bool:
        if code == NEW:
            return self._meets(want, x)
        cls, inner = want
        if type(x) is not cls or len(x) != len(inner):
            return False
        return all(self._fits_any(code, want, one) for (code, want), one in zip(inner, x, strict=True))

    def _is(self, slot: int, x: Any) -> bool:
        """Whether a tensor is that of a slot which was thought to be needed no more."""
        held = self.tensors[slot]
        return type(held) is _ref and held() is x

    def _meets(self, want: Outside, x: Any) -> bool:
        """Whether a tensor from outside is alike to the recipe's; then it has the next slot."""
        kind = type(x)
        if want.stride is None:
            if kind is not nn.Parameter:
                return False
        elif kind is not Tensor or is_wrapped(x) or x.stride() != want.stride:
            return False
        if x.shape != want.shape or x.dtype is not want.dtype or x.device != want.device:
            return False
        key = id(x)
        if self._is_part(x) or (key in self._ids and self._slot_here(x) is not None):
            return False
        origin = self._origins.peek(x)
        if origin is None or want.origin is None:
            if origin is not want.origin:
                return False
        elif not self.here.meets(want.origin, origin):
            return False
        else:
            self._came_with[want.slot] = origin
        self.tensors.append(x)
        self._ids.add(key)
        return True

    def _slot_here(self, x: Tensor) -> int | None:
        return next((i for i, held in enumerate(self.tensors) if held is x or self._is(i, x)), None)

    def spares(self, step: Step, target: Any) -> bool:
        """Whether an operation that writes to memory leaves alone what it left alone when it was learned."""
        if not step.guards or not isinstance(target, Tensor):
            return True
        storage = storage_of(target)
        return all(storage_of(self.tensor(slot)) != storage for slot in step.guards)

    def advance(self, step: Step, out: Any) -> bool:
        """An operation ran as it was expected; whether its result is as expected, too."""
        code, want = step.out
        if code == NEW:
            if type(out) is not Tensor or out.shape != want.shape or out.dtype is not want.dtype:
                return False
            self.tensors.append(out)
            self._ids.add(id(out))
        elif not self._takes(code, want, out):
            return False
        if step.asked and not self._decided(step):
            return False
        self.path.append(step)
        self.next = step.next
        tensors = self.tensors
        for slot in step.drops:
            held = tensors[slot]
            if type(held) is not _ref:
                tensors[slot] = _ref(held)
        return True

    def _takes(self, code: int, want: Any, out: Any) -> bool:
        if code == NEW:
            if type(out) is not Tensor or out.shape != want.shape or out.dtype is not want.dtype:
                return False
            self.tensors.append(out)
            self._ids.add(id(out))
            return True
        if code == SLOT:
            return self.tensors[want] is out or self._is(want, out)
        if code == CONSTANT:
            return not isinstance(out, (Tensor, list, tuple))
        cls, inner = want
        if type(out) is not cls or len(out) != len(inner):
            return False
        return all(self._takes(code, want, one) for (code, want), one in zip(inner, out, strict=True))

    def back(self) -> None:
        """Forget what the operation that is looked at brought from outside or made, which is none of the expected."""
        count = sum(1 for step in self.path for _ in new_in((*step.args, *step.kwargs.values(), step.out)))
        del self.tensors[count:]

    def give_up(self, number: int) -> None:
        """It can't be learned, or not further than before the step of a number."""
        if len(self.path) > number:
            self.path.pop()
            before = self.path[-1].next if self.path else self.beginning.first
            before.pop()
        if self.path:
            self.path[0].hopeless += 1
            self.path[-1].follows = self.path[-1].extra = True

    def _decided(self, step: Step) -> bool:
        """Whether what was decided by values is decided as it was."""
        return all(ask(*map(self.tensor, slots)) == answer for ask, slots, answer in step.asked)

    def note(self, step: Step) -> None:
        """Keep what is to be known later of how the tensors of a step are now."""
        for slot in step.watched:
            self._versions.setdefault(slot, []).append(version_of(self.tensor(slot)))
        for slot in step.addresses:
            self._addresses[slot] = map_of(self.tensor(slot))

    def tensor(self, slot: int) -> Any:
        """The tensor of a slot; None where it is gone."""
        held = self.tensors[slot]
        return held() if type(held) is _ref else held

    def ingredients(self, made: Made) -> Ingredients:
        """The tensors that a call is made of."""
        slots = made.slots
        untouched = all(self._unwritten(slots[side].number) for side in ("a", "b"))
        finite = slots["finite"]
        return filled(slots, self.tensors, untouched, finite is None or self._unwritten(finite.number))

    def _unwritten(self, slot: int) -> bool:
        seen = self._versions.get(slot)
        return seen is None or seen[-1] == version_of(self.tensor(slot))

    def _map(self, slot: int) -> Any:
        """What tells the learned map that a tensor is from others."""
        if slot in self._addresses:
            return self._addresses[slot]
        x = self.tensor(slot)
        return (id(self), slot) if x is None else map_of(x)

    def is_clear(self, end: End) -> bool:
        """The run ends as one did before: let go of its tensors. Whether nothing is left of what was gone then.

        What a part of an attention is made of is kept for as long as that part is there.
        """
        tensors = self.tensors
        held = [(slot, self.tensor(slot)) for slot in end.needed]
        self.tensors = [x if type(x) is _ref else _ref(x) for x in tensors]
        del tensors
        clear = all(self.tensors[slot]() is None for slot in end.unclear)
        if not clear or any(self.tensors[slot]() is not None for slot in end.parts):
            for slot, x in held:
                if not clear or slot not in end.parts:
                    self.tensors[slot] = x
        return clear

    def finish(self, end: End) -> Iterator[Tensor]:
        """Say where the axes of the tensors come from that are there still.

        Returns:
            Those that are part of an attention.
        """
        origins = self._origins
        for key, slot in end.maps.items():
            self.here.apply(key, self._map(slot))
        for slot, learned in end.known:
            x = self.tensor(slot)
            if x is not None:
                origins.set(x, self.here.origin(learned))
        for slot in end.parts:
            x = self.tensor(slot)
            if x is not None:
                yield x

    # What ran so far

    def past(self) -> Iterator[tuple[Step, Sequence[Any], dict[str, Any], Any]]:
        """The operations that ran, each with its arguments and its result; for a tensor that is gone stands another."""
        known: dict[int, Outside | Result] = {}
        for step in self.path:
            known.update((one.slot, one) for one in new_in((*step.args, *step.kwargs.values(), step.out)))
            args = [self._past(code, want, known) for code, want in step.args]
            kwargs = {name: self._past(code, want, known) for name, (code, want) in step.kwargs.items()}
            code, want = step.out
            yield step, args, kwargs, self._past(code, want, known)

    def _past(self, code: int, want: Any, known: Mapping[int, Outside | Result]) -> Any:
        if code == CONSTANT:
            return want
        if code == SEVERAL:
            cls, inner = want
            values = [self._past(kind, one, known) for kind, one in inner]
            return cls(*values) if hasattr(cls, "_fields") else cls(values)
        slot = want if code == SLOT else want.slot
        x = self.tensor(slot)
        if x is None:
            x = self.tensors[slot] = _stand_in(known[slot])
            self._slots[id(x)] = slot
            if slot in self._came_with:
                self._origins.set(x, self._came_with[slot])
        return x

    def recall(self) -> None:
        """All that ran is about to be followed, and the run learned from there on."""
        self.learning = True
        self._back, self._fork = self.here.turned(), len(self.path)
        for slot in range(len(self.tensors)):
            x = self.tensor(slot)
            if x is not None:
                self._slots[id(x)] = slot
        for step in self.path:
            self._last.update(dict.fromkeys(step.slots(), step.number))
            for one in new_in((*step.args, *step.kwargs.values())):
                self._given[one.slot] = one

    def let_go(self) -> None:
        """All that ran has been followed: what is needed of its tensors is held by what is known of them."""
        self.tensors = [x if x is None or type(x) is _ref else _ref(x) for x in self.tensors]

    # Learning

    def describe(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Pattern, ...], dict[str, Pattern]]:
        """The patterns of the arguments of an operation that is about to run.

        Raises:
            Unlearnable: it can't be recognised again.
        """
        if len(self.path) >= _LONGEST:
            raise Unlearnable("too many operations")
        return tuple(pattern_of(x, self._given_slot) for x in args), {
            name: pattern_of(x, self._given_slot) for name, x in kwargs.items()
        }

    def _given_slot(self, x: Tensor) -> Pattern:
        slot = self._slot(x)
        if slot is not None:
            return SLOT, slot
        if self._is_part(x):
            raise Unlearnable(PART)
        origin = self._origins.peek(x)
        want = outside_of(len(self.tensors), x, None if origin is None else self._freeze(origin))
        self._given[want.slot] = want
        if origin is not None:
            self._came_with[want.slot] = origin
        self._add(x)
        return NEW, want

    def _freeze(self, origin: Origin) -> Origin:
        """An origin as the recipe keeps it; of a branch, by the axes of the run that its beginning was learned of."""
        try:
            made = frozen(origin, self._frozen)
            return made if self._back is None else frozen(self._back.origin(made), self._frozen)
        except LayoutError as error:
            raise Unlearnable(str(error)) from error

    def _slot(self, x: Tensor) -> int | None:
        slot = self._slots.get(id(x))
        return slot if slot is not None and self.tensor(slot) is x else None

    def _add(self, x: Tensor) -> None:
        self._slots[id(x)] = len(self.tensors)
        self.tensors.append(_ref(x))

    def place(self, x: Tensor) -> Slot | View:
        """The slot of a tensor, or of which one it is a view.

        Raises:
            Unlearnable: it is none of the run.
        """
        found = self._slot(x)
        if found is not None:
            return Slot(found)
        storage = storage_of(x)
        for slot in range(len(self.tensors)) if storage else ():
            of = self.tensor(slot)
            # Of a parameter the strides are not compared.
            if of is None or type(of) is nn.Parameter or storage_of(of) != storage or of.dtype != x.dtype:
                continue
            return View(slot, x.shape, x.stride(), int(x.storage_offset()) - int(of.storage_offset()))
        raise Unlearnable("a tensor that no operation was seen to make")

    def slot(self, x: Tensor) -> int:
        """The slot of a tensor.

        Raises:
            Unlearnable: it is none of the run.
        """
        found = self._slot(x)
        if found is None:
            raise Unlearnable("a tensor that no operation was seen to make")
        return found

    def _made_slot(self, x: Tensor) -> Pattern:
        slot = self._slot(x)
        if slot is not None:
            return SLOT, slot
        want = result_of(len(self.tensors), x)
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
            where: whether it was asked which module runs.
            written: the tensor that was written to; None: none was.

        Raises:
            Unlearnable: it can't be recognised again.
        """
        step = Step(func, name, kind, *patterns, self.result(out), len(self.path))
        step.asked = tuple(Asked(ask, tuple(map(self.slot, tensors)), answer) for ask, tensors, answer in asked)
        step.where = where
        if isinstance(written, Tensor):
            storage = storage_of(written)
            needed = [(slot, self.tensor(slot)) for slot in sorted(self._needed)]
            step.guards = tuple(slot for slot, x in needed if x is not None and storage_of(x) != storage)
        self.next.append(step)
        self._recipes.steps += 1
        self.path.append(step)
        self.next = step.next
        self._last.update(dict.fromkeys(step.slots(), step.number))
        return step

    def seen(self, step: Step, tensors: Sequence[Tensor], state_of: Any, uses: Sequence[SoftmaxUse]) -> None:
        """What following made of a step.

        Args:
            step: the step.
            tensors: its arguments and results.
            state_of: gives the state of a tensor.
            uses: the softmaxes that are new.
        """
        for x in tensors:
            slot = self._slot(x)
            if slot is None:
                continue
            origin = self._origins.peek(x)
            if origin is not None:
                self._found[slot] = origin
            state: State | None = state_of(x)
            if state is not None:
                self._needed |= {s for one in tensors_in(state) if (s := self._slot(one)) is not None}
                self._note_made(step, state)
        for use in uses:
            self._softmaxes[id(use)] = use, step.number
        if step.kind.sums_axis or step.kind.product:
            for x in tensors:
                if (slot := self._slot(x)) is not None:
                    self._maps.setdefault(map_of(x), slot)
        step.waits = self.waits()

    def _note_made(self, step: Step, state: State) -> None:
        scores = state if isinstance(state, Scores) else state.scores if isinstance(state, Weights) else None
        if scores is None:
            return
        self._products.setdefault(id(scores.product), (scores.product, step.number))
        if scores.finite is not None and (slot := self._slot(scores.finite[0])) is not None:
            self._finite.setdefault(slot, step.number)
        if isinstance(state, Weights) and state.use is not None:
            self._softmaxes.setdefault(id(state.use), (state.use, step.number))

    def effects(self, step: Step, happened: Sequence[tuple[Any, SoftmaxUse | None] | str]) -> None:
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
            slots = slots_of(builder.given, self.place)
            if id(builder.product) not in self._products:
                raise Unlearnable("a product that was made elsewhere")
            for side in ("a", "b"):
                self._watch(self._products[id(builder.product)][1], slots[side].number)
            if slots["finite"] is not None:
                self._watch(self._finite[slots["finite"].number], slots["finite"].number)
            softmax = None if use is None else self._softmaxes[id(use)][1]
            if softmax is not None:
                self.path[softmax].where = True
            step.effects.append(Made(builder, slots, softmax))
            self._needed |= {*numbers_in(slots)}

    def _watch(self, number: int, slot: int) -> None:
        if slot not in self.path[number].watched:
            self.path[number].watched.append(slot)

    def waits(self) -> bool:
        """Whether a softmax ran of which nothing came yet."""
        return any(not use.done for use, _ in self._softmaxes.values())

    def close(self, state_of: Any) -> End:
        """The run ends here: say what there is.

        Raises:
            Unlearnable: what there is can't be made again.
        """
        if self.waits():
            raise Unlearnable("a softmax of which nothing came")
        known, parts, unclear = [], [], []
        for slot in range(len(self.tensors)):
            x = self.tensor(slot)
            if x is None:
                if slot in self._found:
                    unclear.append(slot)
                continue
            origin, given = self._origins.peek(x), self._given.get(slot)
            if origin is not None and (given is None or self._came_with.get(slot) is not origin):
                known.append((slot, self._freeze(origin)))
            if state_of(x) is not None:
                parts.append(slot)
        used = maps_in(origin for _, origin in known)
        maps = {key: slot for key, slot in self._maps.items() if key in used}
        last = self.path[-1]
        last.end = End(tuple(known), tuple(parts), tuple(unclear), tuple(sorted(self._needed)), maps)
        self.path[0].hopeless = 0
        for key, slot in maps.items():
            if type(key) is tuple:  # an address: it is gone with its tensor
                step = next(step for step in self.path if slot in step.slots())
                step.addresses = [*step.addresses, slot] if slot not in step.addresses else step.addresses
        self._drop(last)
        for step in self.path:
            step.settle()
            for effect in step.effects:
                if type(effect) is Made and effect.builder.given is not None:
                    builder = effect.builder
                    builder.forget_tensors()
                    if builder.piece is not None:
                        builder.piece = builder.piece._replace(whole=self._freeze(cast(Origin, builder.piece.whole)))
        return last.end

    def _drop(self, last: Step) -> None:
        """Say after which step each tensor is needed no more; what a state holds is needed to the end."""
        for step in self.path:
            step.drops = [slot for slot in step.drops if self._last[slot] <= step.number and slot not in self._needed]
        for slot, number in self._last.items():
            step = self.path[number]
            if number >= self._fork and number < last.number and slot not in self._needed:
                step.drops.append(slot)


PART = "part of an attention of which another part ran before"


def _stand_in(want: Outside | Result) -> Tensor:
    """A tensor without values for one that is gone: nothing but its shape is asked for."""
    if want.stride is None:
        return nn.Parameter(torch.empty(want.shape, dtype=want.dtype, device="meta"), requires_grad=False)
    return torch.empty_strided(want.shape, want.stride, dtype=want.dtype, device="meta")
