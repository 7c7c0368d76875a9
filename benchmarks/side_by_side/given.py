"""What all experiments are given: one small GPT-2 with drawn weights, as each library takes it, and tokens to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYERS, HEADS, WIDTH = 3, 4, 8
VOCABULARY, PROMPT, NEW = 50, 8, 5


def gpt2(attention: str) -> nn.Module:
    """GPT-2 with weights that are the same in every run, large enough that no row of attention is flat.

    Args:
        attention: ``"eager"`` or ``"sdpa"``.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config: Any = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=HEADS * WIDTH, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0,
        eos_token_id=None, attn_implementation=attention, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(config)
    return model.eval()


def bridge() -> Any:
    """The same model as transformer-lens takes it."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model: Any = gpt2("eager")
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config).eval()


def wrapped(attention: str = "eager") -> Any:
    """The same model as nnsight takes it."""
    import nnsight

    return nnsight.NNsight(gpt2(attention))


def tokens(seed: int) -> Tensor:
    """Token ids, 2 by PROMPT."""
    return torch.randint(1, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(seed))
