"""Llamas as torchtune and litgpt write them: grouped queries, caches, soft caps, sliding windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from tests.field.common import drawn, examine, gap, ids

LITGPT: dict[str, dict[str, Any]] = {
    "grouped": {"n_query_groups": 2},
    "one_key_head": {"n_query_groups": 1},
    "parallel_residual": {"parallel_residual": True, "rotary_percentage": 0.25},
    "plain": {},
    "qk_norm": {"norm_qk": True},
    "sliding_window": {"sliding_window_size": 3, "sliding_window_indices": [1, 0]},
    "soft_cap": {"attention_logit_softcapping": 5.0},
}


def causal(n: int, window: int | None = None) -> Tensor:
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    return keep if window is None else keep & ~keep.tril(-window)


def litgpt(**options: Any) -> Any:
    library = pytest.importorskip("litgpt")
    sizes = {"block_size": 16, "vocab_size": 50, "padded_vocab_size": 50, "n_layer": 2, "n_head": 4, "n_embd": 32}
    torch.manual_seed(0)
    return drawn(library.GPT(library.Config(**sizes, intermediate_size=32, **options)))


@pytest.mark.parametrize("name", LITGPT)
def test_litgpt(name: str) -> None:
    trace = examine(litgpt(**LITGPT[name]), ids(), calls=2)
    groups = LITGPT[name].get("n_query_groups", 4)
    for call, window in zip(trace, (3, None) if name == "sliding_window" else (None, None), strict=True):
        assert call.site.module == "CausalSelfAttention"
        assert call.k.shape == (2, groups, 7, 8)
        assert torch.equal(call.mask.expand_as(call.weights), causal(7, window).expand_as(call.weights))
        assert call.softcap == (5.0 if name == "soft_cap" else None)


def test_litgpt_with_its_cache_sees_what_one_forward_sees() -> None:
    model = litgpt(n_query_groups=2)
    whole = hookattn.trace(model, ids(1))
    model.set_kv_cache(batch_size=1)
    with torch.no_grad(), hookattn.tracing(model, verify="full", strict=True) as steps:
        model(ids(1)[:, :6], torch.arange(6))
        model(ids(1)[:, 6:], torch.tensor([6]))
    for one, last in zip(whole, steps.select(step=1), strict=True):
        assert gap(last.weights[..., :7], one.weights[:, :, 6:]) < 1e-5


def torchtune(name: str) -> Any:
    pytest.importorskip("torchtune")
    sizes = {"vocab_size": 50, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 32}
    torch.manual_seed(0)
    if name == "gemma2":
        from torchtune.models.gemma2 import gemma2

        caps = {"hidden_capping_value": 5.0, "final_capping_value": 5.0, "query_pre_attn_scalar": 8}
        return drawn(gemma2(**sizes, head_dim=8, intermediate_dim=32, sliding_window_size=3, **caps))
    from torchtune.models.llama3 import llama3

    return drawn(llama3(**sizes, intermediate_dim=32))


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_torchtune(name: str) -> None:
    trace = examine(torchtune(name), ids(), calls=2)
    for call, window in zip(trace, (3, None) if name == "gemma2" else (None, None), strict=True):
        assert call.k.shape == (2, 2, 7, 8)
        assert torch.equal(call.mask.expand_as(call.weights), causal(7, window).expand_as(call.weights))
        assert call.softcap == (5.0 if name == "gemma2" else None)


def test_torchtune_with_a_mask_of_packed_documents() -> None:
    keep = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).bool() & causal(7)
    trace = examine(torchtune("llama3"), {"tokens": ids(), "mask": keep.expand(2, 7, 7)}, calls=2)
    for call in trace:
        assert torch.equal(call.mask.expand_as(call.weights), keep.expand_as(call.weights))


def test_torchtune_with_its_cache_sees_what_one_forward_sees() -> None:
    model: nn.Module = torchtune("llama3")
    whole = hookattn.trace(model, ids(1))
    model.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=7)
    mask, at = causal(7)[None], torch.arange(7)[None]
    with torch.no_grad(), hookattn.tracing(model, verify="full", strict=True) as steps:
        model(ids(1)[:, :6], mask=mask[:, :6], input_pos=at[:, :6])
        model(ids(1)[:, 6:], mask=mask[:, 6:], input_pos=at[:, 6:])
    for one, last in zip(whole, steps.select(step=1), strict=True):
        assert gap(last.weights, one.weights[:, :, 6:]) < 1e-5
