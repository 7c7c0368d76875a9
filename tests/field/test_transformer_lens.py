"""transformer-lens 4: bridges traced, and traces under its hook names, against what its own hooks cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.interop.transformer_lens import find, hooks, to_transformer_lens
from tests.field.common import drawn, examine, gap, ids

lens = pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")
builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
ROPED = {**WIDTHS, "intermediate_size": 32, "max_position_embeddings": 32}
GROUPED = {**ROPED, "num_key_value_heads": 2, "head_dim": 8}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", ROPED),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 50, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", ROPED),
    "llama": ("LlamaForCausalLM", GROUPED),
    "opt": ("OPTForCausalLM", {**WIDTHS, "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 32}),
}
# Where the library keeps the model's own attention module, it has only the weights to hand to hook_attn_scores.
WEIGHTS_AS_SCORES = ("bert", "opt")


def plain(name: str) -> nn.Module:
    """The model of transformers, eager, which is what a bridge makes of it."""
    cls, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(name, **settings, attn_implementation="eager")
    if name == "t5":
        config.vocab_size, config.decoder_start_token_id = 50, 0
    torch.manual_seed(0)
    return drawn(getattr(transformers, cls)(config))


def bridge(name: str) -> nn.Module:
    model = plain(name)
    return builder.build_bridge_from_module(model, type(model).__name__, hf_config=model.config).eval()


def inputs(name: str) -> dict[str, Tensor]:
    return {"input": ids(), **({"decoder_input": ids(2, 5)} if name == "t5" else {})}


@pytest.fixture(params=sorted(MODELS))
def traced(request: pytest.FixtureRequest) -> tuple[str, nn.Module, hookattn.Trace]:
    name = request.param
    model = bridge(name)
    calls, kinds = (6, {"self": 4, "cross": 2}) if name == "t5" else (2, None)
    return name, model, examine(model, inputs(name), calls=calls, kinds=kinds, sharp=1.2)


def test_the_cache_is_what_its_own_hooks_see(traced: tuple[str, nn.Module, hookattn.Trace]) -> None:
    name, model, trace = traced
    ours = to_transformer_lens(trace, model)
    assert isinstance(ours, lens.ActivationCache)
    given = inputs(name)
    _, theirs = model.run_with_cache(given.pop("input"), **given)
    compared = set()
    for hook, call in hooks(trace, model=model):
        if hook.name not in theirs:
            assert hook.rotated, f"{hook.name} is no name of {name}"
            continue
        own, peer = ours[hook.name], theirs[hook.name]
        if hook.field == "scores" and name in WEIGHTS_AS_SCORES:
            assert gap(peer, call.weights) == 0.0  # the softmax of them, not they
            continue
        if hook.field == "scores":
            assert torch.equal(own == -torch.inf, ~call.mask.expand_as(own))
            own, peer = own.masked_fill(~call.mask, 0.0), peer.masked_fill(~call.mask, 0.0)
        if hook.field == "q" and name == "opt":
            peer = peer * 8**-0.5  # scales q between its projection and the product
        assert gap(own, peer) < 1e-5, hook.name
        compared.add(hook.field)
    # Joint projections are rotated where its hooks do not reach.
    unseen = {"q", "k"} if name == "gpt_neox" else {"scores"} if name in WEIGHTS_AS_SCORES else set()
    assert compared == {"q", "k", "v", "scores", "weights", "output"} - unseen


def test_every_hook_name_finds_its_activation(traced: tuple[str, nn.Module, hookattn.Trace]) -> None:
    _, model, trace = traced
    cache = to_transformer_lens(trace, model)
    assert len(cache) == 6 * len(trace)
    for name in cache:
        assert torch.equal(find(trace, name), cache[name])


def test_a_model_of_transformers_gives_the_same_cache_without_a_bridge() -> None:
    for name in ("gpt2", "llama"):
        model = plain(name)
        bridged = builder.build_bridge_from_module(
            copy.deepcopy(model), type(model).__name__, hf_config=copy.deepcopy(model.config)
        )
        own = to_transformer_lens(hookattn.trace(model, ids()))  # rotary or not: its configuration says
        _, theirs = bridged.eval().run_with_cache(ids())
        for hook in own:
            peer = theirs[hook]
            if hook.endswith("attn_scores"):
                assert gap(own[hook].clamp_min(-1e4), peer.clamp_min(-1e4)) < 1e-5
            else:
                assert gap(own[hook], peer) < 1e-5, hook
        assert torch.equal(own["pattern", 0], own["blocks.0.attn.hook_pattern"])


def test_a_bridge_needs_no_help_but_for_the_rotary_positions() -> None:
    trace = hookattn.trace(bridge("gpt2"), ids())
    assert "blocks.1.attn.hook_q" in to_transformer_lens(trace, rotary=False)
    assert "blocks.1.attn.hook_rot_q" in to_transformer_lens(trace, rotary=True)
