"""Every attention call of vLLM's CPU backend is read: against transformers, in batches that come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests.serving_vllm.engines import distance, engine, generate, model_of, traced

SMALL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def prompt(n: int, seed: int = 0) -> list[int]:
    made = torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(seed + n))
    return [int(x) for x in made]


PROMPTS = [prompt(7), prompt(40), prompt(1), prompt(5)]


def all_faithful(trace: Any) -> bool:
    return not trace.skipped and all(call.certificate.status == "faithful" for call in trace)


def test_a_ragged_batch(llama: Path, tmp_path: Path) -> None:
    with engine(llama) as llm:
        trace, made = traced(llm, PROMPTS)
    assert all_faithful(trace) and len(trace) == 6 and trace[0].k.shape[1] == 2
    assert distance(trace, made, llama, tmp_path) < 1e-6


def test_prompts_in_chunks_beside_others_that_decode(llama: Path, tmp_path: Path) -> None:
    with engine(llama, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        trace, made = traced(llm, PROMPTS)
    mixed = [call for call in trace if {t == 1 for t, _ in call.lengths} == {True, False}]
    assert all_faithful(trace) and mixed
    assert distance(trace, made, llama, tmp_path) < 1e-6


def test_a_prefix_that_is_cached(llama: Path) -> None:
    """Keys that another request has computed are there, queries are not."""
    first, shared = prompt(70), prompt(70)[:64]
    with engine(llama, enable_prefix_caching=True, block_size=32) as llm:
        expected = generate(llm, [[*shared, 5, 6, 7]])[0][1]
        llm.reset_prefix_cache()
        generate(llm, [first])
        with hookattn.tracing(model_of(llm), verify="full") as trace:
            again = generate(llm, [[*shared, 5, 6, 7]])[0][1]
    t, s = trace[0].lengths[0]
    assert again == expected and all_faithful(trace)
    assert s == 67 and 0 < t < 67


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "a window": ("Mistral", {**SMALL, "sliding_window": 6}),
    "a soft-cap and windows in turn": (
        "Gemma2",
        {**SMALL, "head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0},
    ),
    "alibi": ("Bloom", {"vocab_size": 64, "hidden_size": 128, "n_layer": 2, "n_head": 4}),
    "heads of 80": ("Llama", {**SMALL, "hidden_size": 160, "head_dim": 80, "num_attention_heads": 2}),
    "sinks": (
        "GptOss",
        {
            **SMALL,
            "head_dim": 32,
            "sliding_window": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("which", MODELS)
def test_what_models_have_beside(which: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    kind, config = MODELS[which]
    folder = model_folder(kind, **config)
    with engine(folder) as llm:
        trace, made = traced(llm, PROMPTS)
    assert all_faithful(trace) and len(trace) == 6
    # vLLM computes another gelu than transformers between the layers of Bloom.
    assert distance(trace, made, folder, tmp_path, layers=1 if kind == "Bloom" else None) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, llama: Path) -> None:
    with engine(llama, dtype=dtype) as llm:
        trace, _ = traced(llm, PROMPTS)
    assert all_faithful(trace) and trace[0].dtype == getattr(torch, dtype) and len(trace) == 6


def test_a_model_that_vllm_compiles(llama: Path, tmp_path: Path) -> None:
    with engine(llama, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
        trace, made = traced(llm, PROMPTS)
    assert all_faithful(trace) and {call.site.layer for call in trace} == {0, 1}
    assert distance(trace, made, llama, tmp_path) < 1e-6


def test_a_cache_of_eight_bits_is_said(llama: Path) -> None:
    with engine(llama, dtype="bfloat16", kv_cache_dtype="fp8") as llm, pytest.warns(hookattn.SkippedWarning):
        trace, _ = traced(llm, PROMPTS[:1])
    assert len(trace) == 0 and {s.path for s in trace.skipped} == {f"model.layers.{i}.self_attn.attn" for i in (0, 1)}
    assert all("kv_cache_dtype" in s.reason for s in trace.skipped)
