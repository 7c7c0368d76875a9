"""Trace the stages of a pipeline, each of which has some layers, and put them together.

    torchrun --nproc-per-node 2 examples/pipeline.py
    hookattn merge stage.rank*.safetensors --steps batches -o run.safetensors

Each microbatch is a step of each stage; `--steps batches` puts them together along the batch. Modules keep the names
that they have in the whole model, so that their paths and layers are those of the whole.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import scaled_dot_product_attention

import hookattn

LAYERS, WIDTH, HEADS, MICROBATCHES = 4, 32, 4, 2


class Block(nn.Module):
    """Attention and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """B T C to B T C."""
        b, t, c = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        made = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(made.transpose(1, 2).reshape(b, t, c))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Some of the layers, by the names that they have in the whole."""

    def __init__(self, first: int, last: int):
        super().__init__()
        torch.manual_seed(0)
        every = [Block() for _ in range(LAYERS)]
        self.layers = nn.ModuleDict({str(i): every[i] for i in range(first, last)})

    def forward(self, x: Tensor) -> Tensor:
        """B T C to B T C."""
        for layer in self.layers.values():
            x = layer(x)
        return x


def inputs() -> Tensor:
    """The whole batch."""
    return torch.randn(4, 10, WIDTH, generator=torch.Generator().manual_seed(1))


def main() -> None:
    """One rank."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    each = LAYERS // ranks
    module = Stage(rank * each, (rank + 1) * each).eval()
    schedule = ScheduleGPipe(PipelineStage(module, rank, ranks, torch.device("cpu")), MICROBATCHES)
    name = f"stage.rank{rank:02}-of-{ranks:02}.safetensors"
    with torch.no_grad(), hookattn.tracing(module, to=name) as trace:
        schedule.step(*([inputs()] if rank == 0 else []))
    print(f"{trace.path}: layers {sorted({call.site.layer for call in trace})}, {len(trace)} calls")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
