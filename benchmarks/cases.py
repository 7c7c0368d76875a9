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
from .hands import HANDS, LOOP, plain_gpt
from .libraries import LibraryModel, library_models
from .variants import (
    eager_generation_rows,
    eager_rows,
    edited_rows,
    fused_rows,
    generation_rows,
    plain_rows,
    training_rows,
)

TOY = "toy (4 layers, width 64, 32 tokens)"
SMALL = "small (12 layers, width 768, 512 tokens)"
LLAMA = "Llama (8 layers, 8 heads on 4 key heads, width 512, 512 tokens)"
TOY_EAGER = "toy, eager (4 layers, width 64, 32 tokens)"
SMALL_EAGER_32 = "small, eager (12 layers, width 768, 32 tokens)"
SMALL_EAGER_128 = "small, eager (12 layers, width 768, 128 tokens)"
SMALL_EAGER = "small, eager (12 layers, width 768, 512 tokens)"
LONG = "long (4 layers, width 768, 2048 tokens, no vocabulary head)"
TRAINING = "training (12 layers, width 768, 512 tokens)"
EDITED = "edited (12 layers, width 768, 512 tokens)"
GENERATION = "generation (Llama of 12 layers, 16 tokens and 64 new ones)"
GENERATION_EAGER = "generation, eager (Llama of 12 layers, 16 tokens and 64 new ones)"
LARGE = "8B-shaped (32 layers, width 4096, 2048 tokens, bfloat16)"

# Groups, for who wants only some of them: attention written out by hand, other libraries' models, and fused kernels.
HAND, LIBRARIES, FUSED = "hand", "libraries", "fused"
GROUPS = (HAND, LIBRARIES, FUSED)

Rows = Callable[[nn.Module, Any], list[Variant]]


@dataclass(frozen=True)
class Case:
    """A model and an input.

    Attributes:
        name: says what it is.
        make: the model, on a device.
        tokens, batch, dtype: of the input.
        layers, heads: of the model, for what it will take; a layer is an attention call.
        width: of the input, where it is no token ids.
        places: the devices that it is measured on unless it is asked for by name.
        weight: its share of the time.
        rows: the rows of its table.
        steps: forwards of one run of a row.
        context_every: rows that no bar is about are measured in every such round alone.
        has_bars: whether any bar is about it.
        group: one of ``GROUPS``.
        given: makes the input, where it is neither token ids nor vectors: the arguments of the model.
        missing: the library that it needs and that is not installed.
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
    group: str = FUSED
    given: Callable[[], tuple[Tensor, ...]] | None = None
    missing: str | None = None

    @property
    def calls(self) -> int:
        """Attention calls of one run of a row."""
        return self.layers * self.steps

    def inputs(self, device: torch.device) -> Any:
        """Token ids, or vectors, or a tuple of several arguments."""
        if self.given is not None:
            return tuple(x.to(device) for x in self.given())
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


def llama_of(layers: int, implementation: str, device: torch.device) -> nn.Module:
    """The Llama of the CPU's cases: 8 heads on 4 key heads, width 512, up to 512 tokens."""
    return models.llama(layers, 512, 8, 4, 512, 1408, 1000, device, torch.float32, implementation)


def _llama(name: str, layers: int, tokens: int, implementation: str = "sdpa", **of_case: Any) -> Case:
    make = partial(llama_of, layers, implementation)
    return Case(name, make, tokens, layers, 8, places=("cpu",), has_bars=True, **of_case)


def _llama_8b(name: str, layers: int, tokens: int, **of_case: Any) -> Case:
    def make(device: torch.device) -> nn.Module:
        return models.llama(layers, 4096, 32, 8, tokens, 14336, models.VOCABULARY, device, torch.bfloat16)

    return Case(name, make, tokens, layers, 32, dtype=torch.bfloat16, places=("cuda",), **of_case)


def _unknown_case(name: str, layers: int, width: int, heads: int, tokens: int, weight: float = 1.0) -> Case:
    def make(device: torch.device) -> nn.Module:
        return models.unknown_model(layers, width, heads, device, torch.float32)

    return Case(name, make, tokens, layers, heads, width=width, weight=weight)


def plain_name(hand: str, toy: bool) -> str:
    """The name of the case of one of ``HANDS``."""
    return f"plain GPT, {hand} ({'4 layers, width 64, 32 tokens' if toy else '12 layers, width 768, 128 tokens'})"


def _plain(hand: str, toy: bool) -> Case:
    layers, width, heads, tokens = (4, 64, 4, 32) if toy else (12, 768, 12, 128)

    def make(device: torch.device) -> nn.Module:
        return plain_gpt(hand, layers, width, heads, tokens, 1000, device)

    weight = 0.3 if toy else 0.8
    of_case: dict[str, Any] = {"places": ("cpu",), "rows": plain_rows, "has_bars": True, "group": HAND}
    calls, heads_of_one = (layers * heads, 1) if hand == LOOP else (layers, heads)
    return Case(plain_name(hand, toy), make, tokens, calls, heads_of_one, weight=weight, **of_case)


def _library(model: LibraryModel) -> Case:
    def make(device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        return model.make().to(device).eval()

    return Case(
        model.name,
        make,
        model.tokens,
        model.calls,
        model.heads,
        places=("cpu",),
        weight=0.2 if model.toy else 0.6,
        rows=plain_rows,
        has_bars=not model.toy,
        group=LIBRARIES,
        given=model.given,
        missing=model.package if model.missing else None,
    )


def cases() -> Iterator[Case]:
    """What is written by hand, what other libraries have, and what calls fused kernels."""
    yield from _by_hand()
    yield from map(_library, library_models())
    yield from _fused()


def _by_hand() -> Iterator[Case]:
    of_case: dict[str, Any] = {"implementation": "eager", "has_bars": True, "group": HAND}
    large = partial(eager_rows, ends=False)  # of a forward that takes far longer than a trace's two ends
    yield _gpt2(TOY_EAGER, 4, 64, 4, 32, 1000, weight=1, rows=eager_rows, places=("cpu",), **of_case)
    for name, tokens in ((SMALL_EAGER_32, 32), (SMALL_EAGER_128, 128)):
        yield _gpt2(name, 12, 768, 12, tokens, 50257, weight=1, rows=large, places=("cpu",), **of_case)
    yield _gpt2(SMALL_EAGER, 12, 768, 12, 512, 50257, weight=2, rows=large, context_every=3, **of_case)
    for toy in (True, False):
        yield from (_plain(hand, toy) for hand in HANDS)
    steps = 64
    rows = partial(eager_generation_rows, steps=steps)
    yield _llama(GENERATION_EAGER, 12, 16, "eager", weight=1.5, rows=rows, steps=steps, context_every=3, group=HAND)


def _fused() -> Iterator[Case]:
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
        TRAINING, 12, 768, 12, 512, vocabulary=50257, weight=2, rows=training_rows, context_every=3, places=("cpu",),
        has_bars=True,
    )  # fmt: skip
    yield _gpt2(
        EDITED, 12, 768, 12, 512, vocabulary=50257, weight=2, rows=edited_rows, context_every=3, has_bars=True
    )  # fmt: skip
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
