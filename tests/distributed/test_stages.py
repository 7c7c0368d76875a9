"""Stages of a pipeline: each microbatch is a step, with the paths and layers of the whole model; no rehearsal is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from tests.ranks import run_ranks

LAYERS, MICROBATCHES = 4, 4


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(32, 96), fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, 2, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.mT) / 4).softmax(-1) @ v
        return out.transpose(1, 2).reshape(b, t, 32)


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), Attention(fused)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Its layers are in a dictionary, so that a part of it can have some of them under their own numbers."""

    def __init__(self, fused: bool, kept: Any = range(LAYERS)) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            blocks = {str(i): Block(fused) for i in range(LAYERS)}
        self.blocks = nn.ModuleDict({str(i): blocks[str(i)] for i in kept})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


def batch() -> Tensor:
    return torch.randn(2 * MICROBATCHES, 6, 32, generator=torch.Generator().manual_seed(1))


def cut_by_hand(rank: int, fused: bool) -> tuple[Any, nn.Module]:
    from torch.distributed.pipelining import PipelineStage

    model = Net(fused, kept=(2 * rank, 2 * rank + 1))
    return PipelineStage(model, rank, 2, torch.device("cpu")), model


def cut_by_torch(rank: int, fused: bool) -> tuple[Any, nn.Module]:
    from torch.distributed.pipelining import SplitPoint, pipeline

    whole = pipeline(Net(fused), mb_args=(batch()[:2],), split_spec={"blocks.2": SplitPoint.BEGINNING})
    stage = whole.build_stage(rank, torch.device("cpu"))
    return stage, stage.submod


def told(trace: hookattn.Trace) -> list[Any]:
    calls = [
        (call.step, call.site.path, call.site.layer, call.entry, call.certificate.status, call.weights.detach().clone())
        for call in trace
    ]
    return [calls, trace.skipped, trace.notes]


def stage_run(rank: int, cut: str, schedule: str, fused: bool, train: bool) -> list[Any]:
    from torch.distributed import pipelining

    warnings.simplefilter("error", hookattn.UnfaithfulWarning)
    stage, model = cut_by_torch(rank, fused) if cut == "by torch" else cut_by_hand(rank, fused)
    loss = F.mse_loss if train else None
    runs = getattr(pipelining, schedule)(stage, n_microbatches=MICROBATCHES, loss_fn=loss)
    x, target = batch(), {"target": torch.zeros(2 * MICROBATCHES, 6, 32)} if train and rank else {}
    with hookattn.tracing(model, strict=True) as trace:
        (runs.step if train else runs.eval)(*[x] * (rank == 0), **target)
        (runs.step if train else runs.eval)(*[x] * (rank == 0), **target)  # shapes are known by now
    return told(trace)


CASES = {
    "GPipe": ("by hand", "ScheduleGPipe", True, False),
    "GPipe, eager, train": ("by hand", "ScheduleGPipe", False, True),
    "1F1B, train": ("by hand", "Schedule1F1B", True, True),
    "graphs, GPipe": ("by torch", "ScheduleGPipe", True, False),
    "graphs, 1F1B, eager, train": ("by torch", "Schedule1F1B", False, True),
}


def every_run(rank: int) -> dict[str, list[Any]]:
    return {name: stage_run(rank, *case) for name, case in CASES.items()} | {"interleaved": interleaved_run(rank)}


@pytest.fixture(scope="module")
def runs() -> list[dict[str, list[Any]]]:
    """What each rank has seen of each case: one group runs all of them."""
    return run_ranks(2, every_run, limit=180)


@pytest.mark.parametrize("name", CASES)
def test_each_microbatch_is_a_step(runs: list[dict[str, list[Any]]], name: str) -> None:
    whole = hookattn.trace(Net(fused=CASES[name][2]), batch())
    for rank, said in enumerate(runs):
        calls, skipped, notes = said[name]
        assert (skipped, notes) == ([], [])
        layers = (2 * rank, 2 * rank + 1)
        steps = range(2 * MICROBATCHES)
        assert [call[:3] for call in calls] == [(step, f"blocks.{n}.attn", n) for step in steps for n in layers]
        assert {call[3:5] for call in calls} == {("", "faithful")}
        for step, _, layer, _, _, weights in calls:
            part = step % MICROBATCHES
            expected = whole[layer].weights[2 * part : 2 * part + 2]
            assert float((weights - expected).abs().max()) < 1e-6


def interleaved_run(rank: int) -> list[Any]:
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

    warnings.simplefilter("error", hookattn.UnfaithfulWarning)
    parts = [Net(False, kept=(rank + 2 * i,)) for i in range(2)]
    stages = [PipelineStage(part, rank + 2 * i, LAYERS, torch.device("cpu")) for i, part in enumerate(parts)]
    runs = ScheduleInterleaved1F1B(stages, n_microbatches=MICROBATCHES, loss_fn=F.mse_loss)
    target = {"target": torch.zeros(2 * MICROBATCHES, 6, 32)} if rank else {}
    with hookattn.tracing(nn.ModuleList(parts), strict=True) as trace:
        runs.step(*[batch()] * (rank == 0), **target)
    return told(trace)


def test_several_stages_of_one_rank(runs: list[dict[str, list[Any]]]) -> None:
    whole = hookattn.trace(Net(False), batch())
    for rank, said in enumerate(runs):
        calls, skipped, notes = said["interleaved"]
        assert (skipped, notes) == ([], [])
        for place, layer in enumerate((rank, rank + 2)):
            own = [call for call in calls if call[1].endswith(f"blocks.{layer}.attn")]
            assert len(own) == MICROBATCHES, place
            weights = torch.cat([call[-1] for call in own])
            assert float((weights - whole[layer].weights).abs().max()) < 1e-6
