"""What is learned of a model's operations: a tree of steps, whose paths are the runs that were seen.

A run is a piece of what a model does: all operations in an attention site, or, of a model that is watched as a whole,
those from one attention call to the next. Each of its tensors has a number, its *slot*: what comes from outside when
it is first used, results as they are made. A :class:`Step` is one operation on slots. Runs that begin alike share
their first steps, and where they differ the tree branches.

Nothing here holds a tensor, a module or a value of one. What a model decides by value is in :attr:`Step.asked`, and is
asked again in every run.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ...torch_internals.forks import lock_of_all
from ...torch_internals.tensor_identity import version_of
from ...torch_internals.transforms import is_wrapped
from .assemble import CallBuilder
from .axis_history import Atom, Origin
from .correspondence import Context, Correspondence
from .entries import Entries
from .operation import OperationKind
from .products import Product
from .score_side import Ingredients

# Of an argument or a result: a constant; the tensor of a slot; a new tensor, from outside or made by the operation,
# which has a slot from then on (Outside, Result); a list or tuple of these.
CONSTANT, SLOT, NEW, SEVERAL = range(4)
Pattern = tuple[int, Any]

_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)


class Unlearnable(Exception):
    """What ran can't be recognised again; the message says why. Never leaves the follower."""


class PartOfEarlier(Unlearnable):
    """A run can't be learned by itself, since it is part of an attention that began in the one before."""

    def __init__(self) -> None:
        super().__init__("part of an attention of which another part ran before")


class Outside(NamedTuple):
    """What is known of a tensor that comes from outside of a run.

    Attributes:
        slot: its slot.
        shape: its shape.
        dtype: its dtype.
        device: its device.
        stride: its strides.
        parameter: whether it is a parameter.
        origin: where its axes come from; None: nothing was known of them when it was first used.
        mark: what tells it from others that pieces were cut off; None: none was.
    """

    slot: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]
    parameter: bool
    origin: Origin | None
    mark: object | None


class Result(NamedTuple):
    """What is known of a tensor that an operation makes.

    Attributes:
        slot: its slot.
        shape: its shape.
        dtype: its dtype.
        stride: its strides.
        version: how often its memory had been written to, which an operation may do that is made of others.
    """

    slot: int
    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]
    version: int


class Slot(NamedTuple):
    """A slot, where it stands beside numbers."""

    number: int

    def of(self, x: Tensor) -> Tensor:
        """The tensor itself, as :meth:`View.of`."""
        return x


class View(NamedTuple):
    """A view of the tensor of a slot that no operation of the model made.

    Attributes:
        number: the slot.
        shape: of the view.
        stride: its strides.
        offset: where it begins, from the first entry of the tensor on.
    """

    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, x: Tensor) -> Tensor:
        """The view of the tensor of another run."""
        return x.as_strided(self.shape, self.stride, int(x.storage_offset()) + self.offset)


class Asked(NamedTuple):
    """Something that was decided by the values of tensors.

    Attributes:
        ask: the question.
        tensors: where the tensors are.
        answer: what was decided.
    """

    ask: Callable[..., Any]
    tensors: tuple[Slot | View, ...]
    answer: Any


class Made(NamedTuple):
    """An attention call that was complete after a step.

    Attributes:
        builder: brings its tensors into B H T S.
        slots: for each of :class:`~.assemble.Ingredients` the slots of its tensors.
        softmax: the number of the step in which the softmax ran; None: it does not count where.
        product: that of the step since which the operands must not have been written to.
        finite: likewise of the finite scores; None: there are none.
    """

    builder: CallBuilder
    slots: dict[str, Any]
    softmax: int | None
    product: int
    finite: int | None


class Told(NamedTuple):
    """Attention that was told of and not read, after a step."""

    reason: str


class End(NamedTuple):
    """What was there when a run ended.

    Attributes:
        known: the slots of tensors of which it is known since where their axes come from, and that.
        parts: the slots of tensors that were part of an attention, each with those of the tensors that its state holds.
        unclear: the slots of tensors that were gone, of which it was known where their axes come from.
        maps: what tells each learned map that was applied from others, and its slot.
        marks: the slots of tensors that pieces were cut off, and what tells these from others.
    """

    known: tuple[tuple[int, Origin], ...]
    parts: tuple[tuple[int, tuple[int, ...]], ...]
    unclear: tuple[int, ...]
    maps: dict[Any, int]
    marks: tuple[tuple[int, object], ...]


class Step:
    """One operation of a run.

    Attributes:
        func: the function.
        name: its name.
        kind: its row in the table of operations.
        args: the patterns of its arguments.
        kwargs: those of its keyword arguments.
        out: that of its result; tensors that it makes are :class:`Result`.
        number: how many steps are before it.
        next: the steps that came after it.
        drops: the slots that no operation after it needs.
        guards: of an operation that writes to memory: the slots that must not lie in it. None: it does not write.
        asked: what was decided by values.
        seen: what was seen of where its tensors lie.
        where: whether the path of the running module was asked for.
        watched: the slots of which it is noted how often they were written to.
        addresses: the slots of which it is noted where they lie, since a map is told from others by that.
        effects: the calls that were complete after it, and what else was told.
        end: what there was when a run ended after it; None: none did.
        hopeless: how many runs that begin with it could not be learned, since one was.
        reads: whether it reads an attribute (``x.mT``), whose function is another object each time.
        pairs: whether it takes something from outside of which it is known where its axes come from.
        fits: whether arguments fit it, by those, the tensors of a run and the run.
        extra: whether there is more to it than its operation; filled by :meth:`settle`.
        quick: whether there is no more to it, and it makes one tensor; filled by :meth:`settle`.
        waits: whether a softmax ran until then of which nothing came yet.
        follows: whether what comes after it is followed, and not learned.
    """

    __slots__ = (
        "addresses",
        "args",
        "asked",
        "drops",
        "effects",
        "end",
        "extra",
        "fits",
        "follows",
        "func",
        "guards",
        "hopeless",
        "kind",
        "kwargs",
        "name",
        "next",
        "number",
        "out",
        "pairs",
        "quick",
        "reads",
        "seen",
        "waits",
        "watched",
        "where",
    )

    def __init__(
        self,
        func: Any,
        name: str,
        kind: OperationKind,
        args: tuple[Pattern, ...],
        kwargs: dict[str, Pattern],
        out: Pattern,
        number: int,
    ):
        self.func, self.name, self.kind = func, name, kind
        self.args, self.kwargs, self.out, self.number = args, kwargs, out, number
        self.next: list[Step] = []
        self.drops: list[int] = []
        self.guards: tuple[int, ...] | None = None
        self.asked: tuple[Asked, ...] = ()
        self.seen: tuple[Any, ...] = ()
        self.where = False
        self.watched: list[int] = []
        self.addresses: list[int] = []
        self.effects: list[Made | Told] = []
        self.end: End | None = None
        self.hopeless = 0
        self.follows = False
        self.waits = False
        self.reads = type(func) is types.MethodWrapperType
        self.pairs = any(one.origin is not None or one.mark is not None for one in self.given())
        self.extra, self.quick = True, False
        self.fits = checker(self.args, self.kwargs)

    def settle(self) -> None:
        """The run that it is of was learned: see whether there is more to do than to run it."""
        more = self.asked, self.where, self.watched, self.addresses, self.effects, self.follows
        self.extra = self.guards is not None or any(more)
        self.quick = not (self.extra or self.pairs or self.reads) and self.out[0] == NEW

    def slots(self) -> set[int]:
        """Of all tensors that it takes or makes."""
        return {*slots_in((*self.args, *self.kwargs.values(), self.out))}

    def given(self) -> Iterator[Outside]:
        """What is known of the tensors from outside that it is the first to use."""
        return _new_in((*self.args, *self.kwargs.values()))

    def new(self) -> Iterator[Outside | Result]:
        """What is known of the tensors that have a slot since it: those, and what it makes, by their slots."""
        return _new_in((*self.args, *self.kwargs.values(), self.out))


class Beginning:
    """Where the runs of a kind begin.

    Attributes:
        first: their first steps.
        whole: whether something of one attention is used after another is complete, so that a run goes on.
    """

    __slots__ = ("first", "whole")

    def __init__(self) -> None:
        self.first: list[Step] = []
        self.whole = False


class Recipes:
    """What was learned of one model.

    Attributes:
        steps: how many there are.
        context: of a run and the one before it, nothing paired.
        user: what uses them; another trace of the same model goes without at the same time.
    """

    # A step of a hand-written model takes a kilobyte or two. A model whose lengths change with every forward (a
    # generation) has new ones each time, and forgets them all when there are so many.
    LIMIT = 20_000

    def __init__(self) -> None:
        self._user: weakref.ref[object] | None = None
        self.steps = 0
        self.context = Context(Correspondence())
        self._beginnings: dict[object, Beginning] = {}

    def taken_by(self, user: object) -> bool:
        """Take them into use, if nobody has; a user that is gone gives them back."""
        with _LOCK:
            other = None if self._user is None else self._user()
            if other is None:
                self._user = weakref.ref(user)
            return other is None or other is user

    def given_back_by(self, user: object) -> None:
        """The user has no use for them any more; can be called again."""
        with _LOCK:
            if self._user is not None and self._user() is user:
                self._user = None

    def forget(self) -> None:
        """Forget what was learned."""
        self._beginnings.clear()
        self.steps, self.context = 0, Context(Correspondence())

    def beginning(self, key: object) -> Beginning:
        """Where the runs of a kind begin, which ``key`` tells from others."""
        if self.steps > self.LIMIT:
            self.forget()
        found = self._beginnings.get(key)
        if found is None:
            found = self._beginnings[key] = Beginning()
        return found


_OF: weakref.WeakKeyDictionary[nn.Module, Recipes] = weakref.WeakKeyDictionary()
_LOCK = lock_of_all()


def recipes_of(model: nn.Module) -> Recipes | None:
    """What was learned of a model, forgotten with it; None: it can't be told from others."""
    try:
        with _LOCK:
            found = _OF.get(model)
            if found is None:
                found = _OF[model] = Recipes()
            return found
    except TypeError:  # a class with an equality of its own and no hash
        return None


# Patterns


def pattern_of(x: Any, slot_of: Callable[[Tensor], Pattern]) -> Pattern:
    """The pattern of an argument.

    Raises:
        Unlearnable: it is something that can't be compared.
    """
    if isinstance(x, Tensor):
        return slot_of(x)
    if type(x) in (list, tuple):
        inner = tuple(pattern_of(one, slot_of) for one in x)
        if all(code == CONSTANT for code, _ in inner):
            return CONSTANT, x if type(x) is tuple else list(x)
        return SEVERAL, (type(x), inner)
    if type(x) is slice:  # its bounds may be tensors of one number
        inner = tuple(pattern_of(one, slot_of) for one in bounds(x))
        return (CONSTANT, x) if all(code == CONSTANT for code, _ in inner) else (SEVERAL, (slice, inner))
    if isinstance(x, _CONSTANTS):
        return CONSTANT, x
    raise Unlearnable(f"an argument of type {type(x).__name__}")


def bounds(x: slice) -> tuple[Any, Any, Any]:
    """From where to where a slice goes, and its step."""
    return x.start, x.stop, x.step


class Meeting(Protocol):
    """A run, as far as it takes to see whether the arguments of an operation fit a step."""

    def holds(self, slot: int, x: Any) -> bool:
        """Whether a tensor is that of a slot that is held weakly."""

    def meets(self, want: Outside, x: Any) -> bool:
        """Whether a tensor from outside is alike to another; then it has the next slot."""


Checker = Callable[[Sequence[Any], dict[str, Any], Sequence[Any], Meeting], bool]

_TESTS = {
    CONSTANT: "({x} is {want} or same({x}, {want}))",
    SLOT: "(tensors[{want}] is {x} or run.holds({want}, {x}))",
    NEW: "run.meets({want}, {x})",
    SEVERAL: "several({want}, {x}, tensors, run)",
}


def checker(args: tuple[Pattern, ...], kwargs: dict[str, Pattern]) -> Checker:
    """What tells whether arguments fit patterns.

    Written out for each sequence of kinds of arguments, of which there are few: a loop over the patterns took three
    times as long, for every operation of a model.
    """
    return _checker_of(tuple(code for code, _ in args), tuple((name, code) for name, (code, _) in kwargs.items()))(
        same_constant, _several, *(want for _, want in (*args, *kwargs.values()))
    )


@functools.lru_cache(maxsize=512)
def _checker_of(args: tuple[int, ...], kwargs: tuple[tuple[str, int], ...]) -> Callable[..., Checker]:
    tests = [_TESTS[code].format(x=f"args[{i}]", want=f"w{i}") for i, code in enumerate(args)]
    for i, (name, code) in enumerate(kwargs, len(args)):
        tests.append(f"{name!r} in kwargs and {_TESTS[code].format(x=f'kwargs[{name!r}]', want=f'w{i}')}")
    counts = [f"len(args) == {len(args)}", f"len(kwargs) == {len(kwargs)}" if kwargs else "not kwargs"]
    wants = ", ".join(f"w{i}" for i in range(len(tests)))
    made: dict[str, Any] = {}
    exec(
        f"def make(same, several, {wants}):\n return lambda args, kwargs, tensors, run: {' and '.join(counts + tests)}",
        made,
    )
    return cast(Callable[..., Checker], made["make"])


def _several(want: tuple[type, tuple[Pattern, ...]], x: Any, tensors: Sequence[Any], run: Meeting) -> bool:
    """Whether a list or tuple fits its pattern.

    Not written out as arguments are: lists have as many lengths as there are, and each would be compiled.
    """
    cls, inner = want
    if type(x) is not cls:
        return False
    values = bounds(x) if type(x) is slice else cast(Sequence[Any], x)
    if len(values) != len(inner):
        return False
    for (code, wanted), one in zip(inner, values, strict=True):
        if code == CONSTANT:
            fits = one is wanted or same_constant(one, wanted)
        elif code == SLOT:
            fits = tensors[wanted] is one or run.holds(wanted, one)
        elif code == NEW:
            fits = run.meets(wanted, one)
        else:
            fits = _several(wanted, one, tensors, run)
        if not fits:
            return False
    return True


def same_constant(x: Any, want: Any) -> bool:
    """Whether an argument is a constant of a step; 1, 1.0 and True are three, and not a number is one."""
    if x is want:
        return True
    if type(x) is not type(want):
        return False
    if type(x) in (list, tuple):
        return len(x) == len(want) and all(map(same_constant, x, want))
    return bool(x == want or (x != x and want != want))


def outside_of(slot: int, x: Tensor, origin: Origin | None, mark: object | None) -> Outside:
    """What is known of a tensor that comes from outside.

    Raises:
        Unlearnable: it is no plain tensor.
    """
    _check_plain(x, Tensor, nn.Parameter)
    return Outside(slot, x.shape, x.dtype, x.device, x.stride(), type(x) is nn.Parameter, origin, mark)


def result_of(slot: int, x: Tensor) -> Result:
    """What is known of a tensor that an operation made.

    Raises:
        Unlearnable: it is no plain tensor.
    """
    _check_plain(x, Tensor)
    return Result(slot, x.shape, x.dtype, x.stride(), version_of(x))


def _check_plain(x: Tensor, *types: type[Tensor]) -> None:
    if type(x) not in types or x.layout is not torch.strided or x.is_nested or is_wrapped(x):
        raise Unlearnable("a tensor that is none of torch's own")


def _new_in(patterns: Iterable[Pattern]) -> Iterator[Any]:
    for code, want in patterns:
        if code == NEW:
            yield want
        elif code == SEVERAL:
            yield from _new_in(want[1])


def slots_in(patterns: Iterable[Pattern]) -> Iterator[int]:
    """The slots of all tensors."""
    for code, want in patterns:
        if code == SLOT:
            yield want
        elif code == NEW:
            yield want.slot
        elif code == SEVERAL:
            yield from slots_in(want[1])


# What a state holds


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """Every tensor that a state holds, in whatever it is made of."""
    seen: set[int] = set()
    waiting: list[Any] = [thing]
    while waiting:
        one = waiting.pop()
        if one is None or isinstance(one, (str, int, float, Origin, Atom, type, torch.dtype)) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, Product):
            waiting += one.a, one.b
        elif isinstance(one, Entries):
            waiting += one.make, one.of, one.source
        elif isinstance(one, functools.partial):
            waiting += one.func, one.args, one.keywords
        elif isinstance(one, types.FunctionType):
            waiting += [cell.cell_contents for cell in one.__closure__ or ()]
        elif is_dataclass(one):
            waiting += [getattr(one, f.name) for f in fields(one)]


def numbers_in(slots: dict[str, Any]) -> Iterator[int]:
    """The slots of all tensors of a call."""
    for x in slots.values():
        for one in x if type(x) is list else [x]:
            if type(one) in (Slot, View):
                yield one.number


def slots_of(given: Ingredients, slot: Callable[[Tensor], Slot | View]) -> dict[str, Any]:
    """For each ingredient of a call that there is the slots of its tensors; what is no tensor stays what it is.

    Raises:
        Unlearnable: one of them is no tensor of the run.
    """
    made = {f.name: _slots_of(getattr(given, f.name), slot) for f in fields(given) if f.name != "untouched"}
    return {name: x for name, x in made.items() if x is not None and x != []}


def _slots_of(x: Any, slot: Callable[[Tensor], Slot | View]) -> Any:
    if isinstance(x, Tensor):
        return slot(x)
    return [_slots_of(one, slot) for one in x] if isinstance(x, (list, tuple)) else x


def _tensors_of(x: Any, tensors: Sequence[Any]) -> Any:
    if type(x) in (Slot, View):
        return x.of(tensors[x.number])
    return [_tensors_of(one, tensors) for one in x] if type(x) is list else x


def filled(slots: dict[str, Any], tensors: Sequence[Any], untouched: bool, finite: bool) -> Ingredients:
    """The ingredients of a call, out of the tensors of a run.

    Args:
        slots: as :func:`slots_of` gave them.
        tensors: by slot.
        untouched: whether the operands were not written to since.
        finite: whether the finite scores were not.
    """
    made = Ingredients(untouched=untouched, **{name: _tensors_of(x, tensors) for name, x in slots.items()})
    if not finite:
        made.finite = None
    return made
