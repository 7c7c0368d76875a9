"""vit-pytorch: vision transformers of many designs, each in plain arithmetic of its own."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest
import torch
from hookattn_adapters.einops import Einops
from hookattn_adapters.vit_pytorch import ViTPytorch
from torch import nn

import hookattn
from hookattn.testing import AdapterContract
from tests.field.common import drawn, examine, gap, seeded, torchvision_stand_in

with torchvision_stand_in():
    vit_pytorch = pytest.importorskip("vit_pytorch")

BASE = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 32}
IMAGE, LARGE = (2, 3, 32, 32), (2, 3, 64, 64)
SIDES = {
    f"{side}_{name}": value
    for side, patch in (("sm", 8), ("lg", 16))
    for name, value in {"dim": 32, "patch_size": patch, "enc_depth": 1, "enc_heads": 4, "enc_mlp_dim": 32}.items()
}

# name: (class, settings, image, calls)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    "cait": ("cait.CaiT", {**BASE, "cls_depth": 1}, IMAGE, 3),
    "cross_vit": (
        "cross_vit.CrossViT",
        {"image_size": 32, "num_classes": 5, "depth": 1, "cross_attn_depth": 1, "cross_attn_heads": 4, **SIDES},
        IMAGE,
        4,
    ),
    "deepvit": ("deepvit.DeepViT", BASE, IMAGE, 2),
    "learnable_memory": ("learnable_memory_vit.ViT", BASE, IMAGE, 2),
    "levit": (
        "levit.LeViT",
        {
            "image_size": 64,
            "num_classes": 5,
            "stages": 2,
            "dim": (32, 64),
            "depth": 1,
            "heads": (2, 4),
            "mlp_mult": 2,
            "dim_key": 8,
            "dim_value": 8,
        },
        LARGE,
        3,
    ),
    "maxvit": (
        "max_vit.MaxViT",
        {"num_classes": 5, "dim": 16, "depth": (1, 1), "dim_head": 8, "window_size": 4},
        LARGE,
        4,
    ),
    "merger": ("vit_with_patch_merger.ViT", {**BASE, "patch_merge_layer": 1, "patch_merge_num_tokens": 4}, IMAGE, 3),
    "parallel": ("parallel_vit.ViT", {**BASE, "num_parallel_branches": 2}, IMAGE, 4),
    "rotary": ("rvt.RvT", BASE, IMAGE, 2),
    "simple": ("simple_vit.SimpleViT", BASE, IMAGE, 2),
    "simple_fused": ("simple_flash_attn_vit.SimpleViT", {**BASE, "use_flash": True}, IMAGE, 2),
    "small_dataset": ("vit_for_small_dataset.ViT", BASE, IMAGE, 2),
    "t2t": (
        "t2t.T2TViT",
        {
            "dim": 32,
            "image_size": 32,
            "depth": 2,
            "heads": 4,
            "mlp_dim": 32,
            "num_classes": 5,
            "t2t_layers": ((7, 4), (3, 2), (3, 2)),
        },
        IMAGE,
        4,
    ),
    "vit": ("vit.ViT", BASE, IMAGE, 2),
    "xcit": ("xcit.XCiT", {**BASE, "cls_depth": 1}, IMAGE, 3),
}
CROSS = {"merger": 1, "cross_vit": 0}
MIXED = ("cait", "deepvit")


def build(name: str) -> nn.Module:
    path, settings, *_ = MODELS[name]
    module, cls = path.split(".")
    torch.manual_seed(0)
    return drawn(getattr(importlib.import_module(f"vit_pytorch.{module}"), cls)(**settings))


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    *_, image, calls = MODELS[name]
    cross = CROSS.get(name, 0)
    kinds = {"self": calls - cross, **({"cross": cross} if cross else {})}
    trace = examine(build(name), seeded(*image), calls=calls, kinds=kinds, sharp=1.2)
    assert {call.site.stack for call in trace} == {"vision"}
    assert any(call.mixed for call in trace) is (name in MIXED)


def test_weights_are_what_its_own_recorder_finds() -> None:
    from vit_pytorch.recorder import Recorder

    model, image = build("vit"), seeded(*IMAGE)
    trace = hookattn.trace(model, image)
    _, own = Recorder(model)(image)
    for layer, call in enumerate(trace):
        assert gap(call.weights, own[:, layer]) < 1e-6


def test_ragged_images_are_masked_from_one_another() -> None:
    with torchvision_stand_in():
        from vit_pytorch.na_vit import NaViT
    model = drawn(NaViT(**BASE))
    images = [[seeded(3, 32, 32), seeded(3, 16, 32, seed=1)], [seeded(3, 32, 16, seed=2)]]
    trace = examine(model, (images,), calls=3, sharp=1.0)
    first = trace[0].mask.expand_as(trace[0].weights)[0, 0]
    assert first[0, :16].all() and not first[0, 16:].any() and not first[16, :16].any()


# Distillation, gates and classifiers: softmaxes over what is no key.
NOT_ATTENTION = {"AdaptiveLoopGate", "Attend", "AttentionResidual", "AutoencodingHead", "DistillWrapper"}
NOT_ATTENTION |= {"DistillableEfficientViT", "DistillableT2TViT", "DistillableViT", "MultiScaleEncoder"}
NOT_ATTENTION |= {"TransformerClassifier"}
_ATTENDS = re.compile(r"(self\.attend|\battend|attention|\bsoftmax|scaled_dot_product_attention)\(")


def test_every_class_that_attends_is_named() -> None:
    attends = set()
    with torchvision_stand_in():
        for info in pkgutil.walk_packages(vit_pytorch.__path__, "vit_pytorch."):
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # needs a library of its own
                continue
            for name, cls in vars(module).items():
                if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == info.name:
                    own = (inspect.getsource(f) for f in vars(cls).values() if inspect.isfunction(f))
                    attends |= {name} if _ATTENDS.search("".join(own)) else set()
    assert attends - NOT_ATTENTION == set(ViTPytorch.attention)


class Contract(AdapterContract):
    adapter = ViTPytorch()
    beside = (Einops(),)
    which = ""

    def model(self) -> nn.Module:
        return build(self.which)

    def inputs(self) -> torch.Tensor:
        return seeded(*MODELS[self.which][2])


class TestContractViT(Contract):
    which = "vit"


class TestContractMaxViT(Contract):
    which = "maxvit"


class TestContractMerger(Contract):
    which = "merger"
    formed = ("k", "v", "output")  # its queries are a parameter, the same for the whole batch

    def model(self) -> nn.Module:
        return drawn(build("merger"), gain=4.0)
