"""``generate`` under ``tracing``: every forward is a step, and a cache changes nothing about what is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hookattn_adapters
import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.models.registry import using
from tests import reference
from tests import tiny_models as tiny
from tests.tiny_models import ids, padded

NEW = 5
BOTH = pytest.mark.parametrize("how", ["sdpa", "eager"])
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with using(*hookattn_adapters.ADAPTERS):
        yield
    torch.set_num_threads(threads)


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, hookattn.Trace]:
    """What is generated, the same with and without a trace, and the trace."""
    torch.manual_seed(5)
    plain = model.generate(**inputs, **options)
    torch.manual_seed(5)
    with hookattn.tracing(model, verify="full") as trace:
        made = model.generate(**inputs, **options)
    assert torch.equal(plain, made), "generation is another one when traced"
    assert trace.faithful and not trace.skipped
    tiny.check_math(trace)
    return made, trace


def check_rows(trace: hookattn.Trace, attentions: tuple[Tensor, ...], first: int, live: Tensor | None = None) -> None:
    """Each step's weights are the rows of one forward over the whole sequence, without a cache.

    ``first``: the length of the prompt; ``live``: B T, the queries that are no padding.
    """
    start = 0
    for step in range(NEW):
        calls = trace.select(step=step)
        assert len(calls) == len(attentions)
        n = first if step == 0 else 1
        for call, whole in zip(calls, attentions, strict=True):
            want = whole[:, :, start : start + n, : start + n]
            assert call.q.shape[2] == n, f"{call}: {n} queries expected"
            got, rest = call.weights[..., : start + n], call.weights[..., start + n :]
            assert not rest.numel() or rest.abs().max() == 0, f"{call}: weight on the unused end of the cache"
            rows = torch.ones(want.shape[:3], dtype=torch.bool)
            if live is not None:
                rows &= live[:, None, start : start + n]
            error = (got[rows] - want[rows]).abs().max().item()
            assert error <= 1e-4, f"{call}: off by {error:.3g} from the forward without a cache"
        start += n


def whole(model: nn.Module, eager: nn.Module, tokens: Tensor, **more: Any) -> tuple[Tensor, ...]:
    """The attentions of one eager forward over everything but the last token."""
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        found: tuple[Tensor, ...] = eager(input_ids=tokens[:, :-1], output_attentions=True, **more).attentions
    return found


@BOTH
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_with_a_cache(family: str, how: str, cache: str | None) -> None:
    build = getattr(tiny, family)
    model = build(how)
    tokens, trace = generate(
        model,
        {"input_ids": ids(6), "attention_mask": torch.ones(2, 6, dtype=torch.long)},
        **GREEDY,
        **({"cache_implementation": cache} if cache else {}),
    )
    assert [sorted({c.step for c in trace})] == [list(range(NEW))]
    check_rows(trace, whole(model, build("eager"), tokens), 6)
    keys = {c.k.shape[1] for c in trace}
    assert keys == {2 if family == "llama" else 4}, "keys are repeated"
    assert len(trace.attentions) == NEW


@BOTH
def test_decoding_from_prompts_padded_on_the_left(how: str) -> None:
    model = tiny.llama(how)
    inputs = padded("left", 6, 2)
    tokens, trace = generate(model, inputs, **GREEDY)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW - 1, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    attentions = whole(model, tiny.llama("eager"), tokens, attention_mask=mask, position_ids=positions)
    check_rows(trace, attentions, 6, mask.bool())
    for call in trace:
        assert not call.mask.expand(2, 4, *call.mask.shape[2:])[1, :, :, :2].any(), "padding may be attended to"


@BOTH
def test_a_call_without_a_cache(how: str) -> None:
    model = tiny.llama(how)
    _, trace = generate(model, {"input_ids": ids(6)}, **GREEDY, use_cache=False)
    shapes = [(c.q.shape[2], c.k.shape[2]) for c in trace if c.site.layer == 0]
    assert shapes == [(6 + i, 6 + i) for i in range(NEW)]


@BOTH
def test_beam_search(how: str) -> None:
    model = tiny.llama(how)
    tokens, trace = generate(model, {"input_ids": ids(6)}, **GREEDY, num_beams=3)
    assert tokens.shape == (2, 6 + NEW)
    last = trace.select(step=-1)
    assert {c.weights.shape[0] for c in last} == {6} and {c.weights.shape[2] for c in last} == {1}


def test_sampling_draws_the_same_tokens() -> None:
    generate(tiny.llama(), {"input_ids": ids(6)}, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=20)


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_and_a_decoder(how: str, beams: int) -> None:
    model = tiny.t5(how)
    inputs = padded("right", 7)
    tokens, trace = generate(model, inputs, **GREEDY, num_beams=beams)
    encoder = trace.select(stack="encoder")
    assert {c.step for c in encoder} == {0} and len(encoder) == 2
    decoder = trace.select(stack="decoder", kind="self")
    assert [c.k.shape[2] for c in decoder if c.site.layer == 0] == list(range(1, NEW + 1))
    cross = trace.select(kind="cross")
    assert {tuple(c.weights.shape[2:]) for c in cross} == {(1, 7)}
    if beams == 1:
        eager = tiny.t5("eager")
        eager.load_state_dict(model.state_dict())
        with torch.no_grad():
            own = eager(**inputs, decoder_input_ids=tokens[:, :-1], output_attentions=True)
        for layer in range(2):
            mine = torch.cat([c.weights for c in cross if c.site.layer == layer], 2)
            reference.assert_close(mine, own.cross_attentions[layer], 1e-4, f"cross-attention of layer {layer}")
            for c in decoder.select(layer=layer):
                row = own.decoder_attentions[layer][:, :, c.step, : c.step + 1]
                reference.assert_close(c.weights[:, :, 0], row, 1e-4, str(c))


def test_cross_attention_without_the_pack_is_found_too() -> None:
    with using():
        _, trace = generate(tiny.t5(), padded("right", 7), **GREEDY)
    kinds = {(c.site.stack, c.site.kind) for c in trace}
    assert kinds == {("encoder", "self"), ("decoder", "self"), ("decoder", "cross")}


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [{"input_ids": ids(6)}, padded("left", 6, 2)], ids=["plain", "padded"])
def test_flex_attention_of_a_llama(inputs: dict[str, Tensor]) -> None:
    model, eager = tiny.llama("flex_attention", head_dim=16), tiny.llama("eager", head_dim=16)
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain = tiny.run(model, inputs)
        trace = tiny.traced(model, inputs)
        own = tiny.run(eager, inputs, output_attentions=True)
    tiny.assert_same_output(plain, trace.output)
    tiny.check_math(trace)
    tiny.check_eager(trace, own, {"attentions": {"kind": "self"}})
    assert {c.k.shape[1] for c in trace} == {2}
