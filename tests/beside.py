"""Following beside every replay: the same operations are followed by a second follower, and all of it is compared.

Following is the oracle: what a run that was recognised makes of an attention call, tells of, and says of where the axes
of its tensors come from has to be what following makes of it, bit for bit.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hookattn.attention.kernel_call import KernelCall
from hookattn.recording.session import Session
from hookattn.taps.eager.correspondence import Correspondence
from hookattn.taps.eager.follower import Follower
from hookattn.taps.eager.recogniser import Recogniser
from hookattn.taps.eager.replay import Run
from hookattn.torch_internals.transforms import is_wrapped, outside

# Of what was checked: operations that were recognised, calls that were made again, tensors whose axes were compared.
CHECKED: Counter[str] = Counter()


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


class Checked(Recogniser):
    """A follower with another beside it, which never recognises anything."""

    def __init__(self, recorder: Any, kernels: Any):
        super().__init__(_Heard(recorder, True), kernels)  # type: ignore[arg-type]
        self.other = Follower(_Heard(recorder, False), {})  # type: ignore[arg-type]
        self.same_axes = Correspondence()
        self._inner = False
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

    def _end_run(self) -> None:
        run = self.run
        super()._end_run()
        end = run.path[-1].end if run is not None and run.path else None
        if run is not None and end is not None:  # what the other follower alone keeps alive
            self.excused += [weakref.ref(x) for slot in end.unclear if (x := run.tensor(slot)) is not None]
        if self.run is None and not self._inner:
            self._compare_axes()

    def flush(self) -> None:
        self.other.flush()
        super().flush()
        self._compare("the end")

    def _compare(self, name: str) -> None:
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
                    a, b = a[1:], b[1:]
                if not _same(a, b):
                    raise ReplayError(f"after {name}: {f.name} is {_short(a)} in place of {_short(b)}")
        mine.clear()
        theirs.clear()

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
    try:
        yield CHECKED
    finally:
        Session.follower_class, Run.is_clear = before, clear  # type: ignore[method-assign]
