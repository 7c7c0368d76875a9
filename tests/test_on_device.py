"""Traces where the model is: on the CPU, and on a GPU if there is one, against float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from benchmarks.models import unknown_model
from hookattn.calls.mask_rule import MaskRule
from hookattn.testing import check_clean
from tests import tiny_models as tiny
from tests.reference import as_sinks, masked_softmax, repeat_heads, run

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
# Of weights, for which the kernel's own rounding counts, and of scores in units of the largest.
NEAR = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], torch.dtype]] = {
    "gpt2": (tiny.gpt2, lambda: tiny.ids(9), torch.float32),
    "gpt2, eager, left-padded": (lambda: tiny.gpt2("eager"), lambda: tiny.padded("left"), torch.float32),
    "gpt2, larger": (
        lambda: tiny.gpt2(n_embd=256, n_positions=400, initializer_range=0.1),
        lambda: torch.arange(2 * 333).view(2, 333) * 7 % 60,
        torch.float32,
    ),
    "gpt2, larger, in half": (
        lambda: tiny.gpt2(n_embd=256, n_positions=400, initializer_range=0.1),
        lambda: torch.arange(2 * 333).view(2, 333) * 7 % 60,
        torch.float16,
    ),
    "llama, grouped": (tiny.llama, lambda: tiny.ids(9), torch.bfloat16),
    "llama, grouped, left-padded": (tiny.llama, lambda: tiny.padded("left"), torch.bfloat16),
    "bert, right-padded": (tiny.bert, lambda: tiny.padded("right"), torch.bfloat16),
    "with sinks and windows": (tiny.gpt_oss, lambda: tiny.ids(9), torch.float32),
    "known to nobody": (
        lambda: unknown_model(2, 128, 2, torch.device("cpu"), torch.float32),
        lambda: torch.randn(2, 300, 128, generator=torch.Generator().manual_seed(1)),
        torch.float32,
    ),
}
STATISTICS = ("entropy", "lse", "max_score", "received")


def moved(x: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(device, dtype if x.is_floating_point() else None)
    return {name: moved(value, device, dtype) for name, value in x.items()}


def made(name: str, device: str) -> tuple[nn.Module, Any, torch.dtype]:
    model, inputs, dtype = MODELS[name]
    return model().to(device, dtype), moved(inputs(), device, dtype), dtype


def traced(model: nn.Module, x: Any, **options: Any) -> hookattn.Trace:
    """A trace, with the outputs of the model as it is, after which nothing is left on it."""
    with torch.no_grad():
        untraced = run(model, x)
        trace = hookattn.trace(model, x, **options)
    tiny.assert_same_output(untraced, trace.output)
    check_clean(model)
    return trace


def explicit(call: hookattn.Call) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, weights and log-sum-exp of a call without a bias, in float64 on the CPU."""
    q, k, mask = call.q.cpu().double(), call.k.cpu().double(), call.mask.cpu()
    sinks = None if call.sinks is None else call.sinks.cpu()
    assert isinstance(call.scale, float) and call.softcap is None and call.bias is None
    scores = torch.einsum("bhtd,bhsd->bhts", q, repeat_heads(k, q.shape[1])) * call.scale
    joined = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        joined = torch.cat([joined, as_sinks(sinks, joined)], -1)
    return scores, masked_softmax(scores, mask, sinks), joined.logsumexp(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_everything(name: str, device: str, tmp_path: Path) -> None:
    model, x, dtype = made(name, device)
    trace = traced(model, x, verify="full")
    there = traced(model, x, device="cpu")
    traced(model, x, to=tmp_path / "x.safetensors")
    streamed = hookattn.load(tmp_path / "x.safetensors")
    assert len(trace) == len(there) == len(streamed) == 2 and not trace.skipped
    for call, copied, read in zip(trace, there, streamed, strict=True):
        assert call.certificate.faithful and copied.certificate.faithful and read.certificate.faithful
        assert call.notes == ()  # a GPU's kernel that does not take this would be noted
        assert call.dtype == dtype and call.q.device.type == device and copied.q.device.type == "cpu"
        scores, weights, _ = explicit(call)
        reach = scores.abs().max()
        assert (call.scores.cpu().double() - scores).abs().max() <= NEAR[dtype] * reach
        seen = call.mask.cpu().any(-1, keepdim=True)  # an eager model makes something of rows that see nothing
        gap = torch.where(seen, call.weights.cpu().double() - weights, 0.0)
        assert gap.abs().max() <= NEAR[dtype] * max(1.0, float(reach) / 16)
        for field in ("q", "k", "v", "scores", "mask", "weights", "output"):
            assert torch.equal(getattr(copied, field), getattr(call, field).cpu())
            assert torch.equal(getattr(read, field), getattr(call, field).cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_statistics(name: str, device: str) -> None:
    model, x, _ = made(name, device)
    trace = traced(model, x, capture=("q", "k", "bias", "mask", "sinks", *STATISTICS))
    lean = traced(model, x, capture=STATISTICS)
    for call, alone in zip(trace, lean, strict=True):
        assert call.notes == alone.notes == ()
        scores, weights, lse = explicit(call)
        seen = call.mask.cpu().any(-1).expand(lse.shape)
        near = 1e-4 * max(1.0, float(scores.abs().max()))
        entropy = torch.special.entr(weights).sum(-1)
        largest = scores.masked_fill(~call.mask.cpu(), -math.inf).amax(-1)
        wanted = {"entropy": entropy, "lse": lse, "max_score": largest}
        for made_of in (call, alone):
            for statistic, value in wanted.items():
                got = made_of.get(statistic)
                assert got is not None and got.device.type == device
                gap = (got.cpu().double() - value)[seen].abs().max()
                assert gap <= near, f"{statistic}: {gap}"
            received = made_of.get("received")
            assert received is not None
            torch.testing.assert_close(received.cpu().double(), weights.sum(2), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_and_what_was_planned(name: str, device: str) -> None:
    model, x, _ = made(name, device)
    choices: list[dict[str, Any]] = [{}, {"capture": ("q", "k", "v")}, {"capture": "weights", "heads": [1]}]
    for options in choices:
        held: dict[int, int] = {}
        for call in traced(model, x, **options):
            for place in (*call.fields.values(), *call.beside.values()):
                y = place.given if isinstance(place, MaskRule) else place
                if isinstance(y, torch.Tensor):
                    held[id(y)] = y.nbytes
        assert hookattn.plan(model, x, **options).total == sum(held.values())
