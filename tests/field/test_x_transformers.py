"""x-transformers: its options for what happens between q·k and the values, fused and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hookattn_adapters.einops import Einops
from hookattn_adapters.x_transformers import XTransformers
from torch import Tensor, nn

import hookattn
from hookattn.testing import AdapterContract
from tests.field.common import drawn, examine, gap, ids, seeded

x = pytest.importorskip("x_transformers")

SIZES = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "add_zero_kv": {"attn_add_zero_kv": True},
    "alibi": {"alibi_pos_bias": True},
    "alibi_flash": {"alibi_pos_bias": True, "attn_flash": True},
    "contextual_positions": {"attn_use_cope": True},
    "data_dependent_alibi": {"attn_data_dependent_alibi": True},
    "dynamic_bias": {"dynamic_pos_bias": True},
    "flash": {"attn_flash": True},
    "gate_values": {"attn_gate_values": True},
    "grouped": {"attn_kv_heads": 2},
    "grouped_flash": {"attn_kv_heads": 2, "attn_flash": True},
    "laser": {"attn_laser": True},
    "memories": {"attn_num_mem_kv": 2},
    "memories_flash": {"attn_num_mem_kv": 2, "attn_flash": True},
    "one_kv_head": {"attn_one_kv_head": True},
    "one_kv_head_flash": {"attn_one_kv_head": True, "attn_flash": True},
    "plain": {},
    "qk_norm": {"attn_qk_norm": True},
    "qk_norm_flash": {"attn_qk_norm": True, "attn_flash": True},
    "relative_bias": {"rel_pos_bias": True},
    "rotary": {"rotary_pos_emb": True},
    "sandwich": {"sandwich_coef": 1},
    "selective": {"attn_selective": True},
    "soft_clamp": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 3.0},
    "sparse_topk": {"attn_sparse_topk": 3},
    "xpos": {"rotary_xpos": True},
}
MIXED: dict[str, dict[str, Any]] = {
    "cog_signed": {"attn_cog_signed": True},
    "hard": {"attn_hard": True},
    "talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
}
OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "l2_distance": ({"attn_l2_distance": True}, "distance", "softmax"),
    "sigmoid": ({"attn_sigmoid": True}, "dot", "sigmoid"),
}


def decoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return drawn(x.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=x.Decoder(**SIZES, **options)))


def encoder_decoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_tokens": 50, "depth": 2, "heads": 4, "max_seq_len": 16}
    settings = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in sizes.items()}
    return drawn(x.XTransformer(dim=32, **settings))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_decoder_with(name: str) -> None:
    model = decoder(**OPTIONS[name])
    trace = examine(model, ids(), calls=2, sharp=1.4)
    assert {call.tap for call in trace} == {"sdpa" if OPTIONS[name].get("attn_flash") else "eager"}
    assert [(c.site.stack, c.site.layer, c.site.layers) for c in trace] == [("decoder", 0, 2), ("decoder", 1, 2)]
    _, own = model(ids(), return_intermediates=True)
    for call, kept in zip(trace, own.attn_intermediates, strict=True):
        if kept.post_softmax_attn is not None:
            assert gap(call.weights, kept.post_softmax_attn) < 1e-6
        if name == "soft_clamp":  # in a scripted function, which is followed beside its compiled code
            assert call.softcap == 3.0 and not call.own_scores
            assert call.scores[call.mask.expand_as(call.scores)].abs().max() <= 3.0


@pytest.mark.parametrize("name", MIXED)
def test_weights_changed_after_the_softmax_are_marked(name: str) -> None:
    model = decoder(**MIXED[name])
    trace = examine(model, ids(), calls=2)
    assert all(call.mixed and call.notes for call in trace)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_softmax_over_products_says_what_it_is(name: str) -> None:
    options, score, normalizer = OTHERS[name]
    trace = hookattn.trace(decoder(**options), ids(), verify="full")
    assert [call.site.path for call in trace] == [f"attn_layers.layers.{i}.1" for i in (0, 2)]
    for call in trace:
        assert (call.score, call.normalizer, call.certificate.status) == (score, normalizer, "faithful")


@pytest.mark.parametrize("flash", [False, True])
def test_padding(flash: bool) -> None:
    torch.manual_seed(0)
    layers = x.Encoder(**SIZES, attn_flash=flash)
    model = drawn(x.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers))
    keep = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()
    for call in examine(model, {"x": ids(), "mask": keep}, calls=2):
        assert torch.equal(call.mask.expand(2, 4, 7, 7), keep[:, None, None].expand(2, 4, 7, 7))
        assert call.site.stack == "encoder"


def test_encoder_and_decoder() -> None:
    trace = examine(encoder_decoder(), (ids(), ids(2, 5)), calls=6, kinds={"self": 4, "cross": 2})
    places = [(call.site.stack, call.site.kind, call.site.layer) for call in trace]
    both = [("decoder", kind, layer) for layer in (0, 1) for kind in ("self", "cross")]
    assert places == [("encoder", "self", 0), ("encoder", "self", 1), *both]


def test_images() -> None:
    torch.manual_seed(0)
    model = x.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=x.Encoder(**SIZES))
    examine(drawn(model), seeded(2, 3, 32, 32), calls=2)


def test_generation_is_what_one_forward_sees() -> None:
    model = decoder(rotary_pos_emb=True)
    wrapper = x.AutoregressiveWrapper(model).eval()
    with hookattn.tracing(wrapper.net) as steps:
        out = wrapper.generate(ids(1, 4), 4, temperature=0.0, cache_kv=True)
    whole = hookattn.trace(model, torch.cat([ids(1, 4), out[:, :-1]], 1))
    last = max(call.step for call in steps)
    for a, b in zip(steps.select(step=last), whole, strict=True):
        assert gap(a.weights[:, :, -1:], b.weights[:, :, -1:]) < 1e-5


class Contract(AdapterContract):
    adapter = XTransformers()
    beside = (Einops(),)

    def model(self) -> nn.Module:
        return decoder(rotary_pos_emb=True, attn_kv_heads=2, attn_dropout=0.2)

    def inputs(self) -> Any:
        return ids()


class TestContractDecoder(Contract):
    pass


class TestContractEncoderDecoder(Contract):
    def model(self) -> nn.Module:
        return encoder_decoder()

    def inputs(self) -> tuple[Tensor, Tensor]:
        return ids(), ids(2, 5)
