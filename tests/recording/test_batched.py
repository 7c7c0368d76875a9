"""Small plain calls of a fused kernel behind the transformers interface: kept at once, and the same as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn.recording.batched import small_shape
from hookattn.recording.session import Session

pytest.importorskip("transformers")

from tests import tiny_models as tiny
from tests.reference import reference_attention

MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], bool]] = {
    # model, inputs, whether its calls go the short way
    "gpt2": (tiny.gpt2, lambda: tiny.ids(7), True),
    "gpt2, one token": (tiny.gpt2, lambda: tiny.ids(1), True),
    "gpt2, scaled by layer": (lambda: tiny.gpt2(scale_attn_by_inverse_layer_idx=True), lambda: tiny.ids(7), True),
    "bert": (tiny.bert, lambda: tiny.ids(7), True),
    "llama, grouped": (tiny.llama, lambda: tiny.ids(7), True),
    "gpt2, padded": (tiny.gpt2, lambda: tiny.padded("right"), False),
    "bert, padded": (tiny.bert, lambda: tiny.padded("right"), False),
    "bert, training": (lambda: tiny.bert().train(), lambda: tiny.ids(7), False),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets True for each call that went the short way, False for each that was sent back."""
    went: list[bool] = []
    small = Session.record_small

    def counted(self: Session, *args: Any) -> bool:
        went.append(small(self, *args))
        return went[-1]

    monkeypatch.setattr(Session, "record_small", counted)
    return went


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_short_way_is_the_long_one(
    name: str, grad: bool, short: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, inputs, goes = MODELS[name]
    model, x = make(), inputs()
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        quick = hookattn.trace(model, x)
        assert any(short) is goes
        assert all(short)
        n = len(short)
        monkeypatch.setattr("hookattn.recording.batched.SMALL", 0)
        torch.manual_seed(1)
        slow = hookattn.trace(model, x)
    assert not any(short[n:])
    assert len(quick) == len(slow) == 2
    assert torch.equal(quick.output[0], slow.output[0])
    for a, b in zip(quick, slow, strict=True):
        plain = ("site", "step", "index", "tap", "dtype", "scale", "causal", "window", "dropout", "notes", "derivable")
        assert [getattr(a, p) for p in plain] == [getattr(b, p) for p in plain]
        assert list(a.fields) == list(b.fields)
        assert a.certificate.faithful
        assert b.certificate.faithful
        for field in ("q", "k", "v", "mask", "output"):
            one, other = a.get(field), b.get(field)
            assert one is not None
            assert other is not None
            assert torch.equal(one, other), field
            assert not one.requires_grad
            assert one.is_contiguous()
        scores, weights, output = reference_attention(a.q, a.k, a.v, scale=a.scale, mask=a.mask)
        torch.testing.assert_close(a.scores.double(), scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.weights.double(), weights, rtol=0, atol=1e-5)
        if not a.dropout:
            torch.testing.assert_close(a.output.double(), output, rtol=0, atol=1e-5)


def test_what_is_asked_for_is_what_is_kept(short: list[bool]) -> None:
    model, x = tiny.gpt2(), tiny.ids(7)
    for capture in (("q", "v"), ("weights",), ("mask", "scores"), ("output",)):
        made = hookattn.trace(model, x, capture=capture, verify="off")
        assert all(set(c.fields) == set(capture) for c in made)
    assert len(short) == 8
    assert all(short)


@pytest.mark.parametrize("options", [{"layers": [1]}, {"heads": [2]}, {"queries": -1}, {"dtype": torch.float16}])
def test_a_selection_goes_the_long_way(options: dict[str, Any], short: list[bool]) -> None:
    made = hookattn.trace(tiny.gpt2(), tiny.ids(7), **options)
    assert not any(short)
    assert all(c.certificate.faithful for c in made)
    assert [c.site.layer for c in made] == options.get("layers", [0, 1])


def test_steps_with_a_cache(short: list[bool]) -> None:
    model, x = tiny.gpt2(), tiny.ids(4)
    with hookattn.tracing(model) as made:
        out = model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert all(short)
    assert short
    assert [c.step for c in made] == [0, 0, 1, 1, 2, 2]
    assert [c.k.shape[2] for c in made] == [4, 4, 5, 5, 6, 6]
    assert made.faithful
    with torch.no_grad():
        whole = hookattn.trace(model, out[:, :-1])
    for step in (1, 2):
        for layer in (0, 1):
            row = made.select(step=step, layer=layer)[0].weights[:, :, 0]
            torch.testing.assert_close(row, whole[layer].weights[:, :, 3 + step, : 4 + step], rtol=0, atol=1e-5)


def test_the_model_may_write_to_what_was_kept() -> None:
    model, x = tiny.gpt2(), tiny.ids(7)
    attention = model.transformer.h[1].attn
    whole: list[Tensor] = []
    handles = [
        attention.c_attn.register_forward_hook(lambda _, __, out: whole.extend([out, out.clone()])),
        attention.c_proj.register_forward_pre_hook(lambda *_: whole[0].zero_() is None or None),
    ]
    try:
        with torch.no_grad():
            made = hookattn.trace(model, x)
    finally:
        for handle in handles:
            handle.remove()
    assert not whole[0].any()
    for name, part in zip("qkv", whole[1].split(32, -1), strict=True):
        assert torch.equal(made[1].get(name), part.unflatten(-1, (4, 8)).transpose(1, 2))
    assert made.faithful


def test_keys_that_the_kernel_was_given_only_in_part(short: list[bool]) -> None:
    """A static cache is longer than what is attended to."""
    model, x = tiny.llama(num_key_value_heads=4), tiny.ids(4)
    with hookattn.tracing(model) as made:
        model.generate(x, max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True)
    assert made.faithful
    assert [c.k.shape[2] for c in made.select(step=0)] == [4, 4]
    assert not any(short)


def test_what_is_no_plain_call() -> None:
    def given(*shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4) -> Any:
        return tuple(torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))

    q, grouped, wide = (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)
    good = small_shape(given(q, grouped, wide, (2, 4, 3, 6)), 1.0)
    assert good is not None
    assert (good.t, good.s) == (3, 5)
    mixed = (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    for bad in (
        given(q, (2, 3, 5, 8), (2, 3, 5, 6), (2, 4, 3, 6)),  # no groups of heads
        given(q, (1, 2, 5, 8), (1, 2, 5, 6), (2, 4, 3, 6)),  # one batch entry for all
        given(q, grouped, wide, (2, 4, 3, 8)),
        given(q, (2, 2, 5, 7), wide, (2, 4, 3, 6)),
        given(q, (2, 2, 0, 8), (2, 2, 0, 6), (2, 4, 3, 6)),
        given(q[1:], grouped[1:], wide[1:], (4, 3, 6)),
        given(q, grouped, wide, (2, 4, 3, 6), dtypes=mixed),
        given((2, 4, 300, 8), (2, 2, 300, 8), (2, 2, 300, 6), (2, 4, 300, 6)),  # too many scores
    ):
        assert small_shape(bad, 1.0) is None
    assert small_shape(given(q, grouped, wide, (2, 4, 3, 6)), 0.0) is None
