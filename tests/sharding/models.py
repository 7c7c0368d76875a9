"""Attention as it runs in several processes: small models, cut along a mesh in the ways that people do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH, HEAD = 24, 6
FIELDS = ("q", "k", "v", "scores", "weights", "output")


class Attention(nn.Module):
    """Grouped attention of as many heads as its projections have rows for.

    Args:
        heads, groups: of the whole.
        fused: whether one projection makes queries, keys and values.
        eager: whether it is written out by hand.
        taken: which of the key heads its own heads read; None: all of those that its projection makes.
    """

    def __init__(
        self, heads: int = 4, groups: int = 4, fused: bool = False, eager: bool = False, taken: slice | None = None
    ):
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.eager, self.taken = fused, eager, taken
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * heads * HEAD)
        else:
            self.q = nn.Linear(WIDTH, heads * HEAD)
            self.k, self.v = (nn.Linear(WIDTH, groups * HEAD) for _ in "kv")
        self.o = nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        made = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (m.reshape(b, t, -1, HEAD).transpose(1, 2) for m in made)
        if self.taken is not None:
            k, v = k[:, self.taken], v[:, self.taken]
        if self.eager:
            groups = q.shape[1] // k.shape[1]
            k, v = (m.repeat_interleave(groups, 1) if groups > 1 else m for m in (k, v))
            z = torch.softmax(q @ k.transpose(-1, -2) / HEAD**0.5, -1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return self.o(z.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]


class PerHead(nn.Module):
    """Attention whose parameters have an axis of heads."""

    def __init__(self, heads: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(heads, WIDTH, HEAD) / 5) for _ in "qkv")
        self.o = nn.Parameter(torch.randn(heads, HEAD, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btw,hwd->bhtd", x, here(p)) for p in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v)
        out = torch.einsum("bhtd,hdw->btw", z, here(self.o))
        if isinstance(self.o, DTensor):
            dist.all_reduce(out)
        return out


class Block(nn.Module):
    """Attention and a feed-forward layer in one module, of which the attention is no module of its own."""

    def __init__(self, heads: int = 4, inner: int = 48):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(heads * HEAD, heads * HEAD) for _ in "qkvo")
        self.up, self.down = nn.Linear(heads * HEAD, inner), nn.Linear(inner, heads * HEAD)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).reshape(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.relu(self.up(x)))  # type: ignore[no-any-return]


def here(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def inputs(b: int = 2, t: int = 5) -> Tensor:
    """B T width."""
    return torch.randn(b, t, WIDTH, generator=torch.Generator().manual_seed(1))


def mesh(**sizes: int) -> DeviceMesh:
    """One with these dimensions."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def by_columns(model: nn.Module, along: DeviceMesh, *names: str, out: str = "o", local: bool = True) -> nn.Module:
    """Projections cut by heads, and the one after the attention by what it takes."""
    styles: dict[str, Any] = {name: ColwiseParallel(use_local_output=local) for name in names}
    return parallelize_module(model, along, styles | {out: RowwiseParallel()})


def place(model: nn.Module, along: DeviceMesh, placements: Callable[[str], list[Placement]]) -> nn.Module:
    """Every parameter made a distributed tensor; ``placements``: by its name."""
    for name, x in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        made = nn.Parameter(distribute_tensor(x.detach(), along, placements(name)))
        setattr(model.get_submodule(path), leaf, made)
    return model


def everywhere(along: DeviceMesh) -> Callable[[str], list[Placement]]:
    """Each process has all of each parameter."""
    return lambda name: [Replicate()] * along.ndim


def spread(x: Tensor, along: DeviceMesh, dim: int) -> Tensor:
    """A tensor cut along one of its axes."""
    return distribute_tensor(x, along, [Shard(dim)])
