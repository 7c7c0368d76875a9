"""Tiny transformers models with random weights large enough that their attention is far from uniform."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.testing import check_clean, check_trace
from hookattn.testing.clean import state_of
from tests import reference

transformers = pytest.importorskip("transformers")

STD = 0.35
WORDS: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "num_attention_heads": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "initializer_range": STD,
}


def build(kind: str, config: str, implementation: str = "sdpa", **options: Any) -> Any:
    """A model of transformers by class name; its weights depend on the configuration alone."""
    made = getattr(transformers, config)(**options)
    return from_config(kind, made, implementation)


def from_config(kind: str, config: Any, implementation: str = "sdpa") -> Any:
    """The same, from a configuration."""
    config._attn_implementation = implementation
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, kind)(config).eval()


def gpt2(implementation: str = "sdpa", **options: Any) -> Any:
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": STD, **WORDS, **options}
    return build("GPT2LMHeadModel", "GPT2Config", implementation, **options)


def bert(implementation: str = "sdpa", kind: str = "BertModel", **options: Any) -> Any:
    return build(kind, "BertConfig", implementation, **SMALL, vocab_size=60, **options)


def llama(implementation: str = "sdpa", **options: Any) -> Any:
    options = {"num_key_value_heads": 2, "attention_dropout": 0.1, **options}
    return build("LlamaForCausalLM", "LlamaConfig", implementation, **SMALL, **WORDS, **options)


def t5(implementation: str = "sdpa", **options: Any) -> Any:
    options = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "vocab_size": 60,
        "initializer_factor": 2.0,
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **options,
    }
    return build("T5ForConditionalGeneration", "T5Config", implementation, **options)


def vit(implementation: str = "sdpa", **options: Any) -> Any:
    return build("ViTModel", "ViTConfig", implementation, **SMALL, image_size=16, patch_size=4, **options)


def clip(implementation: str = "sdpa") -> Any:
    config = transformers.CLIPConfig(
        text_config={**SMALL, **WORDS, "max_position_embeddings": 16},
        vision_config={**SMALL, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = from_config("CLIPModel", config, implementation)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight *= 3
    return model


def gpt_oss(implementation: str = "eager") -> Any:
    return build(
        "GptOssForCausalLM",
        "GptOssConfig",
        implementation,
        **SMALL,
        **WORDS,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=4,
        attention_dropout=0.1,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )


def gemma2(implementation: str = "eager") -> Any:
    return build(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        implementation,
        **SMALL,
        **WORDS,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=4,
        attention_dropout=0.1,
    )


def bloom(implementation: str = "eager", **options: Any) -> Any:
    return build(
        "BloomForCausalLM",
        "BloomConfig",
        implementation,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=STD,
        attention_dropout=0.1,
        **WORDS,
        **options,
    )


def llava(implementation: str = "sdpa") -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SMALL, **WORDS, num_key_value_heads=2),
        image_token_index=5,
        vision_feature_layer=-1,
    )
    return from_config("LlavaForConditionalGeneration", config, implementation)


# --------------------------------------------------------------------------------------------------- inputs


def ids(length: int = 7, batch: int = 2) -> Tensor:
    """Tokens without padding or specials."""
    return torch.randint(6, 60, (batch, length), generator=torch.Generator().manual_seed(length))


def padded(side: str, length: int = 7, by: int = 3) -> dict[str, Tensor]:
    """Two rows, the second of them padded."""
    tokens, mask = ids(length), torch.ones(2, length, dtype=torch.long)
    cut = slice(0, by) if side == "left" else slice(length - by, None)
    tokens[1, cut], mask[1, cut] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def image(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


# ------------------------------------------------------------------------------------------------ what holds


@dataclasses.dataclass
class Case:
    """A model by implementation, its inputs, and where its own attentions come out."""

    name: str
    model: Callable[[str], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    attentions: dict[str, dict[str, str]]  # attribute (dotted) of the eager output -> selection of calls
    implementations: tuple[str, ...] = ("sdpa", "eager")


def run(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(3)
    return model(**inputs, **more)


def traced(model: nn.Module, inputs: dict[str, Any]) -> hookattn.Trace:
    """Trace with everything verified; nothing skipped, nothing left."""
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hookattn.UnfaithfulWarning)
        warnings.simplefilter("error", hookattn.SkippedWarning)
        torch.manual_seed(3)
        made = hookattn.trace(model, inputs, verify="full")
    assert before == state_of(model)
    check_clean(model)
    return made


def check_math(trace: hookattn.Trace, tol: float = 1e-5) -> None:
    """Every call against attention in float64 from its own q, k, v, bias and mask."""
    check_trace(trace)
    for call in trace:
        scores, weights, output = reference.reference_attention(
            call.q,
            call.k,
            call.v,
            scale=call.scale,
            bias=call.bias,
            mask=call.mask,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        seen = call.mask.expand_as(scores)
        rows = reference.allowed_rows(call.mask, scores.shape)
        for name, mine, theirs in (
            ("scores", call.scores[seen], scores[seen]),
            ("weights", call.weights[rows], weights[rows]),
            ("output", call.output[rows], output[rows]),
        ):
            if name == "output" and call.dropout:
                continue
            size = max(1.0, theirs.abs().max().item())
            error = (mine.double() - theirs).abs().max().item() / size
            assert error <= tol, f"{call}: {name} is off by {error:.3g} of {size:.3g}"


def check_eager(trace: hookattn.Trace, own: Any, attentions: dict[str, dict[str, str]], tol: float = 1e-4) -> None:
    """The weights against what the model itself returns in eager mode with output_attentions."""
    told = 0
    for attribute, selection in attentions.items():
        weights = own
        for part in attribute.split("."):
            weights = getattr(weights, part)
        calls = trace.select(**selection)  # type: ignore[arg-type]
        assert len(calls) == len(weights), f"{attribute}: {len(calls)} calls, {len(weights)} tensors"
        told += len(calls)
        for call, mine in zip(calls, weights, strict=True):
            rows = reference.allowed_rows(call.mask, call.weights.shape)
            error = (call.weights[rows] - mine[rows]).abs().max().item()
            assert error <= tol, f"{call}: off by {error:.3g} from the model's own {attribute}"
    assert told == len(trace), f"{told} calls compared, {len(trace)} seen"
    peak = max(c.weights.amax(-1).median().item() for c in trace if c.weights.shape[-1] > 2)
    assert peak > 0.4, f"the weights are nearly uniform ({peak:.2f}), so this proves little"


def assert_same_output(plain: Any, made: Any, path: str = "output") -> None:
    """Bit-identical, all the way down."""
    if isinstance(plain, Tensor):
        reference.assert_same_values(made, plain, path)
    elif isinstance(plain, dict):
        assert list(plain) == list(made), path
        for key in plain:
            assert_same_output(plain[key], made[key], f"{path}.{key}")
    elif isinstance(plain, (list, tuple)):
        assert len(plain) == len(made), path
        for i, (a, b) in enumerate(zip(plain, made, strict=True)):
            assert_same_output(a, b, f"{path}[{i}]")
    elif hasattr(plain, "layers"):  # a cache
        assert_same_output([vars(x) for x in plain.layers], [vars(x) for x in made.layers], f"{path}.layers")
