"""The function mode of a trace: recognises what ran before, and follows and learns the rest.

While operations are those of a run that was learned (:mod:`.recipe`), nothing is followed: they are compared, and the
attention calls are made as they were made then (:mod:`.replay`). The first that is another ends that: all that ran is
followed from what is left of its tensors, and the model goes on being followed, and learned (:mod:`.learning`), from
there. So a recognised run and a followed one can't be told apart by what is recorded, and following is the oracle of
both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...attention.kernel_call import KernelCall
from ...errors import HookattnError
from ...torch_internals.isolation import no_gradients
from ...torch_internals.tensor_identity import storage_of, version_of
from ..active import current
from .assemble import CallBuilder
from .correspondence import Correspondence
from .decisions import DECISIONS
from .follower import Follower, Handler, Known, target_of, tensors_among
from .learning import Lesson
from .operations import writes_to
from .products import LayoutError
from .recipe import Beginning, Made, PartOfEarlier, Recipes, Step, Told, Unlearnable
from .replay import Run
from .states import SoftmaxUse
from .value_products import around

if TYPE_CHECKING:
    from ..base import ActiveTrace

_NONE: dict[str, Any] = {}
# Runs that begin alike and could so often not be learned are followed, and not tried again.
_TRIES = 2
_OVERWRITTEN = "what an operation overwrites is needed still"
_OTHERS = "a call that is not made of views of its tensors alone"


def seed(x: Tensor, roles: str) -> None:
    """Stands among the operations of a run for what somebody says of the axes of a tensor."""


class Recogniser(Follower):
    """A follower that need not follow what it has seen before.

    Attributes:
        trace: what it is the mode of: where another trace runs, or none, it does nothing.
        recipes: what was learned of the model; None: nothing is, and all is followed.
        run: the run that is recognised or learned; None: what happens is followed.
        past: while a run is followed afterwards, the run and the number of the step.
        parts: the tensors that are part of an attention of a run that is over, by identity, with the run and with the
            tensors that they are made of.
    """

    def __init__(self, recorder: ActiveTrace, kernels: dict[str, Handler]):
        super().__init__(recorder, kernels)
        self.trace = recorder
        self.recipes: Recipes | None = None
        self.run: Run | None = None
        self.past: tuple[Run, int] | None = None
        self.parts: dict[int, tuple[weakref.ref[Tensor], Run, Sequence[Tensor]]] = {}
        self._begins: Beginning | None = None
        self._several = self._complete = False
        self._before: Correspondence | None = None  # of the run before, if it was recognised
        # Of the operation that is learned: what came of it, whether the running module was asked for, and why it can't
        # be learned.
        self._happened: list[tuple[CallBuilder, SoftmaxUse | None] | str] = []
        self._asked_where = False
        self._unlearnable = ""
        # Of the operation that runs: whether it has run, its result, and the error that it raised itself.
        self._done = False
        self._out: Any = None
        self._theirs: BaseException | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if current() is not self.trace:  # another task of this thread, or a trace that was broken off
            return func(*args, **kwargs) if kwargs else func(*args)
        run = self.run
        theirs = False
        try:
            if run is None:
                return super().__torch_function__(func, types, args, kwargs)
            if not run.quick or (step := run.next[0]).func is not func:
                return self._in_run(run, func, args, kwargs or _NONE)
            # Most operations of a model that was seen before come here, where nothing is called but they themselves
            # and what compares their arguments.
            tensors = run.tensors
            count = len(tensors)
            try:
                fits = step.fits(args, kwargs or _NONE, tensors, run)
            except Exception as error:  # noqa: BLE001 - as in _guard
                self._broke(error)
                return super().__torch_function__(func, types, args, kwargs)
            if not fits:
                run.cut(count)
                return self._in_run(run, func, args, kwargs or _NONE)
            try:
                out = func(*args, **kwargs) if kwargs else func(*args)
            except BaseException:
                self._guard(self._raised, run)
                theirs = True
                raise
            want = step.out[1]
            if type(out) is Tensor and out.dtype is want.dtype and out.shape == want.shape:
                run.made(step, out)
                return out
            self._guard(self._ran_otherwise, run, step, func, args, kwargs or _NONE, out)
            return out
        except BaseException as error:
            # What is no Exception can have hit anything in here, between any two steps.
            theirs = theirs or self._theirs is error or run is None
            self._theirs = None
            if not theirs or not isinstance(error, Exception):
                self.forget()
            raise

    def forget(self) -> None:
        """What was being recognised or learned was broken off in its middle: nothing that was learned is used again."""
        self.run = self._begins = self.past = self._before = None
        if self.recipes is not None:
            self.recipes.forget()

    # From its beginning to its end

    def begin(self, key: object, several: bool) -> None:
        """A piece of the model begins, which may run as it did before.

        Args:
            key: tells pieces of this kind from others.
            several: whether it is cut into runs wherever a call is complete; else it is one.
        """
        self.end()
        if self.recipes is not None:
            self._begins, self._several = self.recipes.beginning(key), several
            self._new_run()

    def end(self) -> None:
        """It ends."""
        self._guard(self._end_run)
        self._begins = None

    def _new_run(self) -> None:
        if self._begins is not None and self.recipes is not None:
            self.run = Run(self.recipes, self._begins, self.origins, self._is_part, self._before)

    def _end_run(self) -> None:
        """The run ends here."""
        run, self.run = self.run, None
        if run is None or not run.path:
            return
        self._before = None
        end, lesson = run.path[-1].end, run.lesson
        if lesson is None and (end is None or not run.is_clear(end)):
            lesson = self._catch_up(run)
            self.run = None
        if lesson is not None:
            try:
                end = lesson.close(self.state)
            except Unlearnable as why:
                self._give_up(run, why)
                return
            run.learned()
            self._are_of(((x, ()) for slot, _ in end.parts if (x := run.tensor(slot)) is not None), run)
            return
        assert end is not None
        self._are_of(run.finish(end), run)
        self._before = run.here

    def leave_run(self) -> None:
        """Something is done that is no operation: what ran so far is followed, and what comes until the next run."""
        run = self.run
        if run is not None:
            if run.lesson is None:
                self._catch_up(run)
            self._give_up(run, Unlearnable("something that is no operation"))

    def flush(self) -> None:
        """As of any follower. Of a run that is not at its end, only a softmax that waits for its values is missed."""
        run, self.run, self._begins, self._before = self.run, None, None, None
        if run is not None and run.lesson is None and run.path and run.path[-1].waits:
            self._guard(self._follow_from_here, run)
        super().flush()
        self.parts.clear()

    def _guard(self, action: Callable[..., Any], *args: Any) -> None:
        """A fault in recognising is reported as attention not read, and what comes is followed; the model goes on."""
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours and not the model's
            self._broke(error)

    def _broke(self, error: Exception) -> None:
        self.forget()
        if isinstance(error, HookattnError):
            raise error
        self.failed("what ran before", error)

    # One operation of a run

    def _in_run(self, run: Run, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._done, self._theirs = False, None
        try:
            return self._operated(run, func, args, kwargs)
        except Exception as error:
            if self._theirs is error or isinstance(error, HookattnError):
                raise
            self._broke(error)
            return self._out if self._done else func(*args, **kwargs)
        finally:
            self._out = None

    def _operated(self, run: Run, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if run.lesson is None:
            step = run.expect(func, args, kwargs)
            if step is not None:
                if run.path or step.hopeless < _TRIES:
                    return self._again(run, step, func, args, kwargs)
                self.run = None
        known = self.operations.get(func) or self.operation(func)
        if not known[0]:
            return self._run(func, args, kwargs)
        if known[1] is not None:  # a kernel's tap, which may ask for anything: a run ends before it
            self._end_run()
            try:
                return self._run(known[1], (self, func, args, kwargs), _NONE)
            finally:
                self._new_run()
        if self.run is None:
            return self._run(self.watch, (known, func, args, kwargs), _NONE)
        return self._learn(run, run.lesson or self._catch_up(run), known, func, args, kwargs)

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run what is the model's, and tell its errors from ours."""
        try:
            self._out = func(*args, **kwargs)
        except BaseException as error:
            self._theirs = error
            raise
        self._done = True
        return self._out

    def _again(self, run: Run, step: Step, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """An operation that is expected: it is run, and nothing is followed."""
        target = None if step.guards is None else target_of(args, kwargs)
        if step.guards is not None:
            if self.parts:
                self._before_overwriting(target)
            if not run.spares(step, target):
                return self._otherwise(run, func, args, kwargs)
        try:
            out = self._run(func, args, kwargs)
        except BaseException:
            self._guard(self._raised, run)
            raise
        if step.guards is not None:
            run.wrote(step, target)
        if not run.advance(step, out):
            self._ran_otherwise(run, step, func, args, kwargs, out)
        else:
            if step.extra:
                self._happens(run, step)
            run.drop(step)
        return out

    def _ran_otherwise(
        self, run: Run, step: Step, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any
    ) -> None:
        """An operation ran as it was expected, and gave something else than ``step``, as with autocast."""
        other = run.other(step, func, args, kwargs, out)
        if other is None:
            # What it was given is as it was, but for what it may have written to, and that is nothing that is needed.
            self._otherwise(run, lambda *_, **__: out, args, kwargs, func)
        else:
            if other.extra:
                self._happens(run, other)
            run.drop(other)

    def _raised(self, run: Run) -> None:
        """An operation that was expected raised, as the model may do and go on."""
        run.back()
        self._follow_from_here(run)

    def _otherwise(self, run: Run, func: Any, args: Sequence[Any], kwargs: dict[str, Any], named: Any = None) -> Any:
        """An operation that is not what was expected after all; ``named``: the function that it is said to be."""
        named = func if named is None else named
        run.back()
        lesson = self._catch_up(run)
        known = self.operations.get(named) or self.operation(named)
        return self._learn(run, lesson, known, func, args, kwargs, named)

    def _happens(self, run: Run, step: Step) -> None:
        """What comes of a step that ran as it did before."""
        run.note(step)
        if step.where:
            run.wheres[step.number] = self.recorder.where()
        for effect in step.effects:
            if type(effect) is Told:
                self.recorder.skip(effect.reason)
            elif type(effect) is Made:
                self._make_again(run, effect)
        if step.follows:
            self._follow_from_here(run)
        elif step.effects and self._several and step.end is not None and not run.beginning.whole:
            self._end_run()
            self._new_run()

    def _make_again(self, run: Run, made: Made) -> None:
        """A call is complete that was made before, of other tensors."""
        self.interpreting = True
        try:
            with no_gradients(but=self.attached):
                call = made.builder.call(run.ingredients(made), self.shared)
        except LayoutError as error:
            self.recorder.skip(str(error))
            return
        finally:
            self.interpreting = False
        if call.piece is not None:
            call.piece = call.piece._replace(whole=run.here.mark(call.piece.whole))
        softmax = None if made.softmax is None else run.wheres[made.softmax]
        call.path = around(softmax, self.recorder.where())
        self.recorder.record(call)

    # What is new

    def watch(self, known: Known, func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> Any:
        """Run an operation and follow it."""
        if func is seed:
            self.origins.seed(*args)
            return None
        if self.parts:
            self._guard(self._restore, tensors_among(args, kwargs or _NONE))
            if writes_to(known[0], args, kwargs or _NONE):
                self._guard(self._before_overwriting, target_of(args, kwargs or _NONE))
        out = super().watch(known, func, args, kwargs)
        if self._complete and self.run is None:  # what could not be learned is over
            self._new_run()
        self._complete = False
        return out

    def operation(self, func: Any) -> Known:
        """What is known of a function, looked up once."""
        known = super().operation(func)
        if func is seed:
            known = self.operations[func] = "seed", *known[1:]
        return known

    def _learn(
        self,
        run: Run,
        lesson: Lesson,
        known: Known,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        named: Any = None,
    ) -> Any:
        """Run an operation, follow it and learn it; ``named``: the function that it is said to be."""
        name, _, _, kind = known
        self._happened, self._asked_where, self._unlearnable = [], False, ""
        try:
            patterns = lesson.describe(args, kwargs)
        except Unlearnable as why:
            self._give_up(run, why)
            return self._run(self.watch, (known, func, args, kwargs), _NONE)
        steps, noted, seen = len(run.path), list[Any](), list[Any]()
        DECISIONS.noted, DECISIONS.seen = noted, seen
        count = len(self.uses)
        try:
            out = self._run(self.watch, (known, func, args, kwargs), _NONE)
        except BaseException:
            self._give_up(run, Unlearnable("an error of the model"))
            raise
        finally:
            DECISIONS.noted = DECISIONS.seen = None
        if self.run is not run:
            return out
        try:
            if self._unlearnable:
                raise Unlearnable(self._unlearnable)
            written = target_of(args, kwargs) if writes_to(name, args, kwargs) else None
            step = lesson.append(
                func if named is None else named, name, kind, patterns, out, noted, seen, self._asked_where, written
            )
            self._see(lesson, step, args, kwargs, out, count)
            lesson.effects(step, self._happened)
        except Unlearnable as why:
            self._give_up(run, why, steps)
            return out
        if self._several and self._happened and not run.beginning.whole and not lesson.waits():
            self._end_run()
            self._new_run()
        return out

    def _see(
        self, lesson: Lesson, step: Step, args: Sequence[Any], kwargs: dict[str, Any], out: Any, uses: int
    ) -> None:
        """Note what following made of the tensors of a step; ``uses``: how many softmaxes ran before it."""
        tensors = list(tensors_among((*args, out), kwargs))
        live = [x for ref, _ in self.live.values() if (x := ref()) is not None]
        lesson.seen(step, tensors, live, self.state, self.uses[uses:])

    def _give_up(self, run: Run, why: Unlearnable, steps: int | None = None) -> None:
        """What runs here can't be learned: it is followed, to where the next run begins.

        Args:
            run: the run.
            why: what is in the way.
            steps: so many steps are learned all the same; None: those that there are.
        """
        if run.lesson is not None:
            run.lesson.give_up(len(run.path) if steps is None else steps)
        run.learned()
        if isinstance(why, PartOfEarlier):
            run.beginning.whole = True
        if self.run is run:
            self.run = None

    # What ran, followed afterwards

    def _follow_from_here(self, run: Run) -> None:
        """Follow what a run did so far and what comes after, to where the next run begins."""
        self._catch_up(run)
        run.learned()
        self.run = None

    def _catch_up(self, run: Run) -> Lesson:
        """Follow all that a run did so far, as if it had been followed from the start."""
        self.run = None  # whatever is asked meanwhile is asked of what is followed
        touched = run.touched()
        lesson = run.recall()
        for step, args, kwargs, out in run.past():
            self.past = run, step.number
            DECISIONS.answers, DECISIONS.sights = [asked.answer for asked in step.asked], run.sights(step)
            count = len(self.uses)
            try:
                if step.func is seed:
                    self.origins.seed(*args)
                else:
                    DECISIONS.since = partial(_writes_since, run, touched, step.number)
                    begun = self.before(step.name, step.func, args, kwargs)
                    DECISIONS.since = partial(_writes_since, run, touched, step.number + 1)
                    self.after(begun, out)
                self._see(lesson, step, args, kwargs, out, count)
            finally:
                self.past = DECISIONS.answers = DECISIONS.sights = DECISIONS.since = None
        run.let_go()
        self.run = run
        return lesson

    def _are_of(self, tensors: Iterable[tuple[Tensor, Sequence[Tensor]]], run: Run) -> None:
        """Tensors are part of an attention of a run that is over: it is kept for as long as one of them.

        Args:
            tensors: each with those that what it is is made of, which are kept for as long as it.
            run: the run.
        """
        parts = self.parts
        for x, made_of in tensors:

            def gone(ref: Any, key: int = id(x)) -> None:
                entry = parts.get(key)
                if entry is not None and entry[0] is ref:
                    del parts[key]

            parts[id(x)] = weakref.ref(x, gone), run, made_of

    def _is_part(self, x: Tensor) -> bool:
        """Whether a tensor is part of an attention of an earlier run."""
        known = self.parts.get(id(x)) or self.live.get(id(x))
        return known is not None and known[0]() is x

    def _restore(self, tensors: Iterable[Tensor]) -> None:
        """Follow the runs that are over and of whose attention a tensor is part, before something is done with it."""
        for x in tensors:
            known = self.parts.get(id(x))
            if known is not None and known[0]() is x:
                self._follow_past(known[1])

    def _before_overwriting(self, target: Any) -> None:
        """Memory is about to be written to: follow the runs that are over and that need what is in it still."""
        if isinstance(target, Tensor):
            storage = storage_of(target)
            needing = [run for _, run, made_of in self.parts.values() if any(storage_of(x) == storage for x in made_of)]
            for run in needing:
                self._follow_past(run)

    def _follow_past(self, run: Run) -> None:
        held = [self.parts.pop(key) for key in [key for key, one in self.parts.items() if one[1] is run]]
        if held and not run.followed:
            now = self.run
            self._follow_from_here(run)
            self.run = now

    # What following tells, and asks

    def where(self) -> str | None:
        """The path of the module that is running; of an operation that is followed afterwards, that ran then."""
        if self.past is not None:
            run, number = self.past
            return run.wheres[number] if number in run.wheres else self.recorder.where()
        self._asked_where = True
        return self.recorder.where()

    def tell(self, reason: str, path: str | None = None, changed: bool = False) -> None:
        """As of any follower; what is followed afterwards has told it when it ran."""
        if self.past is not None:
            return
        if self.run is not None:
            self._happened.append(reason)
        if path is not None:
            self._unlearnable = "what is told of another module than the one that runs"
        super().tell(reason, path, changed)

    def failed(self, name: str, error: Exception) -> None:
        """As of any follower; what went wrong once may not go wrong again."""
        self._unlearnable = "a fault in following it"
        super().failed(name, error)

    def made(self, call: KernelCall, builder: CallBuilder | None, use: SoftmaxUse | None) -> None:
        """Likewise."""
        if self.past is not None:
            return
        if builder is None:
            self._unlearnable = _OTHERS
        elif self.run is not None:
            self._happened.append((builder, use))
        self._complete = self._several
        super().made(call, builder, use)

    def keeps(self) -> None:
        """What is copied is none of the model's tensors, by which alone a call can be made again."""
        self._unlearnable = _OVERWRITTEN

    def seed(self, x: Tensor, roles: str) -> None:
        """As of any follower."""
        run = self.run
        if run is None:
            super().seed(x, roles)
        else:
            self._in_run(run, seed, (x, roles), _NONE)

    def followed(self, tensors: Iterable[Tensor]) -> bool:
        """As of any follower; what is recognised has no states, and is followed before they are asked for."""
        run = self.run
        if run is not None and run.lesson is None and any(run.has(x) for x in tensors):
            self._catch_up(run)
        return super().followed(tensors)

    def same(self, x: Tensor, like: Tensor) -> None:
        """As of any follower."""
        self.leave_run()
        super().same(x, like)


def _writes_since(run: Run, touched: frozenset[int], number: int, x: Tensor) -> int:
    """How often a tensor was written to from the step of a number on: by steps, and by what nobody saw."""
    if x.is_meta:  # it stands for one that is gone, and its memory may be where that of another was
        return 0
    if id(x) not in touched:
        return run.writes_since(number, x)
    noted = run.version_at(number - 1, x)
    return run.writes_since(number, x) + 1 if noted is None else version_of(x) - noted
