"""One running trace: brackets, patches and the function mode around a model, and what becomes of each call seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from .call import Call, Skipped
from .errors import ModelError, UnfaithfulError
from .guard import LARGE, Guard
from .hooks import Brackets
from .inspection import Plan, check_meta
from .keeper import Keeper
from .modes import Modes
from .numbering import Numbering
from .record import KernelCall
from .selection import Selection
from .silent import silent
from .site import Site
from .taps import kernels, patches
from .taps.current import current, set_current
from .taps.patch import Exchange, install, remove
from .taps.watch import Watch
from .trace import TraceData

Sink = Callable[[Call], None]


class Session:
    """A trace while it runs, in the thread that started it.

    Args:
        plan: what is traced, and how.
        trace: gets the calls.
        selection: what is kept of each.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
        strict: raise at the first unfaithful call that is read back, rather than warn.
        sink: takes each finished call (a file); None: they stay in memory.
        guard: looks whether there is room for large calls; None: nobody does.
    """

    def __init__(
        self,
        plan: Plan,
        trace: TraceData,
        selection: Selection,
        verify: str,
        strict: bool,
        sink: Sink | None = None,
        guard: Guard | None = None,
    ):
        self.plan, self.trace, self.selection = plan, trace, selection
        self.strict, self.sink, self.guard = strict, sink, guard
        self.keeper = Keeper(selection, verify, wait=sink is None)
        self._small = self.keeper.small if selection.layers is None else None
        self.modes = Modes(lambda: Watch(self, kernels()))
        self.brackets = Brackets(self.plan, self._enter_site, self._leave_site, self.next_step, self._ran, self.forward)
        self.step = -1
        self.seen: set[str] = set()
        self.ran: dict[int, nn.Module] = {}  # what sounds like attention, and ran
        self.heard = self.recorded = 0  # kernels that were seen, and those of them that were the model's
        self.glance: tuple[nn.Module, Tensor, Tensor, Tensor] | None = None
        self.matched: set[int] = set()
        self.numbering = Numbering()
        self.hollow = False  # tensors have shapes alone: a plan
        self._sites: list[tuple[Site, bool]] = []  # those entered, and whether each opened the mode
        self._described: dict[str, Site] = {}
        self._skipped: dict[tuple[str, str], set[int]] = {}
        self._patched: list[Exchange] = []
        self._running = False

    # Life

    def start(self) -> None:
        """Attach everything.

        Raises:
            ModelError: a trace already runs in this thread.
        """
        if current() is not None:
            raise ModelError("a trace is already running in this thread; finish it before starting another.")
        set_current(self)
        self._running = True
        try:
            self._patched = install(patches())
            self.brackets.install()
            if self.plan.watch_all:
                self.modes.push()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Detach everything, whatever state the forward left it in."""
        if not self._running:
            return
        self._running = False
        self.modes.close()
        self.brackets.remove()
        remove(self._patched)
        self._patched = []
        self._sites.clear()
        if self.active():
            set_current(None)
        self.modes.flush()

    def close(self) -> None:
        """Detach everything, and let go of the trace: its tensors shall not wait for a garbage collection."""
        self.stop()
        self.keeper.drop()
        vars(self).clear()

    @property
    def watch(self) -> Watch:
        """The function mode."""
        return self.modes.watch

    def aside(self) -> AbstractContextManager[None]:
        """Without the function mode: for kernels that must not see it."""
        return self.modes.aside()

    def active(self) -> bool:
        """Whether the current thread is the traced one."""
        return current() is self

    def forward(self) -> bool:
        """Whether this is the traced thread, and not in a backward pass, which runs checkpointed parts again."""
        return current() is self and not _in_backward()

    @contextmanager
    def kernel(self, sealed: bool) -> Iterator[Callable[[], bool]]:
        """Around one kernel; yields a function that tells whether a tap saw it."""
        before = self.heard
        with self.modes.sealed() if sealed else self.modes.opened():
            yield lambda: self.heard > before

    # Where we are

    def next_step(self) -> None:
        """A forward of the whole model begins."""
        self.step += 1
        self._sites.clear()
        self.keeper.forget()

    def _enter_site(self, module: nn.Module) -> None:
        self._ran(module)
        opened = not self.modes.open()
        if opened:
            self.modes.push()
        site = self.plan.sites.get(id(module)) or self._describe(self.plan.paths[id(module)])
        self._sites.append((site, opened))

    def _leave_site(self) -> None:
        if self._sites:
            _, opened = self._sites.pop()
            if opened and self.modes.on_top():
                self.modes.pop()

    def _ran(self, module: nn.Module) -> None:
        self.ran[id(module)] = module

    def where(self) -> str | None:
        """The path of the site that is running, or else of the innermost module; None outside the model."""
        return self._sites[-1][0].path if self._sites and not self.plan.watch_all else self.brackets.running()

    def _site(self, call: KernelCall) -> Site | None:
        known = self.plan.sites.get(id(call.module))
        if known is not None:
            return known
        if self._sites and not self.plan.watch_all:
            return self._sites[-1][0]
        running = self.brackets.running() if call.path is None else call.path
        if running is None:
            return None
        return self._describe(".".join(x for x in (running, call.within) if x))

    def _describe(self, path: str) -> Site:
        if path not in self._described:
            self._described[path] = self.brackets.site(path)
        return self._described[path]

    # What the taps report

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return self.keeper.wants(field)

    def skip(self, reason: str, path: str | None = None) -> None:
        """Attention ran that cannot be read."""
        if _in_backward():
            return
        path = self.where() if path is None else path
        if path is None:  # another model
            return
        self.seen.add(path)
        self._skipped.setdefault((path, reason), set()).add(max(self.step, 0))

    def note(self, text: str) -> None:
        """What holds for the whole trace; said once."""
        if text not in self.trace.notes:
            self.trace.notes.append(text)

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""
        return self.keeper.split(additive)

    def record(self, call: KernelCall) -> None:
        """Take one call: select, derive, measure, keep."""
        if _in_backward():
            return
        if call.q.is_meta:
            check_meta(self.plan.model)
        self.heard += 1
        site = self._site(call)
        if site is None:  # another model, in the same thread
            return
        self.recorded += 1
        site = self.numbering.numbered(site)
        self.seen.add(site.path)
        if self.selection.layers is not None:
            self.numbering.ran(site)
        takes = self.selection.takes_layer(site)
        if takes is False:
            return
        if self.guard is not None and call.q.numel() * call.k.shape[2] > LARGE:
            self.guard.check(self, call, site)
        made = self.keeper.keep(call, site, max(self.step, 0), len(self.trace.calls))
        self.trace.calls.append(made)
        if self.sink is not None and takes:
            self.keeper.deliver(made, self.sink)

    def plain(
        self, module: nn.Module, several: tuple[Tensor, Tensor, Tensor, Tensor], scale: float, causal: bool, tap: str
    ) -> bool:
        """Take one call of a kernel that was given nothing but q, k, v, a scale and ``causal``, if it is small.

        Args:
            module: the one that the kernel runs in.
            several: q, k, v and output, B H T D.
        """
        site = self.plan.sites.get(id(module))
        if site is None or site.layer is None or self._small is None or _in_backward():
            return False
        if self.guard is not None and several[0].numel() * several[1].shape[2] > LARGE:
            return False
        calls = self.trace.calls
        made = self._small.keep_plain(several, scale, causal, tap, site, max(self.step, 0), len(calls))
        if made is None:
            return False
        self.heard += 1
        self.recorded += 1
        self.seen.add(site.path)
        calls.append(made)
        return True

    # The end

    def finish(self) -> None:
        """Read the certificates, drop what a selection could not drop earlier, list what was skipped."""
        self._settle()
        self._late_layers()
        sites = self.plan.sites
        if not all(key in sites and sites[key].path in self.seen for key in self.ran):
            for place in silent(self.plan, self.ran, self.seen):
                self._skipped.setdefault(place, set()).add(max(self.step, 0))
        self.trace.skipped = [
            Skipped(path, reason, tuple(sorted(steps))) for (path, reason), steps in self._skipped.items()
        ]

    def _settle(self) -> None:
        self.keeper.settle(self.trace.calls)
        bad = [c for c in self.trace.calls if c.certificate.status == "unfaithful"]
        if bad and self.strict:
            raise UnfaithfulError(
                f"{len(bad)} of {len(self.trace.calls)} calls are not what the model's kernel returned; the first is "
                f"{bad[0].site.label} (tap {bad[0].tap}): {bad[0].certificate}. Trace with strict=False to look at it."
            )

    def _late_layers(self) -> None:
        """Layers counted from the end, where the number of layers is known only now."""
        if self.selection.layers is None:
            return

        def takes(site: Site) -> bool:
            n = self.numbering.count(site)
            fits = {i for i in self.selection.layers or () if site.layer == (i if i >= 0 else n + i)}
            self.matched |= fits
            return bool(fits)

        self.trace.calls[:] = [c for c in self.trace.calls if takes(c.site)]
        for i, call in enumerate(self.trace.calls):
            call.index = i


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
