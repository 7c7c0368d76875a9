"""The models that are measured, with random weights: the size is what counts."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 8  # where the vocabulary head is left out: too small to be felt, and every peer can still load the model


class PlainBlock(nn.Module):
    """A pre-norm block as a researcher writes it; no adapter knows it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """B T C -> B T C."""
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


def unknown_model(layers: int, width: int, heads: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model that no library knows."""
    torch.manual_seed(0)
    blocks = [PlainBlock(width, heads) for _ in range(layers)]
    return nn.Sequential(*blocks).to(device, dtype).eval()


def gpt2(
    layers: int,
    width: int,
    heads: int,
    tokens: int,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    implementation: str = "sdpa",
) -> nn.Module:
    """A GPT-2 of transformers."""
    from transformers import GPT2Config

    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=tokens,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _made("GPT2LMHeadModel", config, device, dtype, implementation)


def llama(
    layers: int,
    width: int,
    heads: int,
    key_heads: int,
    tokens: int,
    inner: int,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    implementation: str = "sdpa",
) -> nn.Module:
    """A Llama of transformers; ``inner``: the width between the two maps of its MLPs."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=tokens,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _made("LlamaForCausalLM", config, device, dtype, implementation)


def _made(name: str, config: Any, device: torch.device, dtype: torch.dtype, implementation: str = "sdpa") -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config._attn_implementation = implementation
    config.use_cache = False  # it would keep what a trace keeps
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return getattr(transformers, name)(config).eval()  # type: ignore[no-any-return]
    finally:
        torch.set_default_dtype(before)


def sibling(model: nn.Module, implementation: str | None = None) -> nn.Module:
    """The same weights (not copied) in modules of its own, in another attention implementation."""
    made = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    if implementation is not None:
        made.set_attn_implementation(implementation)  # type: ignore[operator]
    return made
