"""diffusers: U-Nets, diffusion transformers and an autoencoder, with the processors it brings and one written here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hookattn_adapters.diffusers import Diffusers
from torch import Tensor, nn

import hookattn
from hookattn.testing import AdapterContract
from tests.field.common import drawn, examine, gap, seeded

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")

LATENTS, TEXT, STEP = seeded(2, 4, 8, 8), seeded(2, 5, 16, seed=1), torch.tensor([3, 3])
PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PATCHES = {"in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        **PATCHES,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        **options,
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


UNET_INPUTS = {"sample": LATENTS, "timestep": STEP, "encoder_hidden_states": TEXT}
DIT_INPUTS = {"hidden_states": LATENTS, "timestep": STEP}
SD3_INPUTS = {**DIT_INPUTS, "encoder_hidden_states": TEXT, "pooled_projections": seeded(2, 16)}
FLUX_INPUTS = {
    "hidden_states": seeded(2, 16, 4),
    "encoder_hidden_states": TEXT,
    "pooled_projections": seeded(2, 16),
    "timestep": torch.tensor([0.3, 0.3]),
    "img_ids": seeded(16, 3, std=3.0).round(),
    "txt_ids": torch.zeros(5, 3),
}

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, int]]] = {
    "auraflow": (
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        {**DIT_INPUTS, "encoder_hidden_states": TEXT, "timestep": torch.tensor([0.3, 0.3])},
        {"joint": 1, "self": 1},
    ),
    "autoencoder": (
        lambda: diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=4, latent_channels=4),
        {"sample": seeded(2, 3, 8, 8)},
        {"self": 2},
    ),
    "dit": (
        lambda: diffusers.DiTTransformer2DModel(**HEADS, **PATCHES, norm_num_groups=4, num_embeds_ada_norm=10),
        {**DIT_INPUTS, "class_labels": torch.tensor([1, 2])},
        {"self": 2},
    ),
    "flux": (flux, FLUX_INPUTS, {"joint": 2, "self": 2}),
    "pixart": (
        lambda: diffusers.PixArtTransformer2DModel(
            **HEADS,
            **PATCHES,
            norm_num_groups=4,
            cross_attention_dim=16,
            caption_channels=16,
            out_channels=4,
            use_additional_conditions=False,
        ),
        {**DIT_INPUTS, "encoder_hidden_states": TEXT, "encoder_attention_mask": PADDED},
        {"self": 2, "cross": 2},
    ),
    "prior": (
        lambda: diffusers.PriorTransformer(**HEADS, num_layers=2, embedding_dim=16, num_embeddings=5),
        {
            "hidden_states": seeded(2, 16),
            "timestep": 3,
            "proj_embedding": seeded(2, 16, seed=2),
            "encoder_hidden_states": TEXT,
        },
        {"self": 2},
    ),
    "sd3": (sd3, SD3_INPUTS, {"joint": 2}),
    "sd35": (lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)), SD3_INPUTS, {"joint": 2, "self": 1}),
    "unet": (unet, UNET_INPUTS, {"self": 4, "cross": 4}),
    "unet_padded": (unet, {**UNET_INPUTS, "encoder_attention_mask": PADDED}, {"self": 4, "cross": 4}),
    "unet_unconditional": (
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        ),
        {"sample": seeded(2, 3, 8, 8), "timestep": 3},
        {"self": 4},
    ),
    "wan": (
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ),
        {
            "hidden_states": seeded(1, 4, 2, 8, 8),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": seeded(1, 5, 16),
        },
        {"self": 2, "cross": 2},
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return drawn(MODELS[name][0]())


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    _, inputs, kinds = MODELS[name]
    trace = examine(build(name), inputs, calls=sum(kinds.values()), kinds=kinds)
    assert {call.tap for call in trace} == {"sdpa"}


class Kept:
    """An attention processor as a user writes one, that keeps what it computes."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (attn.head_to_batch_dim(x) for x in (q, k, v))
        weights = attn.get_attention_scores(q, k, attention_mask)
        self.weights.append(weights.detach())
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(weights, v))))


def test_a_processor_of_ones_own_is_watched_and_agrees_with_the_fused_one() -> None:
    model = build("unet")
    fused = hookattn.trace(model, UNET_INPUTS)
    own = Kept()
    model.set_attn_processor(own)
    trace = examine(model, UNET_INPUTS, calls=8, kinds={"self": 4, "cross": 4})
    assert {call.tap for call in trace} == {"eager"}
    for call, weights, other in zip(trace, own.weights[-8:], fused, strict=True):
        assert torch.equal(call.weights.flatten(0, 1), weights)
        assert gap(call.weights, other.weights) < 1e-5


def test_the_processors_that_it_brings_agree() -> None:
    traces = []
    for processor in (processors.AttnProcessor(), processors.AttnProcessor2_0()):
        model = build("unet_padded")
        model.set_attn_processor(processor)
        traces.append(hookattn.trace(model, MODELS["unet_padded"][1], verify="full", strict=True))
    assert [{call.tap for call in trace} for trace in traces] == [{"eager"}, {"sdpa"}]
    for a, b in zip(*traces, strict=True):
        assert gap(a.weights, b.weights) < 1e-5
    padded = traces[1].select(kind="cross", stack="down")[0]
    assert padded.mask.expand_as(padded.weights)[1, ..., 3:].any().item() is False


def test_blocks_of_a_unet_are_stacks() -> None:
    trace = hookattn.trace(build("unet"), UNET_INPUTS)
    places = [(call.site.stack, call.site.kind, call.site.layer) for call in trace]
    assert places == [
        *[("down", "self", 0), ("down", "cross", 0)],
        *[("mid", "self", 0), ("mid", "cross", 0)],
        *[("up", "self", 0), ("up", "cross", 0), ("up", "self", 1), ("up", "cross", 1)],
    ]


def test_joint_attention_holds_latents_and_condition() -> None:
    for name, tokens in (("sd3", 16 + 5), ("flux", 16 + 5)):
        trace = hookattn.trace(build(name), MODELS[name][1])
        assert {call.weights.shape[2:] for call in trace} == {(tokens, tokens)}


def test_linear_attention_is_listed_beside_the_softmax() -> None:
    model = diffusers.SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
    )
    trace = examine(drawn(model), {**DIT_INPUTS, "encoder_hidden_states": TEXT}, calls=2, kinds={"cross": 2}, skipped=2)
    assert [skipped.path for skipped in trace.skipped] == [f"transformer_blocks.{i}.attn1" for i in (0, 1)]


# Gates of experts and of layers; processors run inside the module that has them.
NOT_ATTENTION = {"MoEGate", "MiniMaxMusic3ConditionEncoder", "NucleusMoELayer"}
_ATTENDS = re.compile(
    r"self\.processor\(|dispatch_attention_fn\(|scaled_dot_product_attention\(|\bsoftmax\(|flex_attention\("
)


def test_every_class_that_attends_is_named() -> None:
    attends, all_classes = set(), set()
    for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # of flax, say
            continue
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == info.name:
                own = (inspect.getsource(f) for f in vars(cls).values() if inspect.isfunction(f))
                all_classes.add(name)
                if _ATTENDS.search("".join(own)) and "Processor" not in name:
                    attends.add(name)
    assert attends - NOT_ATTENTION == set(Diffusers.attention)


class Contract(AdapterContract):
    adapter = Diffusers()
    which = ""

    def model(self) -> nn.Module:
        return build(self.which)

    def inputs(self) -> dict[str, Any]:
        return MODELS[self.which][1]


class TestContractUNet(Contract):
    which = "unet_padded"


class TestContractFlux(Contract):
    which = "flux"


class TestContractAutoencoder(Contract):
    which = "autoencoder"


class TestContractWan(Contract):
    which = "wan"
