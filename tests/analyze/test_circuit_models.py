"""The weights of heads, found by values, against what each architecture's own code says of its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.analyze.circuits.circuit import Circuit
from hookattn.analyze.circuits.find_weights import circuit
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import MeasureError
from tests.reference import draw

H, D, C = 4, 8, 32


def heads(rows: Tensor, n: int) -> Tensor:
    """(n·D) C, as nn.Linear has it -> n C D."""
    return rows.detach().view(n, -1, rows.shape[1]).transpose(1, 2)


def check(found: Circuit, basis: tuple[str, str, str, str], *weights: Tensor, bias: Any = (None, None, None)) -> None:
    """The four projections: how they were found, and every number of them."""
    assert not found.missing
    for name, how, want in zip("qkvo", basis, weights, strict=True):
        projection = found.projection(name)
        assert projection.basis in how.split("|"), name
        assert projection.weight.shape == want.shape, name
        torch.testing.assert_close(projection.weight, want, rtol=0 if how == "equal" else 1e-4, atol=1e-6)
    for name, want in zip("qkv", bias, strict=True):
        have = found.projection(name).bias
        shape = found.projection(name).weight[:, 0].shape
        zeros = torch.zeros(shape)  # what no product adds
        have, want = (zeros if x is None else x.detach().view(shape) for x in (have, want))
        torch.testing.assert_close(have.float(), want.float(), rtol=1e-4, atol=1e-5)


def test_gpt2_has_one_fused_transposed_projection() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    model = tm.gpt2()
    for i, found in enumerate(circuit(model, {"input_ids": tm.ids(9)})):
        attention = model.transformer.h[i].attn
        with torch.no_grad():
            attention.c_attn.bias.normal_()
        q, k, v = (heads(x.t(), H) for x in attention.c_attn.weight.split(C, 1))
        check(found, ("equal",) * 4, q, k, v, attention.c_proj.weight.detach().view(H, D, C))
        assert found.v is not None and found.v.name == f"transformer.h.{i}.attn.c_attn.weight"
    again = circuit(model, {"input_ids": tm.ids(9)})[1]
    for name, want in zip("qkv", model.transformer.h[1].attn.c_attn.bias.split(C), strict=True):
        assert torch.equal(again.projection(name).bias, want.view(H, D))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_has_grouped_heads_and_rotary_positions(implementation: str, dtype: torch.dtype) -> None:
    tm = pytest.importorskip("tests.tiny_models")
    model = tm.llama(implementation).to(dtype)
    for i, found in enumerate(circuit(model, {"input_ids": tm.ids(12)})):
        a = model.model.layers[i].self_attn
        want = heads(a.q_proj.weight, H), heads(a.k_proj.weight, 2), heads(a.v_proj.weight, 2)
        check(found, ("norms", "norms", "equal", "equal"), *want, a.o_proj.weight.detach().t().reshape(H, D, C))
        assert (found.heads, found.kv_heads) == (4, 2)
        assert torch.equal(found.W_K, want[1].repeat_interleave(2, 0))
        assert torch.equal(found.W_V[3], want[2][1])


def test_bert_projects_in_another_module_than_it_attends() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    model = tm.bert()
    for i, found in enumerate(circuit(model, {"input_ids": tm.ids(9)})):
        a = model.encoder.layer[i].attention
        wants = [heads(getattr(a.self, n).weight, H) for n in ("query", "key", "value")]
        check(found, ("equal",) * 4, *wants, a.output.dense.weight.detach().t().reshape(H, D, C))


def test_t5_crosses_from_the_encoder() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    model = tm.t5()
    found = circuit(model, {"input_ids": tm.ids(9), "decoder_input_ids": tm.ids(6)})
    assert len(found) == 6
    for one in found:
        a = model.get_submodule(one.site.path)
        wants = [heads(getattr(a, n).weight, H) for n in "qkv"]
        check(one, ("equal",) * 4, *wants, a.o.weight.detach().t().reshape(H, D, C))


def test_gpt_neox_has_its_heads_interleaved_and_turns_a_part_of_them() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    model = tm.build("GPTNeoXForCausalLM", "GPTNeoXConfig", **tm.SMALL, **tm.WORDS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * draw(*p.shape, seed=p.numel()))
    for i, found in enumerate(circuit(model, {"input_ids": tm.ids(12)})):
        a = model.gpt_neox.layers[i].attention
        split = a.query_key_value.weight.detach().view(H, 3, D, C).transpose(2, 3).unbind(1)
        bias = a.query_key_value.bias.view(H, 3, D).unbind(1)
        out = a.dense.weight.detach().t().reshape(H, D, C)
        check(found, ("norms", "norms", "equal", "equal"), *split, out, bias=bias)


def test_vit() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    model = tm.vit()
    for i, found in enumerate(circuit(model, {"pixel_values": tm.image(16)})):
        a = model.layers[i].attention
        wants = [heads(getattr(a, f"{n}_proj").weight, H) for n in "qkv"]
        out = a.o_proj.weight.detach().t().reshape(H, D, C)
        check(found, ("equal",) * 4, *wants, out)


def test_a_norm_of_queries_and_keys_is_said_not_guessed() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    options = {**tm.SMALL, **tm.WORDS, "num_key_value_heads": 2, "head_dim": 8}
    found = circuit(tm.build("Qwen3ForCausalLM", "Qwen3Config", **options), {"input_ids": tm.ids(12)})[0]
    assert found.v is not None and found.o is not None
    assert found.q is None and found.k is None
    with pytest.raises(MeasureError, match=r"layers\.0\.self_attn: W_Q is not known: .*norm of q or k"):
        _ = found.W_Q


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 20, "vdim": 24}])
def test_multihead_attention(batch_first: bool, widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(C, H, batch_first=batch_first, **widths).eval()
    nn.init.normal_(module.in_proj_bias)
    inputs = draw(2, 7, C, seed=1), draw(2, 9, widths.get("kdim", C), seed=2), draw(2, 9, widths.get("vdim", C), seed=3)
    if not widths:
        inputs = inputs[0], inputs[1], inputs[1]
    found = circuit(module, tuple(x if batch_first else x.transpose(0, 1) for x in inputs))[0]
    if widths:
        split = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        split = list(module.in_proj_weight.split(C))
    q, k, v = (heads(w, H) for w in split)
    bq, bk, bv = module.in_proj_bias.split(C)
    out = module.out_proj.weight.detach().t().reshape(H, D, C)
    # It returns its weights, and so scales the queries itself: the kernel's scale is 1. Whether the bias is a part of
    # the product is torch's own matter.
    check(
        found, ("affine", "affine|equal", "affine|equal", "equal"), q * D**-0.5, k, v, out, bias=(bq * D**-0.5, bk, bv)
    )


def test_an_encoder_layer_leaves_its_fast_path_for_it_and_goes_back() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(C, H, 40, batch_first=True).eval()
    x = draw(2, 7, C, seed=1)
    with torch.no_grad():
        before = layer(x)
    found = circuit(layer, x)[0]
    wants = [heads(w, H) for w in layer.self_attn.in_proj_weight.split(C)]
    out = layer.self_attn.out_proj.weight.detach().t().reshape(H, D, C)
    check(found, ("equal",) * 4, *wants, out)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert torch.equal(before, layer(x))


def test_the_demo_model_and_what_the_kernel_multiplies_at_one_place() -> None:
    model, tokens = load_pretrained(), example_tokens(0)
    read: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda _, a, i=i: read.update({f"blocks.{i}.attn": a[0].double()}))
    trace = hookattn.trace(model, tokens)
    for call, found in zip(trace, circuit(model, tokens), strict=True):
        a = model.get_submodule(call.site.path)
        split = [heads(w, 4) for w in a.qkv.weight.split(64)]
        out = a.out.weight.detach().t().reshape(4, 16, 64)
        check(found, ("norms", "norms", "equal", "equal"), *split, out, bias=a.qkv.bias.split(64))
        x = read[call.site.path]
        q, k = (x[:, None] @ p.weight.double() + p.bias[:, None].double() for p in (found.q, found.k))
        # Both are turned by one angle where query and key are one token, so that the product is that without turning.
        torch.testing.assert_close((q * k).sum(-1), (call.q.double() * call.k.double()).sum(-1), rtol=1e-4, atol=1e-3)
