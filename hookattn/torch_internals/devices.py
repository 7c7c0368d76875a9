"""What a device can do, decided here alone, so that one that nobody has tried goes the plain way everywhere.

The plain way is torch's own operations and copies that wait. It is right on every device; what goes another way was
written for CUDA, and is tested in Triton's interpreter and compiler until it has run on one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

PLAIN = {
    "rocm": "the kernels have not been tried on ROCm, whose Triton and streams differ from CUDA's",
    "xpu": "the kernels and the copies beside the model have not been tried on an Intel GPU",
    "mps": "Triton has no backend for Metal, whose memory is the host's anyway",
}
"""Type of device -> why it goes the plain way. ROCm's devices are of the type "cuda" by torch's own word."""

_ROCM = torch.version.hip is not None


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is where the kernels of :mod:`hookattn.attention.kernels` run, and where copies to the host go
    beside the model's work, through pinned memory: on a CUDA device."""
    return x.is_cuda and not _ROCM


def plain_reason(device: torch.device) -> str:
    """Why a device goes the plain way, for a note; "" for CUDA, and where there is no other way (CPU, meta)."""
    kind = "rocm" if device.type == "cuda" and _ROCM else device.type
    if kind in ("cpu", "cuda", "meta"):
        return ""
    return PLAIN.get(kind, f"nothing is known here of devices of the type {kind}")


def absent(device: str) -> str:
    """Why a device cannot be used, as a sentence without its end; "" if it can be, or if torch has to say."""
    ways: dict[str, tuple[str, Callable[[], bool]]] = {
        "cuda": ("CUDA", torch.cuda.is_available),
        "xpu": ("XPU", torch.xpu.is_available),
        "mps": ("MPS", torch.backends.mps.is_available),
    }
    name, there = ways.get(device.partition(":")[0], ("", bool))
    return f"this torch sees no {name} device" if name and not there() else ""


def name_of(device: torch.device) -> str:
    """What a device is, as far as it may decide the last bits of a number."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def visible_gpus() -> list[str]:
    """The GPUs that processes can be shared out to, as CUDA_VISIBLE_DEVICES has them."""
    if not torch.cuda.is_available():
        return []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]


# ------------------------------------------------------------------------------------------------ free memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None: nobody says.

    A meta device has none of its own: what is planned on it will mostly be on the host.
    """
    read = _FREE.get(device.type, _free_of_accelerator)
    try:
        return read(device)
    except (AttributeError, RuntimeError, OSError, ValueError, NotImplementedError):
        return None  # this torch, driver or system has no such question


def _free_of_host(_: torch.device) -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_of_cuda(device: torch.device) -> int:
    # torch keeps freed memory for itself: the driver counts it as taken, and it can be allocated all the same.
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _free_of_xpu(device: torch.device) -> int:
    xpu: Any = torch.xpu
    free, _ = xpu.mem_get_info(device)
    return int(free + xpu.memory_reserved(device) - xpu.memory_allocated(device))


def _free_of_mps(_: torch.device) -> int:
    return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())


def _free_of_accelerator(device: torch.device) -> int:
    accelerator: Any = torch.accelerator
    if accelerator.current_accelerator() is None or accelerator.current_accelerator().type != device.type:
        raise RuntimeError(f"torch knows nothing of {device}")
    free, _ = accelerator.get_memory_info(device)  # since torch 2.9
    return int(free)


_FREE: dict[str, Callable[[torch.device], int]] = {
    "cpu": _free_of_host,
    "meta": _free_of_host,
    "cuda": _free_of_cuda,
    "xpu": _free_of_xpu,
    "mps": _free_of_mps,
}


def size_of(count: float) -> str:
    """Bytes as text."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


# ------------------------------------------------------------------------------------------------ generators, streams


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """The random generators of the CPU and of a device are afterwards as they were."""
    if device.type in ("cuda", "xpu"):
        with torch.random.fork_rng([device], device_type=device.type):
            yield
    elif device.type == "mps":  # fork_rng asks for the state of a numbered device, which torch.mps has not
        state = torch.mps.get_rng_state()
        try:
            with torch.random.fork_rng([]):
                yield
        finally:
            torch.mps.set_rng_state(state)
    else:
        with torch.random.fork_rng([]):
            yield


def random_state(device: torch.device) -> Callable[[], None]:
    """What puts the random generators of the CPU and of a device back to where they are now."""
    host = torch.get_rng_state()
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        own = module.get_rng_state(device)
        put_back = partial(module.set_rng_state, own, device)
    elif device.type == "mps":  # whose state is that of no numbered device
        put_back = partial(torch.mps.set_rng_state, torch.mps.get_rng_state())
    else:
        return partial(torch.set_rng_state, host)

    def both() -> None:
        torch.set_rng_state(host)
        put_back()

    return both


def made_current(x: Tensor) -> AbstractContextManager[Any]:
    """With the device of a tensor as the one that kernels are launched on; on the CPU there is none to choose."""
    return torch.cuda.device(x.get_device())


class SideStream:
    """A stream of its own on a CUDA device, for what shall run beside the model's work."""

    def __init__(self, device: torch.device):
        self._cuda: Any = torch.cuda  # whose types are not all there
        self._device, self._stream = device, self._cuda.Stream(device)

    def mark(self) -> Any:
        """A mark behind all that the calling thread has queued on the device."""
        return self._cuda.current_stream(self._device).record_event()

    @contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        """What is queued inside runs on this stream, and not before the mark."""
        with self._cuda.device(self._device), self._cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield

    def waiter(self) -> Callable[[], None]:
        """A function that waits for all that is queued on this stream by now."""
        return self._stream.record_event().synchronize  # type: ignore[no-any-return]


def pinned(size: int) -> Tensor:
    """Bytes of the host that a CUDA device copies to without the processor's help; uint8, not filled."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
