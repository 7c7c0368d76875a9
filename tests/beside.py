"""Following beside every replay: the same operations are followed by a second follower, and all of it is compared.

Following is the oracle: what a run that was recognised makes of an attention call, tells of, and says of where the axes
of its tensors come from has to be what following makes of it, bit for bit.

:func:`trace_beside` is what the generator, the sweep, the zoo and the tests of other libraries share: a model is traced
so often that what is learned of it is learned and used, and says what differed and how much was recognised.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.recording.session import Session
from hookattn.taps.eager.axis_history import Atom, Origin
from hookattn.taps.eager.correspondence import Correspondence
from hookattn.taps.eager.follower import Follower
from hookattn.taps.eager.learning import Lesson
from hookattn.taps.eager.recipe import _OF, Unlearnable
from hookattn.taps.eager.recogniser import Recogniser
from hookattn.taps.eager.replay import Run
from hookattn.torch_internals.transforms import is_wrapped, outside

# Of what was checked: operations that were recognised, calls that were made again, tensors whose axes were compared.
CHECKED: Counter[str] = Counter()
# Why runs could not be learned, and how many; "differs" where one went on otherwise than all that were learned.
UNLEARNED: Counter[str] = Counter()


class ReplayError(AssertionError):
    """A run that was recognised made something else than following does."""


class _Heard:
    """The running trace as a follower sees it, with what it is told kept."""

    def __init__(self, recorder: Any, passes: bool):
        self._recorder, self._passes = recorder, passes
        self.told: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def record(self, call: KernelCall) -> None:
        copy = KernelCall(**{f.name: getattr(call, f.name) for f in fields(KernelCall)})
        copy.notes = list(call.notes)
        self.told.append(copy)
        if self._passes:
            self._recorder.record(call)

    def skip(self, reason: str, path: str | None = None) -> None:
        self.told.append((reason, path))
        if self._passes:
            self._recorder.skip(reason, path)


class _Alike(Correspondence):
    """Which axis of one follower is which of the other's, where both followed the same tensors.

    So parameters are the same on both sides. What else made an axis is told by an address, which another tensor may
    have later, so that it is only counted.
    """

    def pair(self, learned: Origin, here: Origin) -> bool:
        known = self._origins.get(id(learned))
        if known is not None and known[1] is not here:  # one may have an object for two tensors where the other has two
            del self._origins[id(learned)]
        return super().pair(learned, here)

    def _pair_maps(self, one: frozenset[Any], other: frozenset[Any]) -> bool:
        named = ({m for m in maps if type(m) is int} for maps in (one, other))
        return len(one) == len(other) and next(named) == next(named)

    def _pair_beside(self, one: frozenset[Atom], other: frozenset[Atom]) -> bool:
        left = [a for a in one if a not in self._atoms]
        taken = {self._atoms[a] for a in one if a in self._atoms}
        right = [b for b in other if b not in taken]
        if not taken <= other or len(left) != len(right):
            return False
        return len(left) != 1 or self._pair_atoms(left[0], right[0])  # of several nothing tells which is which


class Checked(Recogniser):
    """A follower with another beside it, which never recognises anything."""

    def __init__(self, recorder: Any, kernels: Any):
        super().__init__(_Heard(recorder, True), kernels)  # type: ignore[arg-type]
        self.other = Follower(_Heard(recorder, False), {})  # type: ignore[arg-type]
        self.same_axes = _Alike()
        # By the identity of what a piece was cut off: that, and what the other follower says that it was cut off.
        self.wholes: dict[int, tuple[Any, Any]] = {}
        self._inner = False
        self.differed = False  # it was raised, and what is left is not compared
        self.excused: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = self.operations.get(func) or self.operation(func)
        if known[1] is not None:  # a kernel's tap, that tells by itself
            try:
                return super().__torch_function__(func, types, args, kwargs)
            finally:
                self.recorder.told.clear()  # type: ignore[attr-defined]
        if not known[0] or self._inner:
            return super().__torch_function__(func, types, args, kwargs)
        name, _, special, kind = known
        other, given = self.other, kwargs or {}
        other.model_runs = self.model_runs
        begun = other.before(name, func, args, given) if special or other.live else None
        replays = self.run is not None and self.run.lesson is None
        self._inner = True
        try:
            out = super().__torch_function__(func, types, args, kwargs)
        finally:
            self._inner = False
        CHECKED["recognised" if replays and self.run is not None and self.run.lesson is None else "followed"] += 1
        if begun is not None:
            other.after(begun, out)
        else:
            try:
                other.origins.note(kind, args, given, out)
                if kind.pairs:
                    other._pair(name, kind, args, given, out)
            except Exception as error:  # noqa: BLE001 - as the follower has it
                other.failed(name, error)
        self._compare(name)
        return out

    def seed(self, x: Tensor, roles: str) -> None:
        super().seed(x, roles)
        if not self._inner:
            self.other.origins.seed(x, roles)

    def same(self, x: Tensor, like: Tensor) -> None:
        super().same(x, like)
        self.other.same(x, like)

    def follow(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._inner:
            return super().follow(name, func, args, kwargs)
        begun = self.other.before(name, func, args, kwargs)
        out = super().follow(name, func, args, kwargs)
        self.other.after(begun, out)
        self._compare(name)
        return out

    def _give_up(self, run: Run, why: Unlearnable, steps: int | None = None) -> None:
        UNLEARNED[str(why)] += 1
        super()._give_up(run, why, steps)

    def _catch_up(self, run: Run) -> Lesson:
        UNLEARNED["differs"] += 1
        return super()._catch_up(run)

    def _end_run(self) -> None:
        run = self.run
        super()._end_run()
        end = run.path[-1].end if run is not None and run.path else None
        if run is not None and end is not None:  # what the other follower alone keeps alive
            self.excused += [weakref.ref(x) for slot in end.unclear if (x := run.tensor(slot)) is not None]
        if self.run is None and not self._inner:
            self._compare_axes()

    def failed(self, name: str, error: Exception) -> None:
        if isinstance(error, ReplayError):  # no fault of what is tested, which would say so and go on
            self.differed = True
            raise error
        super().failed(name, error)

    def flush(self) -> None:
        self.other.flush()
        super().flush()
        if not self.differed:
            self._compare("the end")

    def _compare(self, name: str) -> None:
        try:
            self._compare_told(name)
        except ReplayError:
            self.differed = True
            raise

    def _compare_told(self, name: str) -> None:
        mine, theirs = self.recorder.told, self.other.recorder.told  # type: ignore[attr-defined]
        if len(mine) != len(theirs):
            raise ReplayError(f"after {name}: {list(map(_short, mine))} in place of {list(map(_short, theirs))}")
        for one, other in zip(mine, theirs, strict=True):
            if not isinstance(one, KernelCall) or not isinstance(other, KernelCall):
                if one != other:
                    raise ReplayError(f"after {name}: {_short(one)} in place of {_short(other)}")
                continue
            CHECKED["calls"] += 1
            for f in fields(KernelCall):
                a, b = getattr(one, f.name), getattr(other, f.name)
                if f.name == "piece" and a is not None and b is not None:
                    if not self._same_whole(a.whole, b.whole):
                        raise ReplayError(f"after {name}: a piece of another attention than the one before it")
                    a, b = a[1:], b[1:]
                if f.name == "result_form" and a is not None and b is not None:  # by what they do
                    places = torch.arange(one.result.numel()).view(one.result.shape)  # type: ignore[union-attr]
                    a, b = (form(places.to(one.result.device)) for form in (a, b))  # type: ignore[union-attr]
                if not _same(a, b):
                    raise ReplayError(f"after {name}: {f.name} is {_short(a)} in place of {_short(b)}")
        mine.clear()
        theirs.clear()

    def _same_whole(self, mine: Any, theirs: Any) -> bool:
        """Whether two pieces are of one thing for this follower just where they are for the other."""
        known = self.wholes.setdefault(id(mine), (mine, theirs))
        return known[1] is theirs and self.wholes.setdefault(-id(theirs), (theirs, mine))[1] is mine

    def _compare_axes(self) -> None:
        """Of every tensor that is there: what is known of its axes, and how they lie to those of all others."""
        for ref, origin in list(self.other.origins._known.values()):
            x = ref()
            if x is None:
                continue
            found = self.origins.peek(x)
            if found is None and any(ref() is x for ref in self.excused):
                continue
            if found is None:
                raise ReplayError(f"nothing is known of the axes of a tensor {tuple(x.shape)}")
            if found.shape == x.shape == origin.shape and not self.same_axes.pair(found, origin):
                raise ReplayError(f"other axes of a tensor {tuple(x.shape)}: {found.full()} and {origin.full()}")
            CHECKED["axes"] += 1


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        with torch.no_grad(), outside():  # nothing that a checkpoint or a transform would see
            a, b = _plain(a), _plain(b)
            return a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a is b or a == b)


def _plain(x: Tensor) -> Tensor:
    """What a tensor of ``vmap`` stands for."""
    while is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _short(x: Any) -> str:
    if isinstance(x, KernelCall):
        return f"call {x.shape} at {x.path!r}"
    return f"tensor {tuple(x.shape)} {x.flatten()[:4].tolist()}" if isinstance(x, Tensor) else repr(x)


@contextmanager
def checked_replays() -> Iterator[Counter[str]]:
    """In the block every trace follows beside what it recognises; gives what was checked in it."""
    before, clear = Session.follower_class, Run.is_clear
    Session.follower_class = Checked
    Run.is_clear = lambda *_: True  # type: ignore[method-assign]  # what the other follower keeps alive does not count
    CHECKED.clear()
    UNLEARNED.clear()
    try:
        yield CHECKED
    finally:
        Session.follower_class, Run.is_clear = before, clear  # type: ignore[method-assign]


@dataclass
class Beside:
    """What came of tracing a model several times.

    Attributes:
        problem: what differed and in which trace; empty: nothing did.
        recognised: how many operations were recognised in the last trace.
        followed: how many were followed in the last trace.
        calls: how many calls were compared in all traces, made again or not.
        why: why runs could not be learned, or not be used, with how many.
    """

    problem: str = ""
    recognised: int = 0
    followed: int = 0
    calls: int = 0
    why: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Of the operations of the last trace the share that was recognised; 1 where there were none."""
        return self.recognised / max(1, self.recognised + self.followed) if self.recognised + self.followed else 1.0


# What is learned in the first trace may have to be learned otherwise in the second (a run that goes on where it was
# thought to end): from the third on it is as in all later ones.
TRACES = 3


def trace_beside(model: nn.Module, inputs: Callable[[], Any], times: int = TRACES, **options: Any) -> Beside:
    """Trace a model several times, and follow beside it.

    Afterwards it is traced as often as users do it, with nothing beside: the last of these traces has to be the first,
    in which all is followed since what was learned is forgotten before.

    Args:
        model: the model.
        inputs: makes what it is given, each time anew.
        times: how often.
        options: of :func:`hookattn.trace`.
    """
    forget(model)
    found = Beside()
    with checked_replays() as checked, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(1, times + 1):
            checked.clear()
            torch.manual_seed(3)
            try:
                hookattn.trace(model, inputs(), **options)
            except hookattn.NoAttentionError:
                pass
            except ReplayError as error:
                found.problem = f"trace {number}: {error}"
                break
            found.recognised, found.followed = checked["recognised"], checked["followed"]
            found.calls += checked["calls"]
        found.why = Counter(UNLEARNED)
    if not found.problem:
        found.problem = _alone(model, inputs, times, options)
    forget(model)
    return found


def forget(model: nn.Module) -> None:
    """Let the next trace of a model be as its first."""
    _OF.pop(model, None)


def _alone(model: nn.Module, inputs: Callable[[], Any], times: int, options: dict[str, Any]) -> str:
    """What differs between the first and the last of several traces."""
    forget(model)
    first: hookattn.Trace | None = None
    last: hookattn.Trace | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(times):
            torch.manual_seed(3)
            try:
                last = hookattn.trace(model, inputs(), **options)
            except hookattn.NoAttentionError:
                last = None
            first = last if first is None else first
        if first is None or last is None:
            return "" if first is last else f"trace 1 of them alone has {first} and the last has {last}"
        different = difference(first, last)
    return f"trace {times} of them alone: {different}" if different else ""


# What a call is beside its tensors.
_SCALARS = """site step tap dtype scale softcap causal window dropout heads kv_heads queries own_scores mixed notes keys
of_queries score normalizer basis entry""".split()


def difference(one: hookattn.Trace, other: hookattn.Trace) -> str:
    """Where two traces differ; empty: nowhere."""
    if one.skipped != other.skipped:
        return f"skipped is {other.skipped} in place of {one.skipped}"
    if len(one) != len(other):
        return f"{len(other)} calls in place of {len(one)}"
    for a, b in zip(one, other, strict=True):
        for name in _SCALARS:
            x, y = getattr(a, name), getattr(b, name)
            if not _same(x, y):
                return f"{name} of {a.site.label} is {_short(y)} in place of {_short(x)}"
        if set(a.fields) != set(b.fields) or set(a.derivable) != set(b.derivable):
            return f"fields of {a.site.label}: {sorted(b.fields)} in place of {sorted(a.fields)}"
        if a.certificate.status != b.certificate.status or a.certificate.basis != b.certificate.basis:
            return f"certificate of {a.site.label}: {b.certificate} in place of {a.certificate}"
        for name in dict.fromkeys((*a.fields, *a.derivable)):
            x, y = a.get(name), b.get(name)
            if not _same(x, y):
                return f"{name} of {a.site.label} is {_short(y)} in place of {_short(x)}"
    return ""
