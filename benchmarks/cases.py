"""The sizes that are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .clock import Variant
from .variants import eager_rows, fused_rows, generation_rows

TOY = "toy (4 layers, width 64, 32 tokens)"
SMALL = "small (12 layers, width 768, 512 tokens)"
LLAMA = "Llama (8 layers, 8 heads on 4 key heads, width 512, 512 tokens)"
SMALL_EAGER = "small, eager (12 layers, width 768, 512 tokens)"
LONG = "long (4 layers, width 768, 2048 tokens, no vocabulary head)"
GENERATION = "generation (Llama of 12 layers, 16 tokens and 64 new ones)"
LARGE = "8B-shaped (32 layers, width 4096, 2048 tokens, bfloat16)"

Rows = Callable[[nn.Module, Tensor], list[Variant]]


@dataclass(frozen=True)
class Case:
    """A model and an input.

    Attributes:
        name: says what it is.
        make: the model, on a device.
        tokens, batch, dtype: of the input.
        layers, heads: of the model, for what it will take.
        width: of the input, where it is no token ids.
        places: the devices that it is measured on unless it is asked for by name.
        weight: its share of the time.
        rows: the rows of its table.
        steps: forwards of one run of a row.
        context_every: rows that no bar is about are measured in every such round alone.
        has_bars: whether any bar is about it.
    """

    name: str
    make: Callable[[torch.device], nn.Module]
    tokens: int
    layers: int
    heads: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    width: int = 0
    places: tuple[str, ...] = ("cpu", "cuda")
    weight: float = 1.0
    rows: Rows = fused_rows
    steps: int = 1
    context_every: int = 1
    has_bars: bool = False

    @property
    def calls(self) -> int:
        """Attention calls of one run of a row."""
        return self.layers * self.steps

    def inputs(self, device: torch.device) -> Tensor:
        """Token ids, or vectors."""
        made = torch.Generator().manual_seed(0)
        if self.width:
            return torch.randn(self.batch, self.tokens, self.width, generator=made).to(device, self.dtype)
        return torch.randint(0, models.VOCABULARY, (self.batch, self.tokens), generator=made).to(device)


def _gpt2(
    name: str,
    layers: int,
    width: int,
    heads: int,
    tokens: int,
    vocabulary: int = models.VOCABULARY,
    dtype: torch.dtype = torch.float32,
    implementation: str = "sdpa",
    **of_case: Any,
) -> Case:
    def make(device: torch.device) -> nn.Module:
        return models.gpt2(layers, width, heads, tokens, vocabulary, device, dtype, implementation)

    return Case(name, make, tokens, layers, heads, dtype=dtype, **of_case)


def llama_of(layers: int, device: torch.device) -> nn.Module:
    """The Llama of the CPU's cases: 8 heads on 4 key heads, width 512, up to 512 tokens."""
    return models.llama(layers, 512, 8, 4, 512, 1408, 1000, device, torch.float32)


def _llama(name: str, layers: int, tokens: int, **of_case: Any) -> Case:
    return Case(name, partial(llama_of, layers), tokens, layers, 8, places=("cpu",), has_bars=True, **of_case)


def _llama_8b(name: str, layers: int, tokens: int, **of_case: Any) -> Case:
    def make(device: torch.device) -> nn.Module:
        return models.llama(layers, 4096, 32, 8, tokens, 14336, models.VOCABULARY, device, torch.bfloat16)

    return Case(name, make, tokens, layers, 32, dtype=torch.bfloat16, places=("cuda",), **of_case)


def _unknown_case(name: str, layers: int, width: int, heads: int, tokens: int, weight: float = 1.0) -> Case:
    def make(device: torch.device) -> nn.Module:
        return models.unknown_model(layers, width, heads, device, torch.float32)

    return Case(name, make, tokens, layers, heads, width=width, weight=weight)


def cases() -> Iterator[Case]:
    """From the smallest to the largest."""
    half = torch.bfloat16
    large = partial(fused_rows, ends=False)  # of a forward that takes far longer than a trace's two ends
    yield _gpt2(TOY, 4, 64, 4, 32, vocabulary=1000, weight=1.5, has_bars=True)
    yield _gpt2("toy, batch 16", 4, 64, 4, 32, batch=16, vocabulary=1000, weight=0.4)
    yield _unknown_case("plain toy, no adapter (4 layers, width 64, 32 tokens)", 4, 64, 4, 32, weight=0.4)
    yield _gpt2("small, 128 tokens, batch 16", 12, 768, 12, 128, batch=16, places=("cuda",))
    yield _gpt2("small, 128 tokens, bfloat16", 12, 768, 12, 128, dtype=half, weight=0.4, context_every=3)
    yield _llama(LLAMA, 8, 512, weight=2, rows=large, context_every=4)
    yield _gpt2(SMALL, 12, 768, 12, 512, vocabulary=50257, weight=2.5, rows=large, context_every=5, has_bars=True)
    yield _gpt2(
        SMALL_EAGER,
        12,
        768,
        12,
        512,
        vocabulary=50257,
        implementation="eager",
        weight=1.5,
        rows=eager_rows,
        has_bars=True,
    )
    yield _gpt2(LONG, 4, 768, 12, 2048, weight=3, rows=large, context_every=8, has_bars=True)
    steps = 64
    rows = partial(generation_rows, steps=steps)
    yield _llama(GENERATION, 12, 16, weight=1.5, rows=rows, steps=steps, context_every=3)
    yield _gpt2("longer (4 layers, width 768, 8192 tokens)", 4, 768, 12, 8192, places=("cuda",))
    yield _gpt2("longest (1 layer, width 768, 32768 tokens)", 1, 768, 12, 32768, places=("cuda",))
    yield _llama_8b(LARGE, 32, 2048, weight=2, has_bars=True)
    yield _llama_8b("8B-shaped, 512 tokens, batch 16", 32, 512, batch=16)
    yield _llama_8b("8B-shaped (8 layers), 8192 tokens", 8, 8192)
    yield _llama_8b("8B-shaped (2 layers), 32768 tokens", 2, 32768)


def bytes_taken(case: Case, eager: bool, kept: int) -> int:
    """About how many bytes a row takes beside the untraced forward.

    Args:
        case: the case.
        eager: whether the scores of a layer are formed by eager arithmetic, in several copies.
        kept: what is kept.
    """
    scores = case.batch * case.heads * case.tokens**2
    temporary = 5 * scores * max(case.dtype.itemsize, 4) if eager else 2 * scores * 4 if kept else 0
    return kept + temporary
