"""torch's own attention modules: nn.MultiheadAttention and everything that is built from it, fast paths included."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.reference import (
    assert_close,
    assert_same_values,
    causal,
    check_call,
    draw,
    heads,
    merge,
    paths,
    reference_attention,
    trace_checked,
)

B, T, S, E, H = 2, 5, 7, 16, 4
D = E // H


# ------------------------------------------------------------------------------- the reference, in float64


@dataclasses.dataclass
class Attended:
    """One attention call of a torch module, from explicit projections in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    weights: Tensor
    output: Tensor  # B T E, after the output projection


def split_mask(given: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """torch's masks (bool: True = forbidden; float: added) as (bias, mask), broadcastable to B H T S."""
    if given is None:
        return None, None
    if given.dim() == 3:
        given = given.view(batch, -1, *given.shape[1:])
    if given.dtype == torch.bool:
        return None, ~given
    mask = given > -1e4
    bias = given.double().masked_fill(~mask, 0.0)
    return (bias if bool(bias.any()) else None), (None if bool(mask.all()) else mask)


def join(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Both masks, or both biases."""
    if left is None or right is None:
        return right if left is None else left
    return left & right if left.dtype == torch.bool else left + right


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Attended:
    """What the module computes on B T E inputs, from its parameters alone."""
    with torch.no_grad():
        if module.in_proj_weight is not None:
            wq, wk, wv = module.in_proj_weight.double().chunk(3)
        else:
            wq, wk, wv = (w.double() for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight))
        zero = torch.zeros(3 * module.embed_dim, dtype=torch.float64)
        bq, bk, bv = (zero if module.in_proj_bias is None else module.in_proj_bias.double()).chunk(3)
        q, k, v = query.double() @ wq.T + bq, key.double() @ wk.T + bk, value.double() @ wv.T + bv
        batch = q.shape[0]
        padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        (bias, mask), (more_bias, more_mask) = split_mask(attn_mask, batch), split_mask(padding, batch)
        bias, mask = join(bias, more_bias), join(mask, more_mask)
        extra = 0
        if module.bias_k is not None:
            k = torch.cat([k, module.bias_k.double().expand(batch, 1, -1)], dim=1)
            v = torch.cat([v, module.bias_v.double().expand(batch, 1, -1)], dim=1)
            extra += 1
        if module.add_zero_attn:
            k, v = (torch.cat([t, torch.zeros(batch, 1, t.shape[-1], dtype=t.dtype)], dim=1) for t in (k, v))
            extra += 1
        if extra and mask is not None:
            mask = torch.cat([mask, torch.ones(*mask.shape[:-1], extra, dtype=torch.bool)], dim=-1)
        if extra and bias is not None:
            bias = torch.cat([bias, torch.zeros(*bias.shape[:-1], extra, dtype=bias.dtype)], dim=-1)
        q, k, v = (heads(t, module.num_heads) for t in (q, k, v))
        _, weights, out = reference_attention(q, k, v, scale=module.head_dim**-0.5, bias=bias, mask=mask)
        out = merge(out) @ module.out_proj.weight.double().T
        if module.out_proj.bias is not None:
            out = out + module.out_proj.bias.double()
        return Attended(q, k, v, bias, mask, weights, out)


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.activation(layer.linear1(x)))


def encode_layer(layer: nn.TransformerEncoderLayer, x: Tensor, **masks: Any) -> tuple[Attended, Tensor]:
    """One encoder layer on B T E in float64: its attention, and what it returns."""
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        h = layer.norm1(x) if layer.norm_first else x
        attended = attend(layer.self_attn, h, h, h, **masks)
        x = x + attended.output
        if layer.norm_first:
            return attended, x + feed_forward(layer, layer.norm2(x))
        x = layer.norm1(x)
        return attended, layer.norm2(x + feed_forward(layer, x))


def decode_layer(
    layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, own: dict[str, Any], cross: dict[str, Any]
) -> tuple[list[Attended], Tensor]:
    """One decoder layer on B T E in float64: both attentions, and what it returns."""
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        memory = memory.double()
        h = layer.norm1(x) if layer.norm_first else x
        first = attend(layer.self_attn, h, h, h, **own)
        x = x + first.output
        x = x if layer.norm_first else layer.norm1(x)
        h = layer.norm2(x) if layer.norm_first else x
        second = attend(layer.multihead_attn, h, memory, memory, **cross)
        x = x + second.output
        if layer.norm_first:
            return [first, second], x + feed_forward(layer, layer.norm3(x))
        x = layer.norm2(x)
        return [first, second], layer.norm3(x + feed_forward(layer, x))


def check(call: Any, attended: Attended, *, prescaled: bool = False, **options: Any) -> None:
    """A captured call against the reference. ``prescaled``: q may also be recorded with the scale already in it,
    which is what torch's code does where the weights are asked for."""
    q, scale = attended.q, attended.q.shape[-1] ** -0.5
    if prescaled and abs(float(call.scale) - 1.0) < 1e-6:
        q, scale = q * scale, 1.0
    masked_scores = attended.bias is None or attended.mask is None
    check_call(
        call,
        **{"masked_scores": masked_scores, **options},
        q=q.float(),
        k=attended.k.float(),
        v=attended.v.float(),
        scale=scale,
        bias=None if attended.bias is None else attended.bias.float(),
        mask=attended.mask,
        exact=False,
    )


class Host(nn.Module):
    """A model whose attention is at ``attn``; returns all that the module returns."""

    def __init__(self, attn: nn.MultiheadAttention, **options: Any) -> None:
        super().__init__()
        self.attn, self.options = attn, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> Any:
        return self.attn(query, key, value, **masks, **self.options)


def trace_one(model: nn.Module, inputs: Any, **options: Any) -> Any:
    import hookattn

    trace = trace_checked(hookattn.trace, model, inputs, **options)
    assert len(trace.calls) == 1, paths(trace.calls)
    assert not list(trace.skipped)
    return trace


def make(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    """A module with weights large enough for weights that are far from uniform, and biases that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, **options})
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, std=0.35 if "weight" in name else 0.2)
    return module.eval()


ATTN_MASKS: dict[str, Tensor | None] = {
    "none": None,
    "bool": ~causal(T, S, 2),
    "minus_inf": torch.zeros(T, S).masked_fill(~causal(T, S, 2), -math.inf),
    "float": draw(T, S, seed=40),
    "bool_3d": (draw(B * H, T, S, seed=41) > 0.3) & (torch.arange(S) > 0),
    "float_3d": draw(B * H, T, S, seed=42),
}
PADDING = torch.arange(S).expand(B, S) >= torch.tensor([[S], [S - 3]])
PADDINGS: dict[str, Tensor | None] = {
    "none": None,
    "bool": PADDING,
    "float": torch.zeros(B, S).masked_fill(PADDING, -math.inf),
}
X, Y = draw(B, T, E, seed=31), draw(B, S, E, seed=32)


def self_masks(kind: str) -> dict[str, Tensor]:
    """Masks for self-attention on Y, as keyword arguments of the module."""
    masks: dict[str, Tensor] = {}
    if kind == "attn_mask_3d":
        masks["attn_mask"] = (draw(B * H, S, S, seed=43) > 0.3) & ~torch.eye(S, dtype=torch.bool)
    elif kind in ("attn_mask", "both"):
        masks["attn_mask"] = ~causal(S)
    if kind in ("padding", "both"):
        masks["key_padding_mask"] = PADDING
    return masks


@pytest.fixture(params=[False, True], ids=["grad", "no_grad"])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both grad modes; without gradients the fast paths are open in eval mode."""
    with torch.set_grad_enabled(not request.param):
        yield not request.param


# ---------------------------------------------------------------------- the reference against the modules


@pytest.mark.parametrize("attn_mask", ATTN_MASKS)
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}], ids=str)
def test_reference_matches_multihead_attention(attn_mask: str, padding: str, extra: dict[str, Any]) -> None:
    module = make(batch_first=True, **extra).double()
    mask, pad = ATTN_MASKS[attn_mask], PADDINGS[padding]
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
        pad = None if pad is None else torch.zeros(B, S, dtype=torch.float64).masked_fill(pad, -math.inf)
    returned, weights = module(X.double(), Y.double(), Y.double(), key_padding_mask=pad, attn_mask=mask)
    attended = attend(module, X, Y, Y, mask, pad)
    assert_close(attended.output, returned.detach(), 1e-9, "output")
    assert_close(attended.weights.mean(1), weights.detach(), 1e-9, "weights")


@pytest.mark.parametrize("kind", ["none", "attn_mask", "attn_mask_3d", "padding", "both"])
def test_reference_matches_the_fast_path(kind: str) -> None:
    """The native kernel, which no hook sees, computes the same."""
    module, masks = make(batch_first=True), self_masks(kind)
    with torch.no_grad():
        returned, weights = module(Y, Y, Y, **masks)
    attended = attend(module, Y, Y, Y, **masks)
    assert_close(returned, attended.output, 1e-5, "output")
    assert_close(weights, attended.weights.mean(1), 1e-5, "weights")


@pytest.mark.parametrize("norm_first", [False, True])
def test_reference_matches_layers(norm_first: bool) -> None:
    torch.manual_seed(1)
    encoder = nn.TransformerEncoderLayer(E, H, 24, batch_first=True, norm_first=norm_first).eval().double()
    decoder = nn.TransformerDecoderLayer(E, H, 24, batch_first=True, norm_first=norm_first).eval().double()
    x, y = X.double(), Y.double()
    _, ours = encode_layer(encoder, y, key_padding_mask=PADDING)
    assert_close(ours, encoder(y, src_key_padding_mask=PADDING).detach(), 1e-9, "encoder layer")
    own, cross = {"attn_mask": ~causal(T)}, {"key_padding_mask": PADDING}
    _, ours = decode_layer(decoder, x, y, own, cross)
    returned = decoder(x, y, tgt_mask=~causal(T), memory_key_padding_mask=PADDING)
    assert_close(ours, returned.detach(), 1e-9, "decoder layer")


# ------------------------------------------------------------------------------------ MultiheadAttention


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attn_mask", ATTN_MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(attn_mask: str, padding: str, need_weights: bool) -> None:
    module, mask, pad = make(batch_first=True), ATTN_MASKS[attn_mask], PADDINGS[padding]
    inputs = {"query": X, "key": Y, "value": Y, "key_padding_mask": pad, "attn_mask": mask}
    trace = trace_one(Host(module, need_weights=need_weights), inputs)
    assert paths(trace.calls) == ["attn"]
    check(trace.calls[0], attend(module, X, Y, Y, mask, pad), prescaled=need_weights)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_returned_weights(average: bool, batch_first: bool) -> None:
    """What the module returns as its weights is what the record holds."""
    module = make(batch_first=batch_first)
    x, y = (X, Y) if batch_first else (X.transpose(0, 1), Y.transpose(0, 1))
    trace = trace_one(Host(module, need_weights=True, average_attn_weights=average), (x, y, y))
    call, returned = trace.calls[0], trace.output[1].detach()
    check(call, attend(module, X, Y, Y), prescaled=True)
    if average:
        assert_close(call.weights.mean(dim=1), returned, 1e-6, "averaged weights")
    else:
        assert_same_values(call.weights, returned, "weights")


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(need_weights: bool) -> None:
    module = make()
    trace = trace_one(Host(module, need_weights=need_weights), (X[0], Y[0], Y[0]))
    check(trace.calls[0], attend(module, X[:1], Y[:1], Y[:1]), prescaled=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention(batch_first: bool, need_weights: bool, grad_mode: bool) -> None:
    """query is key is value: in eval mode without gradients, batch-first, this is the native kernel."""
    module = make(batch_first=batch_first)
    x = X if batch_first else X.transpose(0, 1)
    trace = trace_one(Host(module, need_weights=need_weights), (x, x, x))
    check(trace.calls[0], attend(module, X, X, X), prescaled=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["attn_mask", "attn_mask_3d", "padding", "both"])
def test_self_attention_masked_on_the_fast_path(kind: str, need_weights: bool) -> None:
    module, masks = make(batch_first=True), self_masks(kind)
    with torch.no_grad():
        trace = trace_one(Host(module, need_weights=need_weights), {"query": Y, "key": Y, "value": Y, **masks})
    check(trace.calls[0], attend(module, Y, Y, Y, **masks), prescaled=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str
)
def test_extra_keys(options: dict[str, bool], masked: bool, need_weights: bool) -> None:
    """The learned key and the zero key are keys like any other: S grows."""
    module = make(batch_first=True, **options)
    masks = {"attn_mask": ATTN_MASKS["bool"], "key_padding_mask": PADDING} if masked else {}
    inputs = {"query": X, "key": Y, "value": Y, **masks}
    trace = trace_one(Host(module, need_weights=need_weights), inputs)
    attended = attend(module, X, Y, Y, **masks)
    assert trace.calls[0].k.shape[2] == S + len(options)
    check(trace.calls[0], attended, prescaled=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_other_widths(need_weights: bool) -> None:
    module = make(batch_first=True, kdim=6, vdim=9, bias=False)
    key, value = draw(B, S, 6, seed=33), draw(B, S, 9, seed=34)
    trace = trace_one(Host(module, need_weights=need_weights), (X, key, value))
    check(trace.calls[0], attend(module, X, key, value), prescaled=need_weights)


def test_is_causal_hint() -> None:
    module = make(batch_first=True)
    mask = ~causal(T)
    inputs = {"query": X, "key": X, "value": X, "attn_mask": mask, "is_causal": True}
    trace = trace_one(Host(module, need_weights=False), inputs)
    check(trace.calls[0], attend(module, X, X, X, attn_mask=mask))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_train_mode(need_weights: bool) -> None:
    """Same random numbers, same output; the weights are those before dropout, not those the module returns."""
    module = make(batch_first=True, dropout=0.4).train()
    trace = trace_one(Host(module, need_weights=need_weights), (X, Y, Y), seed=4)
    assert module.training
    check(trace.calls[0], attend(module, X, Y, Y), prescaled=need_weights, dropout=0.4)


@pytest.mark.parametrize("need_weights", [False, True])
def test_bfloat16(need_weights: bool) -> None:
    module = make(batch_first=True).to(torch.bfloat16)
    x, y = X.to(torch.bfloat16) * 0.5, Y.to(torch.bfloat16) * 0.5
    trace = trace_one(Host(module, need_weights=need_weights), (x, y, y))
    call = trace.calls[0]
    attended = attend(module, x, y, y)
    assert call.dtype == torch.bfloat16
    assert_close(call.weights, attended.weights, 2e-2, "weights")
    assert_close(call.k, attended.k, 3e-2, "k")
    assert call.certificate.faithful


def test_fast_path_switch_is_left_alone() -> None:
    module = make(batch_first=True)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            trace = trace_one(Host(module), (X, X, X))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    check(trace.calls[0], attend(module, X, X, X), prescaled=True)


# ---------------------------------------------------------------------------------- layers and stacks


def spread(model: nn.Module) -> nn.Module:
    """Weights large enough for attention that is far from uniform, and no two layers alike."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" not in name:
            parameter.data.copy_(draw(*parameter.shape, seed=100 + i, std=0.3))
    return model


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", ["none", "mask", "padding"])
def test_encoder_layer(norm_first: bool, batch_first: bool, masked: str, grad_mode: bool) -> None:
    """In eval mode without gradients this is one native kernel from input to output."""
    layer = nn.TransformerEncoderLayer(E, H, 24, activation="gelu", batch_first=batch_first, norm_first=norm_first)
    spread(layer).eval()
    given: dict[str, Any] = {}
    if masked == "mask":
        given = {"attn_mask": ~causal(S)}
    elif masked == "padding":
        given = {"key_padding_mask": PADDING}
    names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
    inputs = {"src": Y if batch_first else Y.transpose(0, 1), **{names[key]: value for key, value in given.items()}}
    trace = trace_one(layer, inputs)
    assert paths(trace.calls) == ["self_attn"]
    assert trace.calls[0].site.kind == "self"
    attended, _ = encode_layer(layer, Y.double(), **given)
    check(trace.calls[0], attended)


def test_encoder_layer_train_mode() -> None:
    layer = spread(nn.TransformerEncoderLayer(E, H, 24, dropout=0.3, batch_first=True)).train()
    trace = trace_one(layer, Y, seed=6)
    attended, _ = encode_layer(layer.eval(), Y.double())
    check(trace.calls[0], attended, dropout=0.3)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder(norm_first: bool, masked: bool, grad_mode: bool) -> None:
    """Two layers; without gradients and with a padding mask the layers run on nested tensors."""
    import hookattn

    layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True, norm_first=norm_first)
    encoder = spread(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E))).eval()
    inputs = {"src": Y, "src_key_padding_mask": PADDING} if masked else {"src": Y}
    trace = trace_checked(hookattn.trace, encoder, inputs)
    assert paths(trace.calls) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [call.site.layer for call in trace.calls] == [0, 1]
    assert not list(trace.skipped)
    keep = ~PADDING if masked else torch.ones(B, S, dtype=torch.bool)
    x = Y.double()
    for call, block in zip(trace.calls, encoder.layers, strict=True):
        attended, x = encode_layer(block, x, key_padding_mask=PADDING if masked else None)
        check(call, attended, rows=keep[:, None, :], keys=keep, masked_scores=False)


@pytest.mark.filterwarnings("ignore")
def test_encoder_nested_tensors_of_unequal_lengths() -> None:
    """No sequence fills the batch: what was padding everywhere need not be in the record, the rest has to be right."""
    import hookattn

    layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True)
    encoder = spread(nn.TransformerEncoder(layer, 2)).eval()
    lengths = torch.tensor([S - 2, S - 4])
    padding = torch.arange(S)[None] >= lengths[:, None]
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, encoder, {"src": Y, "src_key_padding_mask": padding})
    assert paths(trace.calls) == ["layers.0.self_attn", "layers.1.self_attn"]
    x = Y.double()
    for call, block in zip(trace.calls, encoder.layers, strict=True):
        attended, x = encode_layer(block, x, key_padding_mask=padding)
        for b, n in enumerate(lengths.tolist()):
            weights = attended.weights[b, :, :n, :n]
            assert_close(call.weights[b, :, :n, :n], weights, 1e-5, "weights")
            assert not call.weights[b, :, :n, n:].any()
            assert_close(call.k[b, :, :n], attended.k[b, :, :n], 1e-5, "k")
            mask = call.mask.expand(call.weights.shape)[b]
            assert mask[:, :n, :n].all() and not mask[:, :n, n:].any()
        assert call.certificate.faithful


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder_layer(norm_first: bool, batch_first: bool, grad_mode: bool) -> None:
    import hookattn

    layer = spread(nn.TransformerDecoderLayer(E, H, 24, batch_first=batch_first, norm_first=norm_first)).eval()
    x, y = (X, Y) if batch_first else (X.transpose(0, 1), Y.transpose(0, 1))
    inputs = {"tgt": x, "memory": y, "tgt_mask": ~causal(T), "memory_key_padding_mask": PADDING}
    trace = trace_checked(hookattn.trace, layer, inputs)
    assert paths(trace.calls) == ["self_attn", "multihead_attn"]
    assert [call.site.kind for call in trace.calls] == ["self", "cross"]
    attended, _ = decode_layer(layer, X.double(), Y, {"attn_mask": ~causal(T)}, {"key_padding_mask": PADDING})
    for call, expected in zip(trace.calls, attended, strict=True):
        check(call, expected)


def test_decoder() -> None:
    import hookattn

    layer = nn.TransformerDecoderLayer(E, H, 24, batch_first=True)
    decoder = spread(nn.TransformerDecoder(layer, 2)).eval()
    trace = trace_checked(hookattn.trace, decoder, {"tgt": X, "memory": Y, "tgt_mask": ~causal(T)})
    names = ("self_attn", "multihead_attn")
    assert paths(trace.calls) == [f"layers.{i}.{name}" for i in range(2) for name in names]
    x, calls = X.double(), iter(trace.calls)
    for block in decoder.layers:
        attended, x = decode_layer(block, x, Y, {"attn_mask": ~causal(T)}, {})
        for expected in attended:
            check(next(calls), expected)


@pytest.mark.parametrize("train", [False, True])
def test_transformer(train: bool, grad_mode: bool) -> None:
    """Encoder and decoder together: stacks, layers and kinds are told apart."""
    import hookattn

    options = {"dim_feedforward": 24, "batch_first": True, "dropout": 0.2 if train else 0.0}
    model = nn.Transformer(E, H, 2, 2, **options)
    spread(model).train(train)
    inputs = {
        "src": Y,
        "tgt": X,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T),
        "tgt_is_causal": True,
    }
    trace = trace_checked(hookattn.trace, model, inputs, seed=8)
    assert paths(trace.calls) == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    assert [call.site.layer for call in trace.calls] == [0, 1, 0, 0, 1, 1]
    assert [call.site.stack for call in trace.calls] == ["encoder"] * 2 + ["decoder"] * 4
    assert [call.site.kind for call in trace.calls] == ["self", "self", "self", "cross", "self", "cross"]
    assert not list(trace.skipped)
    if train:
        attended, _ = encode_layer(model.encoder.layers[0], Y.double())
        check(trace.calls[0], attended, dropout=0.2)
        return
    with torch.no_grad():
        x = Y.double()
        calls = iter(trace.calls)
        for block in model.encoder.layers:
            attended, x = encode_layer(block, x)
            check(next(calls), attended)
        memory, x = copy.deepcopy(model.encoder.norm).double()(x), X.double()
        for block in model.decoder.layers:
            both, x = decode_layer(block, x, memory, {"attn_mask": ~causal(T)}, {})
            for expected in both:
                check(next(calls), expected)


class CustomLayer(nn.Module):
    """A block of the user's own around nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln = make(seed=2, batch_first=True), nn.LayerNorm(E)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.ln(x)
        return x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]


def test_inside_a_custom_block(grad_mode: bool) -> None:
    """As in CLIP: an additive causal mask, no weights asked for."""
    model = nn.ModuleDict({"resblocks": nn.ModuleList([CustomLayer()])})

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = model

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.empty(T, T).fill_(-torch.inf).triu_(1)
            for block in self.transformer["resblocks"]:
                x = block(x, mask)
            return x

    tower = Tower().eval()
    trace = trace_one(tower, X)
    assert paths(trace.calls) == ["transformer.resblocks.0.attn"]
    block = model["resblocks"][0]
    h = block.ln(X).detach()
    check(trace.calls[0], attend(block.attn, h, h, h, attn_mask=~causal(T)))
