"""Models of transformers, tiny and random: against their own eager attentions, and against float64 math."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hookattn_adapters
import pytest
import torch
from torch import nn

from hookattn.models.registry import using
from tests import tiny_models as tiny
from tests.tiny_models import Case, ids, image, padded

SELF: dict[str, dict[str, str]] = {"attentions": {"kind": "self"}}
CROSS: dict[str, dict[str, str]] = {**SELF, "cross_attentions": {"kind": "cross"}}
T5: dict[str, dict[str, str]] = {
    "encoder_attentions": {"stack": "encoder"},
    "decoder_attentions": {"stack": "decoder", "kind": "self"},
    "cross_attentions": {"kind": "cross"},
}
CLIP: dict[str, dict[str, str]] = {
    "text_model_output.attentions": {"stack": "text"},
    "vision_model_output.attentions": {"stack": "vision"},
}


def states(**more: Any) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)), **more}


def far() -> torch.Tensor:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return mask


def llava_inputs() -> dict[str, Any]:
    tokens = ids(9)
    tokens[:, 1:5] = 5
    return {"input_ids": tokens, "pixel_values": image(8)}


CASES = [
    Case("gpt2", tiny.gpt2, lambda: {"input_ids": ids()}, SELF),
    Case("gpt2-padded", tiny.gpt2, lambda: padded("left"), SELF),
    Case(
        "gpt2-scaled-by-layer",
        lambda i: tiny.gpt2(i, scale_attn_by_inverse_layer_idx=True),
        lambda: {"input_ids": ids()},
        SELF,
    ),
    Case("gpt2-unscaled", lambda i: tiny.gpt2(i, scale_attn_weights=False), lambda: {"input_ids": ids()}, SELF),
    Case("gpt2-reordered", lambda i: tiny.gpt2(i, reorder_and_upcast_attn=True), lambda: padded("right"), SELF),
    Case(
        "gpt2-cross",
        lambda i: tiny.gpt2(i, add_cross_attention=True),
        lambda: states(encoder_attention_mask=far(), **padded("right")),
        CROSS,
    ),
    Case("bert", tiny.bert, lambda: {"input_ids": ids()}, SELF),
    Case("bert-padded-left", tiny.bert, lambda: padded("left"), SELF),
    Case("bert-padded-right", tiny.bert, lambda: padded("right"), SELF),
    Case(
        "bert-decoder",
        lambda i: tiny.bert(i, "BertLMHeadModel", is_decoder=True, add_cross_attention=True),
        lambda: states(encoder_attention_mask=far(), **padded("right")),
        CROSS,
    ),
    Case("llama", tiny.llama, lambda: {"input_ids": ids()}, SELF),
    Case("llama-padded-left", tiny.llama, lambda: padded("left"), SELF),
    Case("llama-one-key-head", lambda i: tiny.llama(i, num_key_value_heads=1), lambda: padded("right"), SELF),
    Case("t5", tiny.t5, lambda: {**padded("right"), "decoder_input_ids": ids(4)}, T5),
    Case("vit", tiny.vit, lambda: {"pixel_values": image(16)}, SELF),
    Case("clip", tiny.clip, lambda: {**padded("right"), "pixel_values": image(8)}, CLIP),
    Case("gpt-oss", tiny.gpt_oss, lambda: padded("left", 9), SELF, ("eager",)),
    Case("gemma2", tiny.gemma2, lambda: padded("left", 9), SELF, ("eager",)),
    Case("bloom", tiny.bloom, lambda: padded("left"), SELF, ("eager",)),
    Case("llava", tiny.llava, llava_inputs, {}),
]
EACH = [pytest.param(case, how, id=f"{case.name}-{how}") for case in CASES for how in case.implementations]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, params=["pack", "generic"])
def adapters(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything holds with the built-in adapters, and without any."""
    with using(*(hookattn_adapters.ADAPTERS if request.param == "pack" else ())):
        yield


@pytest.mark.parametrize(("case", "how"), EACH)
@torch.no_grad()
def test_a_forward(case: Case, how: str) -> None:
    model = case.model(how)
    plain = tiny.run(model, case.inputs())
    made = tiny.traced(model, case.inputs())
    tiny.assert_same_output(plain, made.output)
    tiny.check_math(made)
    if case.attentions:
        eager = case.model("eager")
        eager.load_state_dict(model.state_dict())
        tiny.check_eager(made, tiny.run(eager, case.inputs(), output_attentions=True), case.attentions)


@pytest.mark.parametrize(("case", "how"), EACH)
def test_a_training_forward_with_dropout(case: Case, how: str) -> None:
    model = case.model(how).train()
    plain = tiny.run(model, case.inputs())
    made = tiny.traced(model, case.inputs())
    tiny.assert_same_output(plain, made.output)
    tiny.check_math(made)
    for a, b in zip(gradients(model, plain), gradients(model, made.output), strict=True):
        assert torch.equal(a, b), "gradients differ"


def gradients(model: nn.Module, output: Any) -> list[torch.Tensor]:
    first = next(x for x in output.values() if isinstance(x, torch.Tensor) and x.requires_grad)
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(first.square().mean(), wanted, allow_unused=True)
    return [g for g in found if g is not None]
