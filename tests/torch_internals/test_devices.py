"""What is said of devices that are not here: by stand-ins. On CUDA itself tests/test_on_device.py runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.attention import derivation
from hookattn.planning import memory_plan, plan, room
from hookattn.testing import check_clean
from hookattn.torch_internals import devices

CUDA, XPU, MPS, OTHER = map(torch.device, ("cuda", "xpu", "mps", "hpu"))


def test_nothing_else_asks_for_a_type_of_device() -> None:
    """Grepped, since a file that asks for CUDA is right here and wrong where nobody looks."""
    asks = re.compile(
        r"torch\.(cuda|xpu|mps|accelerator)\b|\bis_(cuda|mps|xpu)\b|pin_memory|meminfo|type == \"(?!cpu|meta)"
    )
    package = Path(hookattn.__file__).parent
    found = [
        f"{path.relative_to(package)}:{i}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "devices.py"
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if asks.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_cpu_has_no_other_way(device: str) -> None:
    assert not devices.on_gpu(torch.empty(1, device=device)) and devices.plain_reason(torch.device(device)) == ""


def test_cuda_has_the_kernels_and_rocm_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = SimpleNamespace(is_cuda=True)
    assert devices.on_gpu(x) and devices.plain_reason(CUDA) == ""
    monkeypatch.setattr(devices, "_ROCM", True)
    assert not devices.on_gpu(x) and "ROCm" in devices.plain_reason(CUDA)


@pytest.mark.parametrize(("device", "word"), [(XPU, "Intel"), (MPS, "Metal"), (OTHER, "hpu")])
def test_other_devices_go_the_plain_way_for_a_reason(device: torch.device, word: str) -> None:
    assert word in devices.plain_reason(device)


def test_the_reason_is_noted_where_a_kernel_would_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "plain_reason", lambda device: "a reason")
    q, notes = torch.randn(1, 2, 3, 4), list[str]()
    _, weights = derivation.derive(q, q, notes=notes)
    assert notes == ["scores and weights were derived by torch's own operations: a reason"]
    assert weights is not None and torch.allclose(weights, (q @ q.mT).softmax(-1))


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


X = torch.randn(1, 2, 5, 4)


def test_a_plan_says_why_a_device_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hookattn.plan(Model(), X).notes == []
    monkeypatch.setattr(plan, "plain_reason", lambda device: devices.PLAIN["mps"])
    assert any("Metal" in note for note in hookattn.plan(Model(), X).notes)


# ------------------------------------------------------------------------------------------------ free memory


def test_free_memory_of_the_host_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = devices.free_memory(torch.device("cpu"))
    assert free is not None and free > 1 << 20
    assert devices.free_memory(torch.device("meta")) is not None

    def gone(*_: Any, **__: Any) -> Any:
        raise OSError("no such file")

    monkeypatch.setattr("builtins.open", gone)
    whole = devices.free_memory(torch.device("cpu"))
    assert whole is not None and whole >= free // 2, "all there is, where the system does not say what is free"
    monkeypatch.delattr(devices.os, "sysconf")
    assert devices.free_memory(torch.device("cpu")) is None


def test_free_memory_of_a_gpu_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, home in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        monkeypatch.setattr(home, "mem_get_info", lambda device: (100, 1000), raising=False)
        monkeypatch.setattr(home, "memory_reserved", lambda device: 50, raising=False)
        monkeypatch.setattr(home, "memory_allocated", lambda device: 20, raising=False)
        assert devices.free_memory(torch.device(name)) == 130
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 70)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 30)
    assert devices.free_memory(MPS) == 40


@pytest.mark.parametrize(
    "error", [AttributeError("this torch has no such name"), RuntimeError("the driver has no such question")]
)
def test_free_memory_that_torch_cannot_tell_is_not_known(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any) -> Any:
        raise error

    for home, name in ((torch.xpu, "mem_get_info"), (torch.mps, "recommended_max_memory")):
        monkeypatch.setattr(home, name, fails, raising=False)
    assert devices.free_memory(XPU) is None and devices.free_memory(MPS) is None


def test_free_memory_of_an_unknown_device_is_what_its_accelerator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.free_memory(OTHER) is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: OTHER)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (7, 8), raising=False)
    assert devices.free_memory(OTHER) == 7
    assert devices.free_memory(torch.device("vulkan")) is None, "another one's"


def test_where_free_memory_is_not_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan, room):
        monkeypatch.setattr(module, "free_memory", lambda device: None)
    told = hookattn.plan(Model(), X)
    assert told.fits and told.free_memory is None and not told.advice
    assert "fits, as far as is known" in repr(told) and "nobody says how much is free" in repr(told)
    monkeypatch.setattr("hookattn.recording.room_check.LARGE", 1)
    assert len(hookattn.trace(Model(), X).calls) == 1
    for module in (plan, room):
        monkeypatch.setattr(module, "free_memory", lambda device: 0)
    with pytest.raises(hookattn.TraceTooLargeError):
        hookattn.trace(Model(), X)
    check_clean(Model())


def test_a_disk_that_is_full_is_seen_without_knowing_the_memory() -> None:
    told = memory_plan.MemoryPlan([], 10, 5, None, free_disk=9)
    assert not told.fits and memory_plan.room_sentence(told).startswith("does not fit: 10 B of 9 B of free disk, 5 B")


# ------------------------------------------------------------------------------------------------ generators


@pytest.mark.parametrize("device", ["cpu", "meta", "hpu"])
def test_the_random_state_is_kept(device: str) -> None:
    before = torch.get_rng_state()
    with devices.random_state_kept(torch.device(device)):
        torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_random_state_of_a_gpu_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Any] = []
    forked: list[tuple[Any, str]] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with pytest.raises(KeyError), devices.random_state_kept(MPS):
        raise KeyError
    assert states == ["before"]

    class Fork:
        def __init__(self, which: list[Any], device_type: str = "none"):
            forked.append((which, device_type))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.random, "fork_rng", Fork)
    for device in (CUDA, XPU):
        with devices.random_state_kept(device):
            pass
    assert forked == [([CUDA], "cuda"), ([XPU], "xpu")]


# ------------------------------------------------------------------------------------------------ streams


def test_a_side_stream_waits_for_the_mark_and_is_the_current_one_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: Any):
            self.name = name

        def record_event(self) -> Any:
            return SimpleNamespace(synchronize=lambda: log.append(f"waited for {self.name}"))

        def wait_event(self, mark: Any) -> None:
            log.append("after the mark")

    class Within:
        def __init__(self, what: Any):
            self.what = what

        def __enter__(self) -> None:
            log.append(f"in {getattr(self.what, 'name', self.what)}")

        def __exit__(self, *_: object) -> None:
            log.append(f"out of {getattr(self.what, 'name', self.what)}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("ours"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("the model's"))
    monkeypatch.setattr(torch.cuda, "device", Within)
    monkeypatch.setattr(torch.cuda, "stream", Within)
    stream = devices.SideStream(CUDA)
    mark = stream.mark()
    mark.synchronize()
    with stream.after(mark):
        wait = stream.waiter()
    wait()
    assert log == [
        *("waited for the model's", "in cuda", "in ours", "after the mark", "out of ours", "out of cuda"),
        "waited for ours",
    ]


@pytest.mark.parametrize(("name", "home"), [("cuda:0", "cuda"), ("xpu", "xpu"), ("mps", "backends.mps")])
def test_a_device_that_is_absent_is_said(monkeypatch: pytest.MonkeyPatch, name: str, home: str) -> None:
    there: Callable[[bool], None] = lambda yes: monkeypatch.setattr(f"torch.{home}.is_available", lambda: yes)  # noqa: E731
    there(False)
    assert devices.absent(name) == f"this torch sees no {name.partition(':')[0].upper()} device"
    there(True)
    assert devices.absent(name) == "" and devices.absent("cpu") == "" and devices.absent("anything") == ""
