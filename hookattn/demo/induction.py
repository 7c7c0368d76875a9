"""A two-layer, attention-only causal transformer that has learned to copy.

Shown a random segment twice, it predicts every token of the second copy but the first. Two kinds of head do the work:
in the first layer a previous-token head writes "the token before me was x" into each position; in the second layer
induction heads look for the position whose previous token is the current one, and copy what stands there. Where there
is nothing to copy, they mostly rest on the BOS token.

The module is plain PyTorch and knows nothing of the rest of the package: to a tracer it is a stranger's model.
`examples/train_induction.py` makes the weights.

Shapes: B batch, T positions, C model width, H heads, D head width (C = H * D), V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

BOS = 0
"""The token every sequence starts with; it occurs nowhere else."""

WEIGHTS_FILE = "induction.safetensors"


@dataclass(frozen=True)
class InductionConfig:
    """The sizes of an `InductionTransformer`."""

    vocab_size: int = 128
    context: int = 64
    d_model: int = 64
    n_heads: int = 4
    n_layers: int = 2
    rope_base: float = 10_000.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to `x` (B H T D), with `cos` and `sin` (T D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with rotary positions and one fused projection."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        # Rotary rather than learned positions: only in the first copy of a segment is a previous-token head needed, and
        # the late positions hardly ever hold one. A relative scheme learns "one back" for all positions at once.
        d_head = config.d_model // config.n_heads
        frequency = config.rope_base ** (-torch.arange(0, d_head, 2) / d_head)
        angle = torch.outer(torch.arange(config.context, dtype=frequency.dtype), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query, key and value (each B H T D) of `x` (B T C), query and key already rotated."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = self.cos[:length], self.sin[:length]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (B T C) to B T C."""
        q, k, v = self.project(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    """One pre-norm residual layer. There is no MLP: copying needs none, and the heads are all there is to see."""

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.attn = CausalSelfAttention(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (B T C) to B T C."""
        residual: Tensor = self.attn(self.norm(x))
        return x + residual


class InductionTransformer(nn.Module):
    """The demo model: token embedding, blocks of attention, final norm, unembedding.

    Args:
        config: the sizes; the default ones are those of the weights that ship.
    """

    def __init__(self, config: InductionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or InductionConfig()
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the next-token logits (B T V) of `tokens` (B T, int64)."""
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the context of {self.config.context}")
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.unembed(self.norm(x))
        return logits


def load_pretrained() -> InductionTransformer:
    """Return the trained model that ships with the package, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: if the weights file is not next to this module.
    """
    resource = files("hookattn.demo").joinpath(WEIGHTS_FILE)
    if not resource.is_file():
        raise FileNotFoundError(
            f"the demo model's weights are missing: no {WEIGHTS_FILE} in the package hookattn.demo. "
            "Reinstall hookattn, or train them in a checkout with: python examples/train_induction.py"
        )
    with as_file(resource) as path, safe_open(path, framework="pt") as file:
        training = json.loads(file.metadata()["training"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = InductionTransformer(InductionConfig(**training["config"]))
    model.load_state_dict(state)
    return model.eval()


def example_tokens(seed: int = 0, *, length: int = 24) -> Tensor:
    """Return BOS and a random segment twice over, int64 of shape 1 by 1 + 2 * length: what the model is evaluated on.

    The first copy cannot be predicted; all of the second but its first token can.

    Args:
        seed: which segment; the same seed always gives the same one.
        length: tokens in the segment, all different, so that each has exactly one earlier occurrence. At most 31 fit
            into the context of the shipped model.
    """
    config = InductionConfig()
    longest = (config.context - 1) // 2
    if not 1 <= length <= longest:
        raise ValueError(f"length must be between 1 and {longest}, not {length}")
    generator = torch.Generator().manual_seed(seed)
    segment = 1 + torch.randperm(config.vocab_size - 1, generator=generator)[:length]
    return torch.cat([torch.tensor([BOS]), segment, segment])[None]
