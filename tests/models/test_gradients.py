"""``call.grad`` of families of transformers, in sdpa and in eager, against autograd through the eager model.

That model divides in float32, whatever it runs in: so the bound is 1e-5 of the largest entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from tests import tiny_models as tiny
from tests.tiny_models import SMALL, WORDS, Case, build, ids, image, padded


def llava_inputs() -> dict[str, Any]:
    tokens = ids(9)
    tokens[:, 1:5] = 5
    return {"input_ids": tokens, "pixel_values": image(8)}


def tokens() -> dict[str, Any]:
    return {"input_ids": ids(9)}


def left() -> dict[str, Any]:
    return padded("left")


def right() -> dict[str, Any]:
    return padded("right")


def of(kind: str, **options: Any) -> Any:
    """A model for language of a family, by its configuration."""
    given = {**SMALL, **WORDS, "max_position_embeddings": 32, **options}
    return lambda how: build(f"{kind}ForCausalLM", f"{kind}Config", how, **given)


CASES = [
    Case("gpt2", tiny.gpt2, right, {}),
    Case("bert", tiny.bert, left, {}),
    Case("llama", tiny.llama, right, {}),
    Case("t5", tiny.t5, lambda: {**padded("right"), "decoder_input_ids": ids(4)}, {}),
    Case("vit", tiny.vit, lambda: {"pixel_values": image(16)}, {}),
    Case("clip", tiny.clip, lambda: {**padded("right"), "pixel_values": image(8)}, {}),
    Case("llava", tiny.llava, llava_inputs, {}),
    Case("qwen2", of("Qwen2", num_key_value_heads=2), right, {}),
    Case("mistral", of("Mistral", num_key_value_heads=2, sliding_window=4), tokens, {}),
    Case("gpt-neox", of("GPTNeoX"), right, {}),
    Case("opt", of("OPT", ffn_dim=40, word_embed_proj_dim=32, init_std=tiny.STD), tokens, {}),
    Case("roberta", of("Roberta", is_decoder=True), right, {}),
    Case("gemma2", tiny.gemma2, lambda: padded("right", 9), {}, ("eager",)),
    Case("bloom", tiny.bloom, right, {}, ("eager",)),
    # In float64 these have no experts, or NaN in queries that may attend to nothing.
    Case("gpt-oss, float32", tiny.gpt_oss, lambda: padded("left", 9), {}, ("eager",)),
    Case("llama, float32", tiny.llama, left, {}),
]
EACH = [pytest.param(case, how, id=f"{case.name}-{how}") for case in CASES for how in case.implementations]


@contextmanager
def softmaxes() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The scores and weights of every softmax over four axes, whose gradients are kept."""
    found: list[tuple[Tensor, Tensor]] = []
    plain = nn.functional.softmax

    def softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = plain(x, *args, **kwargs)
        if x.dim() == 4:
            x.retain_grad()
            out.retain_grad()
            found.append((x, out))
        return out

    nn.functional.softmax = softmax
    try:
        yield found
    finally:
        nn.functional.softmax = plain


def loss(out: Any, inputs: dict[str, Any]) -> Tensor:
    """Of all that came out, but for positions that are padding."""
    total = torch.zeros((), dtype=torch.float64)
    for name in ("logits", "last_hidden_state", "text_embeds", "image_embeds"):
        if isinstance(x := getattr(out, name, None), Tensor):
            seen = inputs.get("attention_mask")
            if seen is not None and x.dim() == 3 and seen.shape == x.shape[:2]:
                x = x * seen[..., None]
            total = total + x.double().sin().sum()
    return total


@pytest.mark.parametrize(("case", "how"), EACH)
def test_a_family(case: Case, how: str) -> None:
    inputs = case.inputs()
    dtype = torch.float32 if "float32" in case.name else torch.float64
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with softmaxes() as found:
        eager = case.model("eager").to(dtype)
        loss(eager(**inputs), inputs).backward()
    trace = hookattn.trace(case.model(how).to(dtype), inputs, gradients=True)
    loss(trace.output, inputs).backward()
    assert len(trace) == len(found) >= 2
    reached = 0
    for call, (scores, weights) in zip(trace, found, strict=True):
        if weights.grad is None:
            with pytest.raises(hookattn.errors.GradientError, match="did not reach"):
                call.grad("weights")
            continue
        reached += 1
        s = call.weights.shape[3]  # behind it there may be a sink
        # What padding has for values depends on what a kernel makes of queries that may attend to nothing.
        rows = call.mask if dtype == torch.float32 else call.mask.any(-1, keepdim=True)
        for name, expected in (("weights", weights.grad), ("scores", scores.grad)):
            assert expected is not None
            wanted = torch.where(rows, expected[..., :s].double(), 0.0)
            made = torch.where(rows, call.grad(name), 0.0)
            assert float((made - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), (call, name)
            assert float(wanted.abs().max()) > 0
    assert reached >= 2
