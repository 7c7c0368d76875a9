"""Attention written out in plain operations: every entry of the zoo against explicit math in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.reference import (
    TOLERANCE,
    assert_close,
    assert_same_values,
    assert_untouched,
    causal,
    check_call,
    draw,
    heads,
    paths,
    produced,
    reference_attention,
    same_bits,
    snapshot,
    trace_checked,
)
from tests.zoo import CASES, Case, Host
from tests.zoo.base import B, Block, D, E, H, S, T
from tests.zoo.gpt import MinGPTAttention
from tests.zoo.not_attention import NO_CALL, NOT_ATTENTION, SHAPE
from tests.zoo.special import BufferCache, CachedAttention, JointSelfCrossAttention, TalkingHeads

BY_NAME = {case.name: case for case in CASES}
# No projection and no split of a width: whether the one axis that both have is batch or heads, nothing tells.
ONLY_CONVENTION = {"luong_dot_keys_are_values"}
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
some_cases = pytest.mark.parametrize(
    "name",
    [
        "nanogpt",
        "gpt2_where_and_padding",
        "opt_folded_with_floor",
        "fairseq_time_first",
        "megatron_baddbmm_beta_0",
        "bloom_alibi_baddbmm_method",
        "diffusion_qkv_channels_first",
        "lucidrains_einsum_minus_amax",
        "einsum_heads_innermost",
        "keys_times_queries_dim_minus_2",
        "mask_add_in_place",
        "mask_twice",
        "sink_column_last",
        "softmax_float32_argument",
        "softcap_gemma",
        "gqa_llama_rope_half_repeat_kv",
        "gqa_broadcast_matmul_5d",
        "t5_position_bias_with_mask_inside",
        "whisper_quarter_power_on_both",
        "cross_other_widths",
    ],
)


# ------------------------------------------------------------------------------- the zoo against itself


def test_the_zoo_is_large() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@every_case
def test_zoo_reference_matches_module(case: Case) -> None:
    """In float64, the reference on what ``expected`` says gives what ``forward`` returns."""
    model = case.model(torch.float64).eval()
    inputs = case.inputs(torch.float64)
    returned = model(*inputs)
    outputs = []
    for expected in model.entry.calls(*inputs):
        scores, weights, output = reference_attention(**expected.reference_args())
        assert bool(scores.isfinite().all())
        spread = weights.std(dim=-1).mean().item()
        assert spread > 0.02, f"weights too uniform to tell anything apart ({spread:.3f})"
        outputs.append(output)
    assert_close(model.entry.finish(outputs, *inputs), returned, case.tol, case.name)


@every_case
def test_zoo_expected_tensors_are_the_models_own(case: Case) -> None:
    """Some operation of the model returned exactly the q, k and v that ``expected`` names, and just those weights."""
    model, inputs = case.model().eval(), case.inputs()
    with torch.no_grad():
        plain = model(*inputs)
        with produced() as probe:
            watched = model(*inputs)
    assert same_bits(plain, watched), "the probe changed the model's bits"
    given = [t for t in (*inputs, *model.parameters()) if t.is_floating_point()]
    probe.tensors.extend(t.detach() for t in given)
    for expected in model.entry.calls(*inputs):
        for name in ("q", "k", "v"):
            tensor = getattr(expected, name)
            whole = tensor[:1] if case.name == "learned_query_pooling" and name == "q" else tensor
            assert probe.holds(whole), f"{name} is not a tensor of the model"
        _, weights, output = reference_attention(**expected.reference_args())
        assert probe.holds(weights, within=1e-5), "weights are not a tensor of the model"
        assert probe.holds(output, within=1e-5), "output is not a tensor of the model"


# -------------------------------------------------------------------------- the checks themselves


def fake_call() -> tuple[SimpleNamespace, dict[str, Any]]:
    """A record made by the reference, and what to compare it with."""
    q, k, v = draw(B, H, T, D, seed=1), draw(B, 2, S, D, seed=2), draw(B, 2, S, D, seed=3)
    terms = {"scale": 0.5, "bias": draw(1, H, T, S, seed=4), "mask": causal(T, S), "softcap": 3.0}
    terms["sinks"] = draw(H, seed=5)
    scores, weights, output = reference_attention(q, k, v, **terms)
    fields = {"q": q, "k": k, "v": v, "scores": scores.float(), "weights": weights.float(), "output": output.float()}
    certificate = SimpleNamespace(faithful=True, max_error=0.0)
    call = SimpleNamespace(**fields, **terms, dropout=0.0, dtype=q.dtype, tap="fake", certificate=certificate)
    return call, {"q": q, "k": k, "v": v, **terms}


def test_check_call_accepts_what_is_right() -> None:
    call, wanted = fake_call()
    check_call(call, **wanted)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("q", lambda call: call.q * (1 + 1e-6)),
        ("k", lambda call: call.k.repeat_interleave(2, dim=1)),
        ("v", lambda call: call.v.flip(1)),
        ("bias", lambda call: None),
        ("bias", lambda call: call.bias + 1e-3),
        ("mask", lambda call: call.mask | True),
        ("mask", lambda call: call.mask.float()),
        ("mask", lambda call: None),
        ("sinks", lambda call: None),
        ("sinks", lambda call: call.sinks.flip(0)),
        ("scale", lambda call: 0.4),
        ("softcap", lambda call: None),
        ("dropout", lambda call: 0.1),
        ("scores", lambda call: call.scores.masked_fill(~call.mask, -torch.inf)),
        ("scores", lambda call: call.scores + 1e-3),
        ("weights", lambda call: call.weights.flip(1)),
        ("weights", lambda call: call.weights + 1e-4),
        ("weights", lambda call: call.weights / call.weights.sum(-1, keepdim=True)),
        ("output", lambda call: call.output.transpose(1, 2)),
        ("output", lambda call: call.output * 1.001),
        ("dtype", lambda call: torch.float16),
        ("certificate", lambda call: SimpleNamespace(faithful=False, max_error=1.0)),
        ("q", lambda call: call.q.clone().requires_grad_()),
    ],
)
def test_check_call_rejects_what_is_wrong(name: str, wrong: Callable[[Any], Any]) -> None:
    call, wanted = fake_call()
    setattr(call, name, wrong(call))
    with pytest.raises((AssertionError, TypeError)):
        check_call(call, **wanted)


def left_behind(model: nn.Module, what: str) -> Callable[[], Any]:
    """Leave something on the model or in torch; returns what takes it away again."""
    if what == "hook":
        return model.register_forward_hook(lambda *_: None).remove
    if what == "attribute":
        model.layers[0].traced = True
        return lambda: delattr(model.layers[0], "traced")
    if what == "forward":
        model.layers[0].forward = lambda x: x
        return lambda: delattr(model.layers[0], "forward")
    if what == "train":
        model.eval()
        return model.train
    if what == "parameter":
        parameter = next(model.parameters())
        parameter.data.add_(1.0)
        return lambda: parameter.data.sub_(1.0)
    if what == "mode":
        mode = torch.overrides.BaseTorchFunctionMode()
        mode.__enter__()
        return lambda: mode.__exit__(None, None, None)
    if what == "fast path":
        torch.backends.mha.set_fastpath_enabled(False)
        return lambda: torch.backends.mha.set_fastpath_enabled(True)
    if what == "code":
        own = nn.functional.multi_head_attention_forward.__code__
        nn.functional.multi_head_attention_forward.__code__ = own.replace(co_name="patched")
        return lambda: setattr(nn.functional.multi_head_attention_forward, "__code__", own)
    own_function = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda *args, **kwargs: own_function(*args, **kwargs)
    return lambda: setattr(nn.functional, "scaled_dot_product_attention", own_function)


@pytest.mark.parametrize(
    "what", ["hook", "attribute", "forward", "train", "parameter", "mode", "fast path", "code", "function"]
)
def test_assert_untouched_sees_what_is_left(what: str) -> None:
    model = Stack(MinGPTAttention()).train()
    before = snapshot(model)
    assert_untouched(model, before)
    undo = left_behind(model, what)
    try:
        with pytest.raises(AssertionError):
            assert_untouched(model, before)
    finally:
        undo()


# ---------------------------------------------------------------------------------- the zoo, traced


def check_case(case: Case, dtype: torch.dtype) -> None:
    import hookattn

    model, inputs = case.model(dtype), case.inputs(dtype)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, inputs, guesses=case.name in ONLY_CONVENTION)
        wanted = model.entry.calls(*inputs)
        with produced() as probe:
            model(*inputs)
    assert len(trace.calls) == len(wanted), f"{len(trace.calls)} calls, expected {len(wanted)}: {paths(trace.calls)}"
    assert paths(trace.calls) == [Host.path + expected.path for expected in wanted]
    assert not trace.skipped, [(item.path, item.reason) for item in trace.skipped]
    for call, expected in zip(trace.calls, wanted, strict=True):
        check_call(
            call,
            **expected.reference_args(),
            dropout=expected.dropout if model.training else 0.0,
            masked_scores=expected.masked_scores,
            tol=TOLERANCE[dtype],
        )
        assert call.site.layer == 0
        assert call.step == 0
        assert call.dtype == dtype
        assert probe.holds(call.weights), "weights: not the model's own bits"
        assert probe.holds(call.output), "output: not the model's own bits"


@every_case
def test_zoo(case: Case) -> None:
    check_case(case, torch.float32)


@some_cases
def test_zoo_bfloat16(name: str) -> None:
    check_case(BY_NAME[name], torch.bfloat16)


@pytest.mark.parametrize("name", ["nanogpt", "overwritten_afterwards", "sink_column_last", "two_biases"])
def test_zoo_float64(name: str) -> None:
    check_case(BY_NAME[name], torch.float64)


@pytest.mark.parametrize("name", ["nanogpt", "mask_masked_fill_in_place", "sink_column_last", "einops_einsum"])
def test_zoo_with_gradients(name: str) -> None:
    """The grad mode is the caller's: gradients are the same, and what is captured is detached."""
    import hookattn

    case = BY_NAME[name]
    model, inputs = case.model(), case.inputs()
    model(*inputs).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    trace = hookattn.trace(model, inputs)
    assert torch.is_grad_enabled()
    assert trace.output.requires_grad
    trace.output.square().sum().backward()
    traced = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(plain) == len(traced) > 0 and all(map(torch.equal, plain, traced))
    for call in trace.calls:
        assert not any(t.requires_grad for t in (call.q, call.k, call.v, call.scores, call.weights, call.output))


# ------------------------------------------------------------------------------------- sites and steps


class Stack(nn.Module):
    """Several attention modules, one after the other."""

    def __init__(self, *attention: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(module) for module in attention])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_are_told_apart() -> None:
    import hookattn

    model = Stack(MinGPTAttention(), MinGPTAttention(), MinGPTAttention())
    trace = trace_checked(hookattn.trace, model, draw(B, T, E))
    assert paths(trace.calls) == ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
    assert [call.site.layer for call in trace.calls] == [0, 1, 2]
    assert {call.site.kind for call in trace.calls} == {"self"}


def test_shared_module_is_called_twice() -> None:
    import hookattn

    shared = MinGPTAttention()
    model = Stack(shared, shared)
    trace = trace_checked(hookattn.trace, model, (draw(B, T, E),))
    assert len(trace.calls) == 2
    x = draw(B, T, E)
    for call in trace.calls:
        expected = shared.calls(x)[0]
        check_call(call, **expected.reference_args())
        x = shared(x)


def test_attention_is_the_model_itself() -> None:
    import hookattn

    model = MinGPTAttention()
    x = draw(B, T, E)
    trace = trace_checked(hookattn.trace, model, {"x": x})
    assert paths(trace.calls) == [""]
    check_call(trace.calls[0], **model.calls(x)[0].reference_args())


def test_cross_attention_is_named_so() -> None:
    """What the module's name says about it."""
    import hookattn

    class DecoderBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.cross_attn = MinGPTAttention(), BY_NAME["cross_other_widths"].build()

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.cross_attn(self.self_attn(x), memory)

    trace = trace_checked(hookattn.trace, DecoderBlock(), BY_NAME["cross_other_widths"].inputs())
    assert [call.site.kind for call in trace.calls] == ["self", "cross"]


def test_cache_over_several_forwards() -> None:
    """Every forward is a step; the keys of a step are the cache and its own."""
    import hookattn

    model = Stack(CachedAttention())
    attention = model.layers[0].attn
    chunks = [draw(B, n, E, seed=n) for n in (3, 1, 2)]
    with torch.no_grad():
        plain = [model(x) for x in chunks]
        attention.past.clear()
        before = snapshot(model)
        with hookattn.tracing(model) as trace:
            traced = [model(x) for x in chunks]
        assert same_bits(plain, traced)
        assert_untouched(model, before)
    assert [call.step for call in trace.calls] == [0, 1, 2]
    seen = 0
    ks, vs = [], []
    for call, x in zip(trace.calls, chunks, strict=True):
        q, k, v = (heads(t, H) for t in attention.qkv(x).chunk(3, -1))
        ks.append(k)
        vs.append(v)
        n = x.shape[1]
        mask = causal(n, seen + n, seen)
        check_call(call, q=q, k=torch.cat(ks, 2), v=torch.cat(vs, 2), scale=D**-0.5, mask=mask)
        seen += n


def test_cache_in_a_buffer() -> None:
    """The buffer is overwritten by later steps; the earlier calls keep what they saw."""
    import hookattn

    model = BufferCache(8).eval()
    chunks = [draw(B, n, E, seed=n) for n in (4, 1, 1)]
    starts = [0, 4, 5]
    with torch.no_grad(), hookattn.tracing(model) as trace:
        for x, start in zip(chunks, starts, strict=True):
            model(x, start)
        model(draw(B, 4, E, seed=50), 0)  # overwrites the first four positions
    assert_untouched(model)
    assert [call.step for call in trace.calls] == [0, 1, 2, 3]
    projected = [model.qkv(x).view(B, -1, 3, H, D).permute(2, 0, 3, 1, 4) for x in chunks]
    for i, call in enumerate(trace.calls[:3]):
        k, v = (torch.cat([p[j] for p in projected[: i + 1]], dim=2) for j in (1, 2))
        n = chunks[i].shape[1]
        check_call(call, q=projected[i][0], k=k, v=v, scale=D**-0.5, mask=causal(n, k.shape[2], starts[i]))


def test_left_clean_when_the_forward_raises() -> None:
    import hookattn

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    model = Stack(MinGPTAttention(), Failing())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        hookattn.trace(model, draw(B, T, E))
    assert_untouched(model, before)
    with pytest.raises(RuntimeError, match="on purpose"), hookattn.tracing(model):
        model(draw(B, T, E))
    assert_untouched(model, before)
    with pytest.raises(ZeroDivisionError), hookattn.tracing(model.layers[0]):
        model.layers[0](draw(B, T, E))
        _ = 1 / 0
    assert_untouched(model, before)


# ---------------------------------------------------------------------------------- words of their own


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_talking_heads(before: bool, after: bool) -> None:
    """The weights are the softmax's own output, and a note says that the heads are mixed."""
    import hookattn

    torch.manual_seed(3)
    model = Stack(TalkingHeads(before, after)).eval()
    x = draw(B, T, E, std=1.5)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, warns=True)
        weights = model.layers[0].attn.softmax_of(x)
    assert paths(trace.calls) == ["layers.0.attn"]
    call = trace.calls[0]
    assert_same_values(call.weights, weights, "weights")
    notes = call.notes if isinstance(call.notes, str) else " ".join(call.notes)
    assert "head" in notes.lower(), f"notes: {call.notes!r}"


def test_one_softmax_over_two_sources() -> None:
    """Either one call over all the keys, or an entry in trace.skipped; never silence, never half of it."""
    import hookattn

    joint = JointSelfCrossAttention()
    x, y = draw(B, T, E, seed=1), draw(B, S, E, seed=2)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.joint = MinGPTAttention(), joint

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.joint(self.first(x), y)

    model = Both()
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, (x, y), warns=True)
        q, k1, v1, k2, v2 = joint.parts(model.first(x), y)
    found = [call for call in trace.calls if call.site.path == "joint"]
    if found:
        assert len(found) == 1
        check_call(found[0], q=q, k=torch.cat([k1, k2], 2), v=torch.cat([v1, v2], 2), scale=1.0)
    else:
        assert any(item.path == "joint" and item.reason for item in trace.skipped)


@pytest.mark.parametrize("kind", NOT_ATTENTION, ids=lambda kind: kind.__name__)
def test_not_a_softmax_over_scores_is_listed(kind: type[nn.Module]) -> None:
    """Absent from the calls, present in trace.skipped with its path and a reason."""
    import hookattn

    torch.manual_seed(5)
    model = Stack(MinGPTAttention(), kind()).eval()
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, draw(*SHAPE), warns=True)
    assert paths(trace.calls) == ["layers.0.attn"]
    skipped = {item.path: item.reason for item in trace.skipped}
    assert "layers.1.attn" in skipped, f"skipped: {skipped}"
    assert isinstance(skipped["layers.1.attn"], str) and skipped["layers.1.attn"].strip()
    assert "layers.0.attn" not in skipped


@pytest.mark.parametrize("kind", NO_CALL, ids=lambda kind: kind.__name__)
def test_other_softmaxes_are_no_calls(kind: type[nn.Module]) -> None:
    import hookattn

    torch.manual_seed(6)
    model = Stack(MinGPTAttention(), kind()).eval()
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, draw(*SHAPE), warns=True)
    assert paths(trace.calls) == ["layers.0.attn"]


def test_query_overwritten_before_the_softmax() -> None:
    """q is gone by the time it is known to be a query: its real values, or an entry in trace.skipped."""
    import hookattn

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(E, 3 * E)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (heads(t, H).contiguous() for t in self.qkv(x).chunk(3, -1))
            scores = q @ k.mT
            q.zero_()
            return scores.softmax(-1) @ v

    model = Stack(MinGPTAttention(), Overwrites()).eval()
    x = draw(B, T, E)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, warns=True)
        q, k, v = (heads(t, H) for t in model.layers[1].attn.qkv(model.layers[0](x)).chunk(3, -1))
    if len(trace.calls) == 2:
        check_call(trace.calls[1], q=q, k=k, v=v, scale=1.0)
    else:
        assert any(item.path == "layers.1.attn" and item.reason for item in trace.skipped)


def test_fully_masked_row_keeps_the_models_own_weights() -> None:
    """A row with nothing to attend to: the mask says so, the weights are what the model formed."""
    import hookattn

    class Row(nn.Module):
        def __init__(self, fill: float) -> None:
            super().__init__()
            self.qkv, self.fill = nn.Linear(E, 3 * E), fill

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
            mask = causal(T, T, -1)  # the first row sees nothing
            scores = (q @ k.mT / D**0.5).masked_fill(~mask, self.fill)
            return scores.softmax(-1) @ v

    for fill in (-torch.inf, torch.finfo(torch.float32).min):
        model = Row(fill).eval()
        x = draw(B, T, E)
        with torch.no_grad(), produced() as probe:
            model(x)
        with torch.no_grad():
            trace = trace_checked(hookattn.trace, model, x, warns=True)
            q, k, v = (heads(t, H) for t in model.qkv(x).chunk(3, -1))
        call = trace.calls[0]
        rows = torch.ones(B, H, T, dtype=torch.bool)
        assert torch.equal(call.mask.expand(B, H, T, T), causal(T, T, -1).expand(B, H, T, T))
        rows[..., 0] = False
        check_call(call, q=q, k=k, v=v, scale=D**-0.5, mask=causal(T, T, -1), rows=rows, faithful=False)
        assert probe.holds(call.weights)
