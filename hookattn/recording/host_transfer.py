"""From a GPU to the host, beside the model's own work: a second thread and a stream of its own do the copying."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.fields import Later
from ..errors import FieldNotCaptured
from ..torch_internals import allocation
from ..torch_internals.devices import SideStream, pinned

# So many bytes may wait on the GPU; then the model waits for the oldest of them.
_MOST_WAITING_BYTES = 1 << 30
_BUFFER_BYTES = 32 << 20
_BUFFERS = 2


class Lane(Protocol):
    """The way from one device to the host."""

    def mark(self) -> Any:
        """A mark behind all that the calling thread has queued on the device."""

    def fetch(self, x: Tensor, mark: Any) -> Tensor:
        """A copy on the host of what ``x`` is at the mark; returns when it is there. Called in the second thread."""


class Transfer:
    """The copies of one trace.

    A tensor of the model's is copied on its device first, in the order of the model's own work, since the model may
    write to it afterwards. That copy lives until the one on the host is complete: its memory is not used again before.

    Args:
        lane: makes the way from a device.
        limit: the bytes that may wait on the devices.
    """

    def __init__(self, lane: Callable[[torch.device], Lane] | None = None, limit: int = _MOST_WAITING_BYTES):
        self._make, self._limit = lane or CudaLane, limit
        self._lanes: dict[torch.device, Lane] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._on_their_way: deque[tuple[Future[Tensor], int]] = deque()
        self._size = 0
        self._delivered: Future[None] | None = None

    def send(self, x: Tensor, dtype: torch.dtype, ours: bool) -> Later:
        """Begin to copy a tensor.

        Args:
            x: on a device.
            dtype: of the copy.
            ours: whether nobody will write to it.

        Returns:
            The copy, contiguous and on the host, which is waited for when it is read.
        """
        if x.device not in self._lanes:
            self._lanes[x.device] = self._make(x.device)
        lane = self._lanes[x.device]
        own = x.to(dtype, memory_format=torch.contiguous_format, copy=not (ours and x.is_contiguous()))
        while self._on_their_way and (self._on_their_way[0][0].done() or self._size + own.nbytes > self._limit):
            future, size = self._on_their_way.popleft()
            future.result()
            self._size -= size
        future = self._submit(lane.fetch, own, lane.mark())
        self._on_their_way.append((future, own.nbytes))
        self._size += own.nbytes
        return Later(_copy_on_host, future)

    @property
    def used(self) -> bool:
        """Whether anything was sent."""
        return self._thread is not None

    def deliver(self, call: Call, sink: Callable[[Call], None]) -> None:
        """Hand a call over once its copies have arrived, in the second thread; waits until the one before it has been.

        Raises:
            Exception: what kept the one before it from being handed over.
        """
        if self._delivered is not None:
            self._delivered.result()
        self._delivered = self._submit(_deliver, call, sink)

    def complete(self, calls: Sequence[Call]) -> None:
        """Wait for everything, put the copies where they belong, and end the second thread."""
        if self._delivered is not None:
            self._delivered.result()
        for call in calls:
            wait_for_copies(call)
        self.close()

    def close(self) -> None:
        """Forget what has not begun, wait for what has, and end the second thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._delivered, self._size = None, None, 0
        self._on_their_way.clear()
        self._lanes.clear()

    def _submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "hookattn-transfer")
        return self._thread.submit(work, *args)


def wait_for_copies(call: Call) -> None:
    """Wait for the copies of a call."""
    for name, value in call.fields.items():
        if isinstance(value, Later):
            call.fields[name] = value()


def _copy_on_host(copy: Future[Tensor]) -> Tensor:
    try:
        return copy.result()
    except CancelledError:
        raise FieldNotCaptured(
            "this field was still to be copied from the GPU when the traced block raised, and its copy was given up; "
            "trace again."
        ) from None


def _deliver(call: Call, sink: Callable[[Call], None]) -> None:
    wait_for_copies(call)
    sink(call)


class CudaLane:
    """A stream of its own, and pinned buffers: memory that a GPU copies to without the processor's help. What arrives
    is moved on to ordinary memory, as much as it takes and no more."""

    def __init__(self, device: torch.device):
        self.stream = SideStream(device)
        self.buffers: list[Tensor] = []

    def mark(self) -> Any:
        """See :class:`Lane`."""
        return self.stream.mark()

    def fetch(self, x: Tensor, mark: Any) -> Tensor:
        """See :class:`Lane`."""
        out = allocation.empty(x.shape, x.dtype, torch.device("cpu"))
        with self.stream.after(mark):
            if not self.buffers:
                self.buffers = [pinned(_BUFFER_BYTES) for _ in range(_BUFFERS)]
            copy_through_buffers(x, out, self.buffers, self._copy)
        return out

    def _copy(self, buffer: Tensor, part: Tensor) -> Callable[[], None]:
        buffer.copy_(part, non_blocking=True)
        return self.stream.waiter()


def copy_through_buffers(
    x: Tensor, out: Tensor, buffers: Sequence[Tensor], copy: Callable[[Tensor, Tensor], Callable[[], None]]
) -> None:
    """Move the bytes of ``x`` to ``out`` by way of buffers: while one fills, another is emptied.

    Args:
        x: contiguous.
        out: contiguous, of the same size.
        buffers: uint8, of one size.
        copy: begins to fill a buffer with a part, and returns a function that waits until it is full.
    """
    if not x.numel():
        return
    size = buffers[0].numel()
    parts = zip(*(torch.split(y.view(-1).view(torch.uint8), size) for y in (x, out)), strict=True)
    filling: deque[tuple[Callable[[], None], Tensor, Tensor]] = deque()

    def empty() -> None:
        full, buffer, target = filling.popleft()
        full()
        target.copy_(buffer)

    for i, (part, target) in enumerate(parts):
        if len(filling) == len(buffers):
            empty()
        buffer = buffers[i % len(buffers)][: part.numel()]
        filling.append((copy(buffer, part), buffer, target))
    while filling:
        empty()
