"""The table of transformers' families for the tests of the built-in adapters: a small model, inputs, and its sites.

A model is named by its class, with its options; or by its model type, and is then made small by the rules of the sweep,
with parameters drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hookattn_adapters
import torch
import transformers
from torch import Tensor, nn

from hookattn import Adapter
from hookattn.models.discovery import WatchPlan, make_watch_plan
from hookattn.models.registry import using
from tests.sweep.cases import small_config
from tests.sweep.classes import model_class
from tests.sweep.weights import draw

BY_NAME: dict[str, Adapter] = {adapter.name: adapter for adapter in hookattn_adapters.ADAPTERS}
SHARED = BY_NAME["transformers-shared"]
SMALL: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
WORDS: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT: dict[str, Any] = {**SMALL, "vocab_size": 60, "initializer_range": 0.3}
CROSS: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, **WORDS}
LLAMA: dict[str, Any] = {
    **SMALL,
    **WORDS,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "attention_dropout": 0.1,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 60,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 2.0,
}
VIT: dict[str, Any] = {**SMALL, "image_size": 8, "patch_size": 4, "initializer_range": 0.3}
ALBERT = {"num_hidden_groups": 2}
WAVES = {  # masked spans are drawn by numpy
    "apply_spec_augment": False,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
}


def ids(length: int = 6) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, slice(4, None) if side == "right" else slice(0, 2)] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def left() -> dict[str, Tensor]:
    return padded("left")


def right() -> dict[str, Tensor]:
    return padded("right")


def encoded(width: int = 32) -> dict[str, Tensor]:
    return {"input_ids": ids(), "encoder_hidden_states": seeded(2, 9, width)}


def wider() -> dict[str, Tensor]:
    return encoded(64)


def pair() -> dict[str, Tensor]:
    return {"input_ids": ids(7), "decoder_input_ids": ids(4)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": seeded(2, 3, 32, 32)}


def wave() -> dict[str, Tensor]:
    return {"input_values": seeded(2, 90)}


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Family(NamedTuple):
    """An adapter's name, a model's class or type and its options, inputs, and its sites.

    Each of ``sites``: stack, kind, path with a place for the layer; and the axes, where they are not the adapter's.
    """

    adapter: str
    model: str
    options: dict[str, Any]
    inputs: Callable[[], Any]
    sites: tuple[str, ...]

    def build(self, implementation: str) -> nn.Module:
        if self.model[0].isupper():
            kind = getattr(transformers, self.model)
            config = kind.config_class(**self.options)
            config._attn_implementation = implementation
            return kind(config).eval()  # type: ignore[no-any-return]
        config = small_config(self.model)
        for name, value in self.options.items():
            setattr(config, name, value)
        model = self.kind._from_config(config, attn_implementation=implementation)
        draw(model)
        return model.eval()

    @property
    def kind(self) -> Any:
        return getattr(transformers, self.model) if self.model[0].isupper() else model_class(self.model)

    @property
    def implementations(self) -> list[str]:
        return ["sdpa", "eager"] if self.kind._supports_sdpa else ["eager"]

    def plan(self, implementation: str) -> WatchPlan:
        with using(BY_NAME[self.adapter], SHARED):
            return make_watch_plan(self.build(implementation))

    def said(self) -> Iterator[tuple[str, str, str, str]]:
        """Stack, kind, path and axes of each site, for all layers at once."""
        for site in self.sites:
            stack, kind, path, *axes = site.split()
            yield stack, kind, path, axes[0] if axes else BY_NAME[self.adapter].axes

    def eager(self, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """What the model itself returns in eager mode with ``output_attentions``."""
        twin: Any = self.build("eager")
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            made = twin(**(inputs if isinstance(inputs, dict) else {"input_ids": inputs}), output_attentions=True)
        found = {}
        for stack, kind, path, _ in self.said():
            own = f"{stack}_attentions" if "encoder_attentions" in made else "attentions"
            weights = made["cross_attentions" if kind == "cross" else own]
            found.update({path.format(i): x for i, x in enumerate(weights)})
        return found


def pairs(before: str, self_attention: str, cross: str, frames: str = "") -> tuple[str, ...]:
    """An encoder and a decoder."""
    return (
        f"encoder self encoder.{before}.{{}}.{self_attention} {frames}",
        f"decoder self decoder.{before}.{{}}.{self_attention}",
        f"decoder cross decoder.{before}.{{}}.{cross}",
    )


LAYERS = ("decoder self layers.{}.self_attn",)
DECODER_LAYERS = ("decoder self decoder.layers.{}.self_attn",)
BERTS = ("encoder self encoder.layer.{}.attention.self",)
BERTS_CROSS = (
    "decoder self encoder.layer.{}.attention.self",
    "decoder cross encoder.layer.{}.crossattention.self",
)
BARTS = pairs("layers", "self_attn", "encoder_attn")
T5S = pairs("block", "layer.0.SelfAttention", "layer.1.EncDecAttention")
TEXT = ("text self encoder.layers.{}.self_attn tokens",)
VISION = ("vision self encoder.layers.{}.self_attn patches",)
VITS = ("vision self layers.{}.attention",)
SPEECH = ("audio self encoder.layers.{}.attention",)


def whisper() -> dict[str, Tensor]:
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[1, 3] = 0
    return {"input_features": seeded(2, 80, 16), "decoder_input_ids": ids(4), "decoder_attention_mask": mask}


# fmt: off
# Each math once, by the whole contract.
FAMILIES = {name: Family(*row) for name, *row in (
    ("albert", "albert", "albert", ALBERT, right,
        ("encoder self encoder.albert_layer_groups.{}.albert_layers.0.attention",)),
    ("bart", "bart", "bart", {}, pair, BARTS),
    ("beit", "beit", "beit", {"use_relative_position_bias": True}, image, VITS),
    ("bert", "bert", "BertModel", BERT, right, BERTS),
    ("bert-decoder", "bert", "BertLMHeadModel", {**BERT, **CROSS}, encoded,
        tuple(s.replace(" enc", " bert.enc") for s in BERTS_CROSS)),
    ("bloom", "bloom", "bloom", {}, left, ("decoder self h.{}.self_attention",)),
    ("clip-text", "clip", "clip_text_model", {}, ids, TEXT),
    ("clip-vision", "clip", "clip_vision_model", {}, image, VISION),
    ("deberta", "deberta", "deberta", {}, right, BERTS),
    ("deberta-v2", "deberta", "deberta-v2", {}, right, BERTS),
    ("deepseek", "deepseek", "deepseek_v3", {}, left, LAYERS),
    # Padded on the left, in float16 and eager, it makes NaN itself: lowest + a negative score is -inf, in a whole row.
    ("falcon", "falcon", "falcon", {}, right, ("decoder self h.{}.self_attention",)),
    ("falcon-alibi", "falcon", "falcon", {"alibi": True}, left, ("decoder self h.{}.self_attention",)),
    ("gemma2", "gemma", "gemma2", {}, left, LAYERS),
    ("gemma3", "gemma", "gemma3_text", {}, left, LAYERS),
    ("gpt2", "gpt2", "GPT2LMHeadModel", GPT2, ids, ("decoder self transformer.h.{}.attn",)),
    ("gpt2-cross", "gpt2", "GPT2LMHeadModel", {**GPT2, "add_cross_attention": True}, encoded,
        ("decoder self transformer.h.{}.attn", "decoder cross transformer.h.{}.crossattention")),
    ("gpt_neo", "gpt_neo", "gpt_neo", {}, left, ("decoder self h.{}.attn.attention",)),
    ("gpt_oss", "gpt_oss", "gpt_oss", {}, left, LAYERS),
    ("gptj", "gptj", "gptj", {}, left, ("decoder self h.{}.attn",)),
    ("llama", "llama", "LlamaForCausalLM", LLAMA, left, ("decoder self model.layers.{}.self_attn",)),
    ("mistral", "mistral", "mistral", {"sliding_window": 3}, left, LAYERS),
    ("modernbert", "modernbert", "modernbert", {}, right, ("encoder self layers.{}.attn",)),
    ("mpnet", "mpnet", "mpnet", {}, right, ("encoder self encoder.layer.{}.attention.attn",)),
    ("mpt", "mpt", "mpt", {}, left, ("decoder self blocks.{}.attn",)),
    ("t5", "t5", "T5ForConditionalGeneration", T5, pair, T5S),
    ("vit", "vit", "ViTForImageClassification", VIT, lambda: {"pixel_values": seeded(2, 3, 8, 8)},
        ("vision self vit.layers.{}.attention",)),
    ("wav2vec2", "wav2vec2", "wav2vec2", WAVES, wave, SPEECH),
    ("whisper", "whisper", "whisper", {"max_source_positions": 8}, whisper,
        pairs("layers", "self_attn", "encoder_attn", "frames")),
)}
# What is like one of those, or like another of its own adapter.
ALIKE = {name: Family(*row) for name, *row in (
    ("blenderbot", "bart", "blenderbot", {}, pair, BARTS),
    ("blenderbot-small", "bart", "blenderbot-small", {}, pair, BARTS),
    ("camembert", "roberta", "camembert", {}, right, BERTS),
    ("codegen", "gptj", "codegen", {}, left, ("decoder self h.{}.attn",)),
    ("cohere", "cohere", "cohere", {"use_qk_norm": True}, left, LAYERS),
    ("cohere2", "cohere", "cohere2", {}, left, LAYERS),
    ("deepseek_v2", "deepseek", "deepseek_v2", {}, left, LAYERS),
    ("deit", "deit", "deit", {}, image, VITS),
    ("dinov2", "dinov2", "dinov2", {}, image, ("vision self encoder.layer.{}.attention",)),
    ("dinov2-registers", "dinov2", "dinov2_with_registers", {}, image, ("vision self encoder.layer.{}.attention",)),
    ("dinov3", "dinov2", "dinov3_vit", {}, image, ("vision self model.layer.{}.attention",)),
    ("distilbert", "distilbert", "distilbert", {}, right, ("encoder self transformer.layer.{}.attention",)),
    ("electra", "roberta", "electra", {}, right, BERTS),
    ("ernie", "roberta", "ernie", {}, right, BERTS),
    ("esm", "esm", "esm", {"vocab_size": 60, "position_embedding_type": "rotary"}, right, BERTS),
    ("gemma", "gemma", "gemma", {}, left, LAYERS),
    ("glm", "glm", "glm", {}, left, LAYERS),
    ("glm4", "glm", "glm4", {}, left, LAYERS),
    ("gpt_bigcode", "gpt_bigcode", "gpt_bigcode", {}, left, ("decoder self h.{}.attn",)),
    ("gpt_neox", "gpt_neox", "gpt_neox", {}, left, ("decoder self layers.{}.attention",)),
    ("granite", "granite", "granite", {"attention_multiplier": 0.5}, left, LAYERS),
    ("granitemoe", "granite", "granitemoe", {"attention_multiplier": 0.5}, left, LAYERS),
    ("hubert", "wav2vec2", "hubert", WAVES, wave, SPEECH),
    ("m2m_100", "bart", "m2m_100", {}, pair, BARTS),
    ("marian", "bart", "marian", {}, pair, BARTS),
    ("mbart", "bart", "mbart", {}, pair, BARTS),
    ("ministral", "mistral", "ministral", {}, left, LAYERS),
    ("ministral3", "mistral", "ministral3", {}, left, LAYERS),
    ("mixtral", "mistral", "mixtral", {}, left, LAYERS),
    ("mt5", "mt5", "mt5", {}, pair, T5S),
    ("olmo", "olmo", "olmo", {"clip_qkv": 1.0}, left, LAYERS),
    ("olmo2", "olmo", "olmo2", {}, left, LAYERS),
    ("olmo3", "olmo", "olmo3", {}, left, LAYERS),
    ("olmoe", "olmo", "olmoe", {}, left, LAYERS),
    ("opt", "opt", "opt", {}, left, DECODER_LAYERS),
    ("pegasus", "bart", "pegasus", {}, pair, BARTS),
    ("phi", "phi", "phi", {"qk_layernorm": True}, left, LAYERS),
    ("phi3", "phi", "phi3", {}, left, LAYERS),
    ("plbart", "bart", "plbart", {}, pair, BARTS),
    ("qwen2", "qwen", "qwen2", {}, left, LAYERS),
    ("qwen2_moe", "qwen", "qwen2_moe", {}, left, LAYERS),
    ("qwen3", "qwen", "qwen3", {}, left, LAYERS),
    ("qwen3_moe", "qwen", "qwen3_moe", {}, left, LAYERS),
    ("roberta", "roberta", "roberta", {}, right, BERTS),
    ("roberta-decoder", "roberta", "roberta", CROSS, wider, BERTS_CROSS),
    ("roberta-prelayernorm", "roberta", "roberta-prelayernorm", {}, right, BERTS),
    ("siglip-text", "siglip", "siglip_text_model", {}, ids, TEXT),
    ("siglip-vision", "siglip", "siglip_vision_model", {"vision_use_head": False}, image, VISION),
    ("smollm3", "smollm3", "smollm3", {"no_rope_layers": [1, 0]}, left, LAYERS),
    ("stablelm", "stablelm", "stablelm", {}, left, LAYERS),
    ("starcoder2", "starcoder2", "starcoder2", {}, left, LAYERS),
    ("umt5", "mt5", "umt5", {}, pair, T5S),
    ("unispeech", "wav2vec2", "unispeech", WAVES, wave, SPEECH),
    ("xlm-roberta", "roberta", "xlm-roberta", {}, right, BERTS),
    ("xlm-roberta-xl", "roberta", "xlm-roberta-xl", {}, right, BERTS),
)}
# fmt: on
