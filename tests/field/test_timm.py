"""timm: one model of every kind of attention it has."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hookattn_adapters.timm import Timm
from torch import nn

import hookattn
from hookattn.testing import AdapterContract
from tests.field.common import drawn, examine, gap, seeded, torchvision_stand_in

with torchvision_stand_in():
    timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
WINDOWS = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
STAGES = {"embed_dims": (16, 32), "num_heads": (2, 4), "num_classes": 5}

# name: (class, settings, image size, calls, of which cross, tap)
MODELS: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "beit": ("beit.Beit", {**SMALL, "use_rel_pos_bias": True}, 32, 2, 0),
    "cait": ("cait.Cait", SMALL, 32, 4, 0),
    "convit": ("convit.ConVit", {**SMALL, "depth": 3, "local_up_to_layer": 2, "use_pos_embed": True}, 32, 3, 0),
    "crossvit": (
        "crossvit.CrossVit",
        {
            "img_size": 32,
            "img_scale": (1.0, 1.0),
            "patch_size": (8, 16),
            "embed_dim": (16, 32),
            "depth": ((1, 1, 0),),
            "num_heads": (2, 4),
        },
        32,
        4,
        2,
    ),
    "davit": (
        "davit.DaVit",
        {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4), "window_size": 4},
        64,
        4,
        0,
    ),
    "deit": ("deit.VisionTransformerDistilled", SMALL, 32, 2, 0),
    "eva": ("eva.Eva", {**SMALL, "use_rot_pos_emb": True}, 32, 2, 0),
    "gcvit": (
        "gcvit.GlobalContextVit",
        {
            "img_size": 64,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "embed_dim": 16,
            "window_size": (4, 4),
            "window_ratio": None,
        },
        64,
        4,
        0,
    ),
    "hiera": (
        "hiera.Hiera",
        {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1), "q_pool": 2},
        64,
        3,
        0,
    ),
    "levit": (
        "levit.Levit",
        {
            "img_size": 64,
            "embed_dim": (16, 32),
            "key_dim": 8,
            "depth": (1, 1),
            "num_heads": (2, 4),
            "attn_ratio": 2,
            "mlp_ratio": 2,
        },
        64,
        3,
        0,
    ),
    "nest": (
        "nest.Nest",
        {
            "img_size": 32,
            "patch_size": 4,
            "num_levels": 2,
            "embed_dims": (16, 32),
            "num_heads": (2, 4),
            "depths": (1, 1),
        },
        32,
        2,
        0,
    ),
    "pvt_v2": (
        "pvt_v2.PyramidVisionTransformerV2",
        {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)},
        128,
        4,
        0,
    ),
    "swin": ("swin_transformer.SwinTransformer", WINDOWS, 32, 4, 0),
    "swin_v2": ("swin_transformer_v2.SwinTransformerV2", WINDOWS, 32, 4, 0),
    "swin_v2_cr": ("swin_transformer_v2_cr.SwinTransformerV2Cr", WINDOWS, 32, 4, 0),
    "tiny_vit": (
        "tiny_vit.TinyVit",
        {
            "embed_dims": (16, 32, 32, 64),
            "depths": (1, 1, 1, 1),
            "num_heads": (2, 2, 4, 4),
            "window_sizes": (4, 4, 4, 4),
        },
        128,
        3,
        0,
    ),
    "tnt": (
        "tnt.TNT",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "inner_dim": 16,
            "depth": 2,
            "num_heads_inner": 4,
            "num_heads_outer": 4,
        },
        32,
        4,
        0,
    ),
    "twins": (
        "twins.Twins",
        {**STAGES, "img_size": 64, "mlp_ratios": (2, 2), "depths": (2, 2), "sr_ratios": (2, 1), "wss": (2, 2)},
        64,
        4,
        0,
    ),
    "vit": ("vision_transformer.VisionTransformer", SMALL, 32, 2, 0),
    "vit_map": (
        "vision_transformer.VisionTransformer",
        {**SMALL, "qk_norm": True, "global_pool": "map", "class_token": False},
        32,
        3,
        1,
    ),
    "vit_parallel": (
        "vision_transformer.VisionTransformer",
        {**SMALL, "block_fn": "ParallelScalingBlock"},
        32,
        2,
        0,
    ),
    "vit_relpos": ("vision_transformer_relpos.VisionTransformerRelPos", SMALL, 32, 2, 0),
    "vit_sam": (
        "vision_transformer_sam.VisionTransformerSAM",
        {**SMALL, "patch_size": 4, "window_size": 4, "global_attn_indexes": (1,), "use_rel_pos": True},
        32,
        2,
        0,
    ),
    "xcit": ("xcit.Xcit", {**SMALL, "cls_attn_layers": 1}, 32, 3, 0),
}
MIXED = ("cait", "convit")  # heads mixed after the softmax


def build(name: str) -> nn.Module:
    path, settings, *_ = MODELS[name]
    module, cls = path.split(".")
    home = sys.modules[f"timm.models.{module}"]
    settings = {k: getattr(home, v) if k == "block_fn" else v for k, v in settings.items()}
    torch.manual_seed(0)
    return drawn(getattr(home, cls)(**settings))


@pytest.fixture(params=[True, False], ids=["fused", "eager"])
def kernel(request: pytest.FixtureRequest) -> Any:
    timm.layers.set_fused_attn(request.param)
    yield "sdpa" if request.param else "eager"
    timm.layers.set_fused_attn(True)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, kernel: str) -> None:
    *_, size, calls, cross = MODELS[name]
    kinds = {"self": calls - cross, **({"cross": cross} if cross else {})}
    trace = examine(build(name), seeded(2, 3, size, size), calls=calls, kinds=kinds, sharp=1.2)
    assert kernel == "sdpa" or {call.tap for call in trace} == {"eager"}
    assert any(call.mixed for call in trace) is (name in MIXED)
    assert {call.site.stack for call in trace} == {"vision"}
    for kind in kinds:
        assert sorted(c.site.layer for c in trace.select(kind=kind)) == list(range(kinds[kind]))


def test_weights_are_what_its_own_extractor_finds() -> None:
    from timm.utils import AttentionExtract

    timm.layers.set_fused_attn(False)
    try:
        model, image = build("vit"), seeded(2, 3, 32, 32)
    finally:
        timm.layers.set_fused_attn(True)
    trace = hookattn.trace(model, image)
    own = AttentionExtract(model, method="hook")(image)
    assert len(own) == 2
    for call, weights in zip(trace, own.values(), strict=True):
        assert gap(call.weights, weights) < 1e-6
    fused = hookattn.trace(build("vit"), image)
    assert {call.tap for call in fused} == {"sdpa"}
    for a, b in zip(trace, fused, strict=True):
        assert gap(a.weights, b.weights) < 1e-5


def test_channels_are_named_as_such() -> None:
    trace = hookattn.trace(build("davit"), seeded(2, 3, 64, 64))
    assert [call.site.axes for call in trace] == ["patches", "channels"] * 2


LINEAR: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "coat": (lambda: timm.create_model("coat_lite_tiny", img_size=64), 64, 8),
    "efficientvit_mit": (lambda: timm.create_model("efficientvit_b0"), 64, 4),
    "mobilevitv2": (lambda: timm.create_model("mobilevitv2_050"), 64, 9),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention_is_listed_and_not_read(name: str) -> None:
    make, size, sites = LINEAR[name]
    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(make().eval(), seeded(1, 3, size, size))
    assert len({call.site.path for call in trace} | {skipped.path for skipped in trace.skipped}) == sites
    if name == "mobilevitv2":  # one learned query that pools, where there is more than one position to pool
        assert len(trace) == 6 and all(call.shape.startswith("B4 H1 T1") for call in trace)
    else:
        assert len(trace) == 0 and all("linear attention" in skipped.reason for skipped in trace.skipped)


# Softmaxes over branches, channels or positions that weigh no values by queries and keys.
NOT_ATTENTION = {"EfficientViM", "EfficientViMDistilled", "GlobalContext", "RadixSoftmax", "SelectiveKernelAttn"}
NOT_ATTENTION |= {"SplitAttn", "SwinTransformerV2CrBlock"}


def test_every_class_that_attends_is_named() -> None:
    classes = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith(("timm.models.", "timm.layers."))
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == name
    }
    assert len(classes) > 500
    attends = {c.__name__ for c in classes if re.search(r"softmax\(|scaled_dot_product", source(c))}
    assert attends - NOT_ATTENTION - set(Timm.attention) == set()
    assert set(Timm.attention) <= {c.__name__ for c in classes}


def source(cls: type) -> str:
    """All that a class itself defines (getsource of a class reads its whole file each time)."""
    return "".join(inspect.getsource(f) for f in vars(cls).values() if inspect.isfunction(f))


class Contract(AdapterContract):
    adapter = Timm()
    which = ""

    def model(self) -> nn.Module:
        return build(self.which)

    def inputs(self) -> torch.Tensor:
        size = MODELS[self.which][2]
        return seeded(2, 3, size, size)


class TestContractViT(Contract):
    which = "vit_map"


class TestContractSwin(Contract):
    which = "swin"


class TestContractDaViT(Contract):
    which = "davit"
