"""One running trace: what is attached to a model while it runs, and what becomes of each kernel call that is seen.

The taps see kernels and tell the :class:`Session` of the thread (:func:`hookattn.taps.active.current`); it finds the
site of each call, asks the selection, and lets a :class:`Recorder` make a :class:`~hookattn.calls.call.Call` of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from ..attention.kernel_call import KernelCall
from ..cached import cached_property
from ..calls.call import Call, Skipped
from ..calls.layer_counts import LayerCounts
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..errors import ModelError, NoAttentionError, SelectionError, UnfaithfulError
from ..models.discovery import WatchPlan, check_meta
from ..models.module_hooks import ModuleHooks
from ..models.running_numbers import RunningNumbers
from ..models.unread import unread_sites
from ..taps import kernels, mode_patches, patches
from ..taps.active import current, set_current
from ..taps.base import ActiveTrace, Change, SecondRun
from ..taps.eager import decisions
from ..taps.eager.recipe import recipes_of
from ..taps.eager.recogniser import Recogniser
from ..torch_internals.code_patching import install, remove
from ..torch_internals.dispatch_modes import tree_leaves
from ..torch_internals.frames import in_rehearsal
from ..torch_internals.function_modes import ModeStack, open_modes
from ..torch_internals.function_modes import close as close_mode
from ..torch_internals.isolation import in_backward
from ..torch_internals.transforms import outside, stands_for_others
from ..torch_internals.undo import mark, undo_since
from . import live
from .kinds import SiteKinds
from .layouts import Layouts
from .mapped import examples_as_batch
from .nothing_seen import nothing_seen
from .pieces import Pieces
from .recorder import CallRecorder
from .room_check import Forward, RoomCheck, is_large
from .second_run import RunAgain
from .selection import Selection
from .steps import Steps

Sink = Callable[[Call], None]

_CHANGED = ("q", "k", "v", "bias", "mask")  # what a Change has of a kernel's arguments
# How often what was hit by an exception as it detached is begun again.
_TRIES = 3
_HEALED = (
    "an earlier trace of this thread was broken off as it ended; what it had left was put back before this one began"
)
_REPLICA = (
    "it ran in copies of the model, one a device, in threads of their own (torch.nn.DataParallel), and a trace is of "
    "one thread; trace the module that DataParallel holds, on one device"
)
_TRANSFORMED = (
    "it runs inside torch.func.functionalize, where tensors are plans that are gone when it ends; call the module "
    "itself"
)


class Recorder(Protocol):
    """Makes Calls of the kernel calls that a trace sees.

    A Call is in the trace, and with the user, from :meth:`keep` on. Who may write to it afterwards: its recorder, up to
    the end of :meth:`complete` (what ``fields`` have later, in place of it), and ``certificate`` ever after; a sink
    that it was handed to by :meth:`deliver` (``fields``, which are in a file then); the session (``entry`` as it is
    kept, ``index`` as it finishes).
    """

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""

    def forget(self) -> None:
        """A new forward begins: nothing is shared with the one before."""

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call | None:
        """What is kept of one call; None: nothing is."""

    def deliver(self, call: Call, sink: Sink) -> None:
        """Hand a kept call over to where it is stored."""

    def complete(self, calls: Sequence[Call]) -> None:
        """Finish what waits until the model has run: afterwards the calls are complete."""

    def drop(self) -> None:
        """Let go of what waits; after :meth:`complete` that is nothing, and else the block raised."""


class Holder(Protocol):
    """Copies the tensors of calls while the model runs, so that the rest can wait until its forward ends."""

    def hold(self, call: KernelCall) -> bool:
        """Put copies in the place of a call's tensors, if nothing more has to be done now; False: it has to be kept."""

    def keep_held(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        """What :meth:`Recorder.keep` makes of a call that is held."""


class Listener(Protocol):
    """Is asked before a kernel runs and told after it, and may change what it is given and what the model gets."""

    def before(self, call: KernelCall, site: Site, step: int, changeable: frozenset[str]) -> Change | None:
        """What the kernel shall get in place of its own arguments; None: nothing.

        Args:
            call: its arguments as they will be recorded; ``output`` is None.
            site: where it runs.
            step: in which forward of the trace.
            changeable: the fields of a :class:`~hookattn.taps.base.Change` that can be handed to this kernel.
        """

    def formed(self, call: KernelCall, site: Site, step: int) -> Tensor | None:
        """What shall take the place of the weights that the model has formed, B H T S; None: nothing."""

    def after(self, call: KernelCall, site: Site, step: int) -> Tensor | None:
        """What the model shall get in place of the kernel's ``call.output``, B H T E; None: nothing."""

    def missed(self, site: Site, step: int, reason: str) -> None:
        """A kernel ran without :meth:`before`; whoever wanted to change it raises here, before the model goes on."""


class Session:
    """A trace while it runs, in the thread that started it.

    Args:
        plan: what is traced, and how.
        trace: gets the calls.
        selection: what is kept of each.
        recorder: makes the calls.
        strict: raise at the first unfaithful call that is read back, rather than warn.
        sink: takes each finished call (a file); None: they stay in memory.
        room: looks whether there is room for large calls; None: nobody does.
        shapes_only: whether tensors have shapes and no values: a plan.
        listener: changes what kernels are given and give; None: nobody does.
        layouts: what the caller says of axes; None: nothing.
        holder: the recorder, where it can hold calls; None: each is kept as soon as it is seen.
        gradients: whether the gradients of outputs are asked for.
        attached: whether what is recorded stays in the model's graph.

    Attributes:
        heard: kernels that have reported themselves, those of other models in the same thread included. A tap that runs
            another's kernel compares it before and after: the kernel inside may be any, and a count is the one trace
            that all of them leave.
        listened: whether there is a listener.
        glanced, gradients, attached: see :class:`~hookattn.taps.base.ActiveTrace`.
        thread: that it runs in; 0: it is attached to nothing, since it has not begun or has ended.
        ending: it has begun to end, and may have been broken off as it did.
        follower_class: of the function mode.
    """

    follower_class: ClassVar[type[Recogniser]] = Recogniser
    # Of the class, too: a trace that has ended has nothing of its own any more, and is asked for these.
    thread: int = 0
    ending: bool = False

    def __init__(
        self,
        plan: WatchPlan,
        trace: TraceData,
        selection: Selection,
        recorder: Recorder,
        strict: bool,
        sink: Sink | None = None,
        room: RoomCheck | None = None,
        shapes_only: bool = False,
        listener: Listener | None = None,
        layouts: Layouts | None = None,
        holder: Holder | None = None,
        gradients: bool = False,
        attached: bool = False,
    ):
        self.plan, self.trace, self.selection = plan, trace, selection
        self.heard, self.shapes_only, self.listened = 0, shapes_only, listener is not None
        self.gradients, self.attached = gradients, attached
        self._layouts = layouts
        self._recorder, self._strict, self._sink, self._room, self._listener = recorder, strict, sink, room, listener
        self._modes = ModeStack(self._make_mode)
        self._modules_run: dict[int, nn.Module] = {}  # by identity, those at sites or that sound like attention
        self._hooks = ModuleHooks(
            self.plan,
            self._enter_site,
            self._leave_site,
            self._model_begins,
            self._model_ends,
            self._modules_run,
            self._in_replica,
            self._watches,
        )
        self._model_runs = False  # whether the model's own forward does
        self._held: list[KernelCall] = []  # what this forward has computed and is not among the calls yet
        may_hold = listener is None and selection.layers is None and self._hooks.tells_end
        self._holder = holder if may_hold else None
        self._steps = Steps(plan, recorder.forget, self._hooks.tells_end)
        self._seen_paths: set[str] = set()  # of sites where a call was recorded or skipped
        self._compiled_run: set[str] = set()  # what ran that dispatches to no function mode
        self._own_kernels = 0  # of the kernels heard, those of this model
        self._step_again: int | None = None  # where a backward pass runs a part again: the step of its first run
        self._error_before: BaseException | None = None  # that was being handled as it started
        self._asked = False  # the kernel that will report itself next has asked whether it is to be changed
        self._layers_found: set[int] = set()  # of the selected layers, those that are there
        self._numbering = RunningNumbers(lambda: plan.unwrapped.root)
        self._kinds, self._pieces = SiteKinds(), Pieces()
        self._layer_counts = LayerCounts()  # of all that ran, those that were not selected too
        self._entered: list[tuple[Site, bool]] = []  # the sites that run, and whether each opened the mode
        self._skipped: dict[tuple[str, str], set[int]] = {}  # path and reason -> steps
        self.glanced: tuple[nn.Module, Tensor, Tensor, Tensor] | None = None
        self._mark = 0

    # From its start to its end

    def start(self) -> None:
        """Attach everything, after what an earlier trace of this thread may have left was detached.

        Raises:
            ModelError: a trace already runs here.
        """
        if live.heal():
            self.note(_HEALED)
        if current() is not None:
            raise ModelError("a trace is already running in this thread; finish it before starting another.")
        if not live.of_this_thread():
            # Nobody is in the middle of anything here, so what is written down still was broken off.
            undo_since(0)
            decisions.forget()
            for mode in open_modes():
                if isinstance(mode, Recogniser):  # another thread has ended its trace, and can't reach this one's stack
                    close_mode(mode)
        self._mark, self._error_before = mark(), sys.exception()
        try:
            # Each of these writes down what it is about to attach before it does, so that it can be detached wherever
            # this is broken off. What is attached asks whose trace runs in its thread, and does nothing in others.
            live.attaches(self)
            self.thread = get_ident()
            set_current(self)
            install(patches(), self)
            self._hooks.install()
            if self.plan.watch_all:
                self._modes.push()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Detach everything, whatever state the forward left it in. It can be broken off and called again.

        An exception that hits it as it runs (an interrupt, say) is raised when all is detached.
        """
        if not self.thread:
            return
        self.ending = True
        broken: BaseException | None = None
        for _ in range(_TRIES):
            try:
                self._detach()
                break
            except BaseException as error:  # noqa: BLE001 - raised below
                broken = broken or error
        if broken is not None:
            raise broken
        if "_follower" in vars(self):  # else the cached property would make one
            follower = self._follower
            try:
                follower.flush()  # attention that it has seen and that nobody has used says so now
            finally:
                if follower.recipes is not None:
                    follower.recipes.given_back_by(follower)
                    follower.recipes = None
        self._take_held()  # of a forward that was broken off

    def _detach(self) -> None:
        """Every step of it may be done again."""
        if self.thread == get_ident():  # else a garbage collection ends it in another thread, where its mode is not
            undo_since(self._mark)
            self._modes.close()
        self._hooks.remove()
        remove(self)
        self._entered.clear()
        if current() is self:
            set_current(None)
        live.detached(self)
        self.thread = 0

    def close(self) -> None:
        """Detach everything, and let go of the trace: its tensors shall not wait for a garbage collection.

        It can be broken off and called again.
        """
        self.stop()
        if "_recorder" in vars(self):
            self._recorder.drop()
        # The session, its hooks, its mode and its follower know each other; without this the circle would hold the
        # trace, which may be most of the memory there is.
        vars(self).clear()

    # How a kernel is run

    @cached_property
    def _follower(self) -> Recogniser:
        """The function mode, made when it is first needed: of many traces never."""
        made = self.follower_class(self, kernels())
        made.trace, made.model_runs = self, self._model_runs
        followed = self.shapes_only or self.listened or self._layouts is not None
        recipes = None if followed else recipes_of(self.plan.model)
        if recipes is not None and not self._adapter_layouts and recipes.taken_by(made):
            made.recipes = recipes
        return made

    def _make_mode(self) -> Recogniser:
        """The function mode as it is opened for the first time, and what is exchanged for its sake: of many traces
        nothing (0.6 % of a toy)."""
        install(mode_patches(), self)
        return self._follower

    @property
    def compiling(self) -> bool:
        """Whether compiled code shall run compiled."""
        return self._modes.compiling > 0

    def watching(self) -> bool:
        """Whether the function mode is open."""
        return self._modes.open()

    def aside(self) -> AbstractContextManager[None]:
        """Without the function mode: for kernels that must not see it."""
        return self._modes.aside()

    @contextmanager
    def kernel(self, sealed: bool) -> Iterator[Callable[[], bool]]:
        """Around one kernel; yields a function that tells whether a tap saw it."""
        before = self.heard
        with self._modes.sealed() if sealed else self._modes.opened():
            yield lambda: self.heard > before

    def follow(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operation that dispatches to no function mode as if it had."""
        self._compiled_run.add(name)
        self._follower.leave_run()
        return self._follower.follow(name, func, args, kwargs)

    def followed(self, values: Any) -> bool:
        """Whether a tensor among these is part of an attention."""
        return self._follower.followed([x for x in tree_leaves(values) if isinstance(x, Tensor)])

    def same(self, x: Tensor, like: Tensor) -> None:
        """Say that a tensor is what another is, whose values it has."""
        self._follower.same(x, like)

    @property
    def interpreting(self) -> bool:
        """Whether the follower looks at what the model did right now; False: the model itself is at work."""
        return "_follower" in vars(self) and self._follower.interpreting

    def seed(self, x: Tensor, roles: str) -> None:
        """Say what the axes of a tensor are."""
        self._follower.seed(x, roles)

    # Where we are

    def _watches(self) -> bool:
        """Whether this is the traced thread, and not in a backward pass, which runs checkpointed parts again.

        Who listens is asked there, too: the gradients are of what the first run was given.
        """
        return current() is self and (self.listened or not in_backward())

    def _in_replica(self) -> None:
        """A part of the model runs as a copy, in another thread: its calls are not seen, which has to be said."""
        self._skipped.setdefault(("", _REPLICA), set()).add(max(self._steps.number, 0))

    def _model_begins(self) -> None:
        if in_backward() or in_rehearsal():  # the whole model is checkpointed, or a stage learns shapes
            return
        self._take_held()
        self._tell_follower(True)
        if self._steps.model_begins():
            self._entered.clear()
            if self.plan.watch_all:
                self._follower.begin((type(self.plan.model), self.wants("scores")), several=True)

    def _model_ends(self) -> None:
        if in_backward() or in_rehearsal():
            return
        self._take_held()
        if self.plan.watch_all:
            self._follower.end()
        self._tell_follower(False)
        self._steps.model_ends()

    def _tell_follower(self, model_runs: bool) -> None:
        self._model_runs = model_runs
        if "_follower" in vars(self):  # else it is told when it is made
            self._follower.model_runs = model_runs

    def step(self) -> AbstractContextManager[int]:
        """What runs in the block is one step; gives its number."""
        return self._steps.together()

    def again(self, function: Callable[..., Any]) -> SecondRun:
        """A function whose later runs, in a backward pass, are given the changes of its first."""
        plan, selection, layouts, listener = self.plan, self.selection, self._layouts, self._listener
        numbering, kinds = self._numbering, self._kinds

        @contextmanager
        def attached(step: int) -> Iterator[None]:
            recorder = CallRecorder(selection, "off", warns=False)
            made = type(self)(plan, TraceData(), selection, recorder, False, listener=listener, layouts=layouts)
            made._numbering, made._kinds, made._step_again = numbering, kinds, step
            try:
                made.start()
                yield
            finally:
                made.close()

        return RunAgain(function, lambda: max(self._steps.number, 0), attached)

    def _enter_site(self, module: nn.Module) -> None:
        self._modules_run[id(module)] = module
        # A site inside another must not open the mode a second time, or each operation would be seen twice; and only
        # the one that opened it may close it. So the answer is kept with the site.
        opened = not self._modes.open()
        if opened:
            self._modes.push()
            self._follower.begin((type(module), self.wants("scores")), several=False)
        site = self.plan.sites.get(id(module)) or self._hooks.site(self.plan.paths[id(module)])
        self._entered.append((site, opened))

    def _leave_site(self) -> None:
        if self._entered:
            _, opened = self._entered.pop()
            # With another mode on top, the module left one open: closing "the innermost" would take that one.
            if opened:
                self._follower.end()
                if self._modes.on_top():
                    self._modes.pop()

    def where(self) -> str | None:
        """The path of the site that is running, or else of the innermost module; None outside the model."""
        return self._entered[-1][0].path if self._entered and not self.plan.watch_all else self._hooks.running()

    def _site(self, call: KernelCall) -> Site | None:
        known = self.plan.sites.get(id(call.module))
        if known is not None:
            return known
        if self._entered and not self.plan.watch_all:
            return self._entered[-1][0]
        running = self._hooks.running() if call.path is None else call.path
        if running is None:
            return None
        return self._hooks.site(".".join(x for x in (running, call.within) if x))

    # What the taps report

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return self._recorder.wants(field)

    def layout_for(self, path: str) -> str | None:
        """What the caller, or else the adapter, says of the axes of q in the module at a path."""
        said = None if self._layouts is None else self._layouts.of(path)
        return self._adapter_layouts.get(path) if said is None else said

    @cached_property
    def _adapter_layouts(self) -> dict[str, str]:
        """Path -> the axes of q, of the sites whose adapter says it."""
        plan = self.plan
        return {
            plan.sites[key].path: letters
            for key, adapter in plan.named.items()
            if (letters := adapter.layout.get(type(plan.modules[key]).__name__)) is not None
        }

    def before(self, call: KernelCall, changeable: frozenset[str]) -> Change | None:
        """Ask the listener; a kernel of another model in the same thread is none of its business."""
        place = self._asks(call)
        if place is None or self._listener is None:
            return None
        site = place[0]
        change = self._listener.before(call, *place, changeable)
        for name in _CHANGED if change is not None else ():
            if getattr(change, name) is not None and name not in changeable:
                raise ModelError(
                    f"{site.label}: a changed {name} cannot be handed to its kernel (tap {call.tap}); what can be is "
                    f"{', '.join(sorted(changeable)) or 'nothing'}."
                )
        return change

    def formed(self, call: KernelCall) -> Tensor | None:
        """Ask the listener about weights."""
        place = self._asks(call, of_kernel=False)
        return None if place is None or self._listener is None else self._listener.formed(call, *place)

    def after(self, call: KernelCall) -> Tensor | None:
        """Tell the listener."""
        place = self._asks(call)
        instead = None if place is None or self._listener is None else self._listener.after(call, *place)
        if instead is not None and self.gradients:
            call.result, call.result_form = instead, None  # which the model goes on with
        return instead

    def _asks(self, call: KernelCall, of_kernel: bool = True) -> tuple[Site, int] | None:
        """Where a kernel runs that somebody may be asked about, and in which step; None: nobody is.

        Args:
            call: of the kernel.
            of_kernel: whether it is recorded next, or said why not: weights may meet values later, or never.
        """
        if in_rehearsal():
            return None
        tensor = call.weights if call.q is None else call.q
        if tensor is not None and stands_for_others(tensor):  # what is recorded of it is laid out otherwise
            return None
        if of_kernel and not in_backward():  # there nothing is recorded, which would take this back
            self._asked = True
        return self._place(call)

    def _place(self, call: KernelCall) -> tuple[Site, int] | None:
        """Where a kernel runs, as it will be recorded, and in which step; None: in another model."""
        site = self._site(call)
        if site is None:
            return None
        if in_backward():
            step = max(self._steps.number, 0) if self._step_again is None else self._step_again
        else:
            step, _ = self._steps.of(site.path)
        if self.plan.watch_all and site.path not in self.plan.site_paths:
            site = self._kinds.of(site, call.kind, step)
        return self._numbering.numbered(site), step

    def skip(self, reason: str, path: str | None = None, changed: bool = False) -> None:
        """Attention ran that cannot be read."""
        if in_backward() or in_rehearsal():
            return
        asked, self._asked = self._asked or changed, False
        self._take_held()
        path = self.where() if path is None else path
        if path is None:  # another model
            return
        self._seen_paths.add(path)
        self._skipped.setdefault((path, reason), set()).add(self._steps.of(path)[0])
        # Not where an error is on its way, that has a reason of its own.
        broken_off = self.ending and sys.exception() is not self._error_before
        if self._listener is not None and not asked and not broken_off:
            site = self._numbering.numbered(self._hooks.site(path))
            self._listener.missed(site, self._steps.of(path)[0], reason)

    def note(self, text: str) -> None:
        """What holds for the whole trace; said once."""
        if text not in self.trace.notes:
            self.trace.notes.append(text)

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""
        if stands_for_others(additive):  # :meth:`record` splits it, once it is known what it stands for
            return additive, None
        return self._recorder.split(additive)

    def record(self, call: KernelCall) -> None:
        """Take one call; what stands for several tensors at once, as those."""
        if self._model_runs and self._hold(call):
            return None
        self._take_held()
        if stands_for_others(call.v):
            with outside():
                plain = examples_as_batch(call, self._recorder.split)
                if plain is not None:
                    return self._record(plain)
        return self._record(call)

    def _hold(self, call: KernelCall) -> bool:
        """Only copy a call's tensors while the model runs, where the rest can wait until its forward ends.

        There it is done for all calls together, which takes a third of the time: between two kernels nothing of it is
        in the processor's caches (3.5 % of a toy).
        """
        if self._holder is None or id(call.module) not in self.plan.sites or call.output is None:
            return False
        if is_large(call) or call.v.is_meta or in_backward() or stands_for_others(call.output):
            return False
        if not self._holder.hold(call):
            return False
        self.heard += 1
        self._held.append(call)
        return True

    def _take_held(self) -> None:
        """Take the calls that were held, in their order."""
        if not self._held:
            return
        held, self._held = self._held, []
        calls, holder = self.trace.calls, self._holder
        assert holder is not None
        self._own_kernels += len(held)
        for call in held:
            site = self.plan.sites[id(call.module)]
            step, entry = self._steps.of(site.path)
            self._seen_paths.add(site.path)
            kept = holder.keep_held(call, self._numbering.numbered(site), step, len(calls))
            kept.entry = entry
            calls.append(kept)

    def _record(self, call: KernelCall) -> None:
        """Take one call: select, derive, measure, keep."""
        if in_backward() or in_rehearsal():  # a checkpointed part runs again, and its first run was recorded
            self.heard += 1
            return
        asked, self._asked = self._asked, False
        if call.v.is_meta:
            check_meta(self.plan.model)
        self.heard += 1
        site = self._site(call)
        if site is None:  # another model, in the same thread
            return
        self._own_kernels += 1
        step, entry = self._steps.of(site.path)
        if self.plan.watch_all and site.path not in self.plan.site_paths:
            site = self._kinds.of(site, call.kind, step)
        site = self._numbering.numbered(site)
        self._seen_paths.add(site.path)
        if stands_for_others(call.v if call.q is None else call.q):
            self._skipped.setdefault((site.path, _TRANSFORMED), set()).add(step)
            if self._listener is not None and not asked:
                self._listener.missed(site, step, _TRANSFORMED)
            return
        if self._listener is not None and not asked:
            self._listener.missed(site, step, f"what its kernel gets cannot be changed (tap {call.tap}).")
        takes: bool | None = True
        if self.selection.layers is not None:
            self._layer_counts.note(site)
            # None: layers are counted from an end that is not known yet. The call is kept; if need be it is dropped
            # later.
            takes = self.selection.takes_layer(site)
            if takes is False:
                return
        if call.piece is not None and not self.selection.takes_piece(call, site.label):
            return
        if self._room is not None and is_large(call):
            plan = self.plan
            forward = Forward(step, plan.model, plan.classes, self._hooks.inputs, self.aside)
            self._room.check(forward, call, site)
        kept = self._recorder.keep(call, site, step, len(self.trace.calls))
        if kept is None:
            return
        kept.entry = entry
        if call.piece is not None:
            self._pieces.note(kept, call.piece)
        self.trace.calls.append(kept)
        if self._sink is not None and takes:
            self._recorder.deliver(kept, self._sink)

    # The end

    def finish(self) -> None:
        """Read the certificates, drop what a selection could not drop earlier, list what was skipped."""
        self._complete_calls()
        if not self.shapes_only:
            self._pieces.put_together(self.trace.calls, merge=self._sink is None)
        self._drop_unselected_layers()
        sites = self.plan.sites
        if not all(key in sites and sites[key].path in self._seen_paths for key in self._modules_run):
            for place in unread_sites(self.plan, self._modules_run, self._seen_paths):
                self._skipped.setdefault(place, set()).add(max(self._steps.number, 0))
        self.trace.skipped = [
            Skipped(path, reason, tuple(sorted(steps))) for (path, reason), steps in self._skipped.items()
        ]

    def check_found(self) -> None:
        """Whether there is what was asked for, once the trace is finished.

        Raises:
            SelectionError: a selected layer is not there; NoAttentionError: no attention ran; ModelError: why not.
        """
        absent = [i for i in self.selection.layers or () if i not in self._layers_found]
        if self._own_kernels and absent:
            raise SelectionError(
                f"layers={list(self.selection.layers or ())}: there is no layer {absent[0]}; of the "
                f"{self._own_kernels} attention calls that ran, the last layers are {self._layer_counts}."
            )
        if self.trace.calls or self._own_kernels or self.trace.skipped:
            return
        check_meta(self.plan.model)
        if self._steps.number < 0 and not self._modules_run:
            raise NoAttentionError("the model was never called while it was traced.")
        ran = {known[0] for known in self._follower.operations.values()} if "_follower" in vars(self) else set()
        raise NoAttentionError(nothing_seen(self.plan.model_class.__name__, ran | self._compiled_run))

    def _complete_calls(self) -> None:
        self._recorder.complete(self.trace.calls)
        if not self._strict:
            return
        bad = [c for c in self.trace.calls if c.certificate.status == "unfaithful"]
        if bad:
            raise UnfaithfulError(
                f"{len(bad)} of {len(self.trace.calls)} calls are not what the model's kernel returned; the first is "
                f"{bad[0].site.label} (tap {bad[0].tap}): {bad[0].certificate}. Trace with strict=False to look at it."
            )

    def _drop_unselected_layers(self) -> None:
        """Drop the calls of layers that were not selected, where the number of layers is known only now.

        The calls that stay are numbered anew: the one change of ``index`` after a call was handed out.
        """
        if self.selection.layers is None:
            return

        def takes(site: Site) -> bool:
            named = self._layer_counts.naming(self.selection.layers or (), site)
            self._layers_found |= named
            return bool(named)

        self.trace.calls[:] = [c for c in self.trace.calls if takes(c.site)]
        for i, call in enumerate(self.trace.calls):
            call.index = i


if TYPE_CHECKING:
    # A session is what the taps are given: held here, where a change of either would be made, and not only where the
    # two meet.
    _: type[ActiveTrace] = Session
