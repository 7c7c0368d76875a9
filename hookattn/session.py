"""One running trace: brackets, patches and the function mode around a model, and what becomes of each call seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .certificate import Pending, measure_all
from .errors import ModelError, UnfaithfulError
from .hooks import Brackets, Plan
from .keeper import Keeper
from .modes import Modes
from .record import KernelCall
from .selection import Selection
from .site import Site
from .taps import TAPS, kernels
from .taps.current import current, set_current
from .taps.patch import install, remove
from .taps.watch import Watch
from .trace import Call, Skipped, Trace

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
    """

    def __init__(
        self, plan: Plan, trace: Trace, selection: Selection, verify: str, strict: bool, sink: Sink | None = None
    ):
        self.plan, self.trace, self.selection = plan, trace, selection
        self.strict, self.sink = strict, sink
        self.keeper = Keeper(selection, verify)
        self.watch = Watch(self, kernels())
        self.modes = Modes(self.watch)
        self.aside = self.modes.aside
        self.brackets = Brackets(self.plan, self._enter_site, self._leave_site, self.next_step, self._ran, self.forward)
        self.step = -1
        self.seen: set[str] = set()
        self.ran: dict[str, str] = {}
        self.recorded = 0
        self.matched: set[int] = set()
        self._last: dict[tuple[str, str], int] = {}
        self._sites: list[tuple[Site, bool]] = []
        self._described: dict[str, Site] = {}
        self._order: dict[tuple[str, str], list[str]] = {}
        self._skipped: dict[tuple[str, str], set[int]] = {}
        self._pending: dict[int, Pending] = {}
        self._patched: list[tuple[int, str]] = []

    # Life

    def start(self) -> None:
        """Attach everything.

        Raises:
            ModelError: a trace already runs in this thread.
        """
        if current() is not None:
            raise ModelError("a trace is already running in this thread; finish it before starting another.")
        self.before = set_current(self)
        try:
            self._patched = install(p for tap in TAPS if tap.patches is not None for p in tap.patches())
            self.brackets.install()
            if self.plan.watch_all:
                self.modes.push()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Detach everything, whatever state the forward left it in."""
        self.modes.close()
        self.brackets.remove()
        remove(self._patched)
        self._patched = []
        self._sites.clear()
        if self.active():
            set_current(None)
        self.watch.flush()

    def active(self) -> bool:
        """Whether the current thread is the traced one."""
        return current() is self

    def forward(self) -> bool:
        """Whether this is the traced thread, and not in a backward pass, which runs checkpointed parts again."""
        return current() is self and not _in_backward()

    @contextmanager
    def kernel(self, sealed: bool) -> Iterator[Callable[[], bool]]:
        """Around one kernel; yields a function that tells whether a tap saw it."""
        before = self.recorded
        with self.modes.sealed() if sealed else self.modes.opened():
            yield lambda: self.recorded > before

    # Where we are

    def next_step(self) -> None:
        """A forward of the whole model begins."""
        self.step += 1
        self._sites.clear()
        self.keeper.forget()

    def _enter_site(self, site: Site, sealed: bool) -> None:
        opened = not sealed and not self.modes.open()
        if opened:
            self.modes.push()
        self._sites.append((site, opened))
        self.ran.setdefault(site.path, site.module)

    def _leave_site(self) -> None:
        if self._sites:
            _, opened = self._sites.pop()
            if opened and self.modes.on_top():
                self.modes.pop()

    def _ran(self, path: str, module: nn.Module) -> None:
        self.ran.setdefault(path, type(module).__name__)

    def where(self) -> str:
        """The path of the site that is running, or else of the innermost module."""
        return self._sites[-1][0].path if self._sites and not self.plan.watch_all else self.brackets.running()

    def _site(self, within: str) -> Site:
        if self._sites and not self.plan.watch_all:
            return self._sites[-1][0]
        path = ".".join(x for x in (self.brackets.running(), within) if x)
        for site, _ in reversed(self._sites):
            if path == site.path or path.startswith(site.path + "."):
                return site
        if path not in self._described:
            self._described[path] = self.brackets.site(path)
        return self._described[path]

    # What the taps report

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return field in self.selection.capture

    def skip(self, reason: str, path: str | None = None) -> None:
        """Attention ran that cannot be read."""
        if _in_backward():
            return
        path = self.where() if path is None else path
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
        self.recorded += 1
        site = self._site(call.within)
        if site.layer is None:
            site = self._ordered(site)
        self.seen.add(site.path)
        place = (site.stack, site.kind)
        self._last[place] = max(self._last.get(place, 0), site.layer or 0)
        takes = self.selection.takes_layer(site)
        if takes is False:
            return
        put_off = self.sink is None
        made, pending = self.keeper.keep(call, site, max(self.step, 0), len(self.trace.calls), put_off)
        if pending is not None:
            self._pending[id(made)] = pending
        self.trace.calls.append(made)
        if self.sink is not None and takes:
            self.sink(made)

    def _ordered(self, site: Site) -> Site:
        """A site without a number gets its place among those of its stack and kind."""
        order = self._order.setdefault((site.stack, site.kind), [])
        if site.path not in order:
            order.append(site.path)
        return replace(site, layer=order.index(site.path))

    # The end

    def finish(self) -> None:
        """Read the certificates, drop what a selection could not drop earlier, list what was skipped."""
        self._settle()
        self._late_layers()
        unread = {p: m for p, m in self.ran.items() if not any(_within(s, p) or _within(p, s) for s in self.seen)}
        for path, module in unread.items():
            if not any(other != path and _within(other, path) for other in unread):  # the innermost says it best
                self._skipped.setdefault((path, f"{module} ran, and no softmax over q·k was seen in it"), set()).add(
                    max(self.step, 0)
                )
        self.trace.skipped = [
            Skipped(path, reason, tuple(sorted(steps))) for (path, reason), steps in self._skipped.items()
        ]

    def _settle(self) -> None:
        by_device: dict[torch.device, list[tuple[Call, Pending]]] = {}
        for call in self.trace.calls:
            pending = self._pending.pop(id(call), None)
            if pending is not None:
                by_device.setdefault(pending.device, []).append((call, pending))
        for pairs in by_device.values():
            with torch.no_grad():
                measure_all([p for _, p in pairs])
                values = torch.stack([p.errors.double() for _, p in pairs if p.errors is not None]).tolist()
            for (call, pending), row in zip(pairs, values, strict=True):
                call.certificate = pending.settle(row)
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
            n = site.layers or self._last[(site.stack, site.kind)] + 1
            fits = {i for i in self.selection.layers or () if site.layer == (i if i >= 0 else n + i)}
            self.matched |= fits
            return bool(fits)

        self.trace.calls[:] = [c for c in self.trace.calls if takes(c.site)]
        for i, call in enumerate(self.trace.calls):
            call.index = i

    def describe_layers(self) -> str:
        """The last layer of every stack that ran, as text."""
        return ", ".join(f"{n} ({stack} {kind})" for (stack, kind), n in self._last.items())


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".") or not outer


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
