"""What is too large to derive says so, which call it is and what would fit; the trace stays usable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import FieldNotCaptured, TraceTooLargeError
from hookattn.calls import deriving
from hookattn.calls.deriving import shape_and_dtype
from hookattn.torch_internals import devices
from tests.reference import draw


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attends()

    def forward(self, x: Tensor) -> Any:
        return self.attention(x)


@pytest.fixture
def trace() -> hookattn.Trace:
    return hookattn.trace(Model(), draw(2, 4, 32, 8, seed=1)).certify()


def test_what_would_fit_is_said_and_fits(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    per_head = 32 * 32 * 4
    monkeypatch.setattr(deriving, "_LARGE", 0)
    said = {
        8 * per_head: None,
        8 * per_head - 1: "call.at(heads=range(4))",
        3 * per_head: "call.at(heads=range(3))",
        per_head: "call.at(batch=0, heads=0)",
        per_head - 1: "call.at(heads=0, batch=0, queries=slice(-31, None))",
    }
    for free, way in said.items():
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        for name in ("weights", "scores"):
            trace[0].made.clear()
            if way is None:
                assert trace[0].get(name) is not None
                continue
            with pytest.raises(TraceTooLargeError) as caught:
                trace[0].get(name)
            text = str(caught.value)
            assert text.startswith("attention: its ") and f"its {name} (2 batch entries, 4 heads, 32 queries" in text
            assert f"What would fit: {way}." in text
            if "range(4)" not in way and "range(3)" not in way:
                part = eval(way, {"call": trace[0]})
                assert part.get(name).isfinite().all()
    monkeypatch.setattr(devices, "free_memory", lambda device: None)
    assert trace[0].weights.shape == (2, 4, 32, 32), "where nobody says how much is free, it is tried"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_runs_out_on_the_way(
    trace: hookattn.Trace, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(deriving, "derive", fails)
        assert torch.is_grad_enabled()
        with pytest.raises(
            TraceTooLargeError, match=r"attention: memory ran out while its weights .* call\.at\(heads=0\)"
        ):
            _ = trace[0].weights
        assert torch.is_grad_enabled()
    assert trace[0].weights.isfinite().all() and torch.equal(trace[0].q, draw(2, 4, 32, 8, seed=1))


def test_another_error_is_what_it_is(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr(deriving, "derive", fails)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        _ = trace[0].weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_and_dtypes_are_known_beforehand(dtype: torch.dtype) -> None:
    call = hookattn.trace(Model(), draw(2, 4, 32, 8, seed=1, dtype=dtype))[0]
    told = {name: shape_and_dtype(call, name) for name in call.fields}
    for name, (shape, kind) in told.items():
        x = call.get(name)
        assert (shape, kind) == ((0,), torch.uint8) if x is None else (x.shape, x.dtype) == (shape, kind), name


def test_in_grad_mode_under_autocast_and_with_a_mode_open() -> None:
    x = draw(1, 2, 8, 4, seed=1).requires_grad_()
    call = hookattn.trace(Model(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        weights = call.weights
    assert weights.dtype == torch.float32 and not weights.requires_grad and weights.device.type == "cpu"
    scores = x.detach().double() @ x.detach().double().mT / 2
    want = scores.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    torch.testing.assert_close(weights.double(), want, atol=1e-6, rtol=0)


def test_what_it_follows_from_was_not_kept() -> None:
    call = hookattn.trace(Model(), draw(1, 2, 8, 4, seed=1), capture=("q", "k", "v"))[0]
    with pytest.raises(FieldNotCaptured, match="'weights' of attention was not captured"):
        _ = call.weights
