"""open_clip: CLIP with a transformer and with a ResNet, attentional pooling, CoCa, a tower of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hookattn_adapters.open_clip import OpenCLIP
from torch import Tensor, nn

import hookattn
from hookattn.testing import AdapterContract
from tests.field.common import drawn, examine, gap, ids, seeded, torchvision_stand_in

with torchvision_stand_in():
    open_clip = pytest.importorskip("open_clip")

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8, "patch_size": None}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
POOLED = {**VISION, "attentional_pool": True, "attn_pooler_heads": 4}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}

# name: (model, image size, calls by stack and kind)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[tuple[str, str], int]]] = {
    "clip": (lambda: open_clip.CLIP(32, VISION, TEXT), 32, {("vision", "self"): 2, ("text", "self"): 2}),
    "coca": (
        lambda: open_clip.CoCa(
            32,
            multimodal_cfg=dict(TEXT),
            text_cfg={**TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg={**POOLED, "output_tokens": True},
        ),
        32,
        {
            ("vision", "self"): 2,
            ("vision", "cross"): 1,
            ("text", "self"): 2,
            ("decoder", "self"): 2,
            ("decoder", "cross"): 2,
        },
    ),
    "custom": (
        lambda: open_clip.CustomTextCLIP(32, VISION, {**TEXT, "block_type": "custom", "qk_norm": True}),
        32,
        {("vision", "self"): 2, ("text", "self"): 2},
    ),
    "pooled": (
        lambda: open_clip.CustomTextCLIP(32, POOLED, TEXT),
        32,
        {("vision", "self"): 2, ("vision", "cross"): 1, ("text", "self"): 2},
    ),
    "resnet": (lambda: open_clip.CLIP(32, RESNET, TEXT), 64, {("vision", "self"): 1, ("text", "self"): 2}),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return drawn(MODELS[name][0]())


def inputs(name: str) -> tuple[Tensor, Tensor]:
    size = MODELS[name][1]
    return seeded(2, 3, size, size), ids(2, 12, 49)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    places = MODELS[name][2]
    kinds: dict[str, int] = {}
    for (_, kind), n in places.items():
        kinds[kind] = kinds.get(kind, 0) + n
    trace = examine(build(name), inputs(name), calls=sum(places.values()), kinds=kinds)
    for (stack, kind), n in places.items():
        assert [c.site.layer for c in trace.select(stack=stack, kind=kind)] == list(range(n))


def test_text_is_causal_and_images_are_not() -> None:
    trace = hookattn.trace(build("clip"), inputs("clip"))
    for call in trace.select(stack="text"):
        assert torch.equal(call.mask.expand(2, 4, 12, 12), torch.ones(12, 12).tril().bool().expand(2, 4, 12, 12))
    assert all(call.mask.all() for call in trace.select(stack="vision"))


def test_weights_are_what_its_own_block_gives_out() -> None:
    model, kept = build("clip"), []
    block = model.visual.transformer.resblocks[0]

    def forward(q: Tensor, k: Any = None, v: Any = None, attn_mask: Tensor | None = None) -> Tensor:
        out, weights = block.attn(q, q, q, need_weights=True, average_attn_weights=False, attn_mask=attn_mask)
        kept.append(weights)
        return out

    trace = hookattn.trace(model, inputs("clip"))
    block.attention = lambda q_x, k_x=None, v_x=None, attn_mask=None: forward(q_x, k_x, v_x, attn_mask)
    model(*inputs("clip"))
    assert gap(trace.select(stack="vision", layer=0)[0].weights, kept[0]) < 1e-5


def test_a_tower_of_timm() -> None:
    pytest.importorskip("timm")
    model = drawn(open_clip.CustomTextCLIP(32, TIMM, TEXT))
    trace = examine(model, (seeded(1, 3, 224, 224), ids(1, 12, 49)), calls=14, sharp=1.2)
    assert [c.site.layer for c in trace.select(stack="vision")] == list(range(12))
    assert len(trace.select(stack="text")) == 2


class Contract(AdapterContract):
    adapter = OpenCLIP()
    complete = False  # nn.MultiheadAttention is torch's
    which = ""

    def model(self) -> nn.Module:
        return build(self.which)

    def inputs(self) -> tuple[Tensor, Tensor]:
        return inputs(self.which)


class TestContractCLIP(Contract):
    which = "clip"


class TestContractCoCa(Contract):
    which = "coca"
