"""Models whose weights are asked for, where each tool finds them, and what they are in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SMALL = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
HEADS, WIDTH, NEW = 4, 8, 3


def ids(length: int = 6) -> Tensor:
    """Token ids, 2 by ``length``."""
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


def _pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Own(nn.Module):
    """Somebody's own causal attention: of a fused kernel, or in plain operations."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.out = fused, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """B T 32, before and after."""
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            weights = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(hidden, -torch.inf).softmax(-1)
            mixed = weights @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def weights_of(q: Tensor, k: Tensor, causal: bool = True) -> Tensor:
    """The softmax of q·k, written out: B H T S."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1)


def projected(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of a projection to q, k and v, B H T D each."""
    q, k, _ = F.linear(x, weight, bias).chunk(3, -1)
    return (q.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2), k.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2))


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        name: of it in code.
        title: what is asked for.
        cls, config: of transformers; without them it is ``own``.
        settings: of the configuration.
        inputs: keyword arguments of the model.
        path: of the module of the last attention, as the model has it.
        lens: the same module, as a bridge of TransformerLens calls it.
        key: of the output of ``output_attentions``.
        own: makes a model that nobody else knows.
        expected: the weights of such a model, of it and its input in float64.
        field: what is asked for, of the last attention: weights, or scores.
        new: tokens to generate.
        loaded: the kernel that the model is loaded with, if nobody says otherwise.
    """

    name: str
    title: str
    cls: str = ""
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Tensor]] = lambda: {"input_ids": ids()}
    path: str = ""
    lens: str = "blocks.1.attn"
    key: str = "attentions"
    own: Callable[[], nn.Module] | None = None
    expected: Callable[[Any, Tensor], Tensor] | None = None
    field: str = "weights"
    new: int = 0
    loaded: str = "sdpa"

    def model(self, attention: str = "") -> Any:
        """The model with weights that are the same in every run, in a kernel of transformers."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.own is not None:
                return self.own().eval()
            import transformers

            config = getattr(transformers, self.config)(**self.settings, attn_implementation=attention or self.loaded)
            return getattr(transformers, self.cls)(config).eval()

    def reference(self) -> Tensor:
        """What is asked for, in float64: B H T S."""
        with torch.no_grad():
            return self._reference()

    def _reference(self) -> Tensor:
        model = self.model("eager").double()
        given = {name: x.double() if x.is_floating_point() else x for name, x in self.inputs().items()}
        if self.expected is not None:
            found: Tensor = self.expected(model, next(iter(given.values())))
        elif self.field == "scores":
            seen: list[Tensor] = []
            hook = model.get_submodule(self.path).c_attn.register_forward_hook(lambda _m, _a, out: seen.append(out))
            model(**given)
            hook.remove()
            q, k, _ = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in seen[0].chunk(3, -1))
            found = q @ k.mT / math.sqrt(WIDTH)
        elif self.new:
            found = generated(model, given, self.new).attentions[-1][-1]
        else:
            found = model(**given, output_attentions=True)[self.key][-1]
        return found


def generated(model: Any, given: dict[str, Tensor], new: int) -> Any:
    """What ``generate`` of transformers returns with the weights of each step."""
    return model.generate(
        **given, max_new_tokens=new, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )


def _own(model: Any, x: Tensor) -> Tensor:
    return weights_of(*projected(x, model.qkv.weight, model.qkv.bias))


def _layer(model: Any, x: Tensor) -> Tensor:
    return weights_of(*projected(x, model.self_attn.in_proj_weight, model.self_attn.in_proj_bias), causal=False)


def _vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))}


def _layer_inputs() -> dict[str, Tensor]:
    return {"src": _vectors()["x"]}


_GPT2: dict[str, Any] = {
    **{"cls": "GPT2LMHeadModel", "config": "GPT2Config", "path": "transformer.h.1.attn"},
    "settings": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, **WORDS},
}
CASES = (
    Case("gpt2", "GPT-2", **_GPT2),
    Case(
        "llama", "Llama with two key heads for four query heads", "LlamaForCausalLM", "LlamaConfig",
        {**SMALL, **WORDS, "num_key_value_heads": 2, "initializer_range": 0.3}, path="model.layers.1.self_attn",
    ),
    Case(
        "sinks", "gpt-oss, whose heads have learned sinks", "GptOssForCausalLM", "GptOssConfig",
        {**SMALL, **WORDS, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
         "experts_implementation": "eager",
         "initializer_range": 0.3}, path="model.layers.1.self_attn", loaded="eager",  # there is no sdpa with sinks
    ),
    Case(
        "cross", "T5: what the decoder sees of the encoder", "T5ForConditionalGeneration", "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 60, "pad_token_id": 0,
         "decoder_start_token_id": 0},
        lambda: {"input_ids": ids(), "decoder_input_ids": ids(4)},
        "decoder.block.1.layer.1.EncDecAttention", "decoder_blocks.1.cross_attn", "cross_attentions",
    ),
    Case(
        "image", "ViT of an image", "ViTModel", "ViTConfig",
        {**SMALL, "image_size": 16, "patch_size": 4, "initializer_range": 0.3},
        lambda: {"pixel_values": _pixels()}, "layers.1.attention",
    ),
    Case(
        "windows", "Swin, in windows", "SwinModel", "SwinConfig",
        {"image_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
         "initializer_range": 0.3},
        lambda: {"pixel_values": _pixels()}, "encoder.layers.1.blocks.1.attention",
    ),
    Case(
        "steps", "GPT-2, the last step of a generation with a cache", **_GPT2, new=NEW,
    ),
    Case("scores", "GPT-2: its scores, which have no mask in them", **_GPT2, field="scores"),
    Case("plain", "Somebody's own model, in plain operations", own=lambda: Own(False), inputs=_vectors, expected=_own),
    Case("fused", "Somebody's own model, of a fused kernel", own=lambda: Own(True), inputs=_vectors, expected=_own),
    Case(
        "layer", "The encoder layer of PyTorch, `torch.nn`", inputs=_layer_inputs, expected=_layer,
        own=lambda: nn.TransformerEncoderLayer(32, HEADS, 64, batch_first=True),
    ),
)  # fmt: skip
