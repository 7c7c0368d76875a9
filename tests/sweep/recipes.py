"""How a type can differ from the rules, and what its entries in the table are written with."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import import_utils

from tests.field.common import torchvision_stand_in


@dataclass(frozen=True)
class Recipe:
    """How one type differs from the rules.

    Attributes:
        config: configuration attributes to set, dotted within sub-configurations.
        model: the model class, by name.
        inputs: inputs by name, or functions that make them.
        without: inputs that are left out.
        start: makes the configuration that is then made small, in place of the class's default.
        reason: why there is no case: it is not run, and this is what the coverage page says.
        part: only the models of another type build it, and it is run in one of them.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    start: Callable[[Any], Any] | None = None
    reason: str = ""
    part: bool = False


def randn(*shape: int) -> Callable[[], Tensor]:
    """Makes normal numbers."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(13))


def ints(high: int, *shape: int) -> Callable[[], Tensor]:
    """Makes whole numbers from 1."""
    return lambda: torch.randint(1, high, shape, generator=torch.Generator().manual_seed(13))


def ones(*shape: int) -> Callable[[], Tensor]:
    """Makes a mask that hides nothing."""
    return lambda: torch.ones(*shape, dtype=torch.long)


def resnet(**options: Any) -> Callable[[Any], Any]:
    """Starts a detection transformer from a backbone of transformers in place of one of timm."""
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return lambda cls: cls(
        backbone_config=transformers.ResNetConfig(**small, out_indices=[4]), use_timm_backbone=False, **options
    )


def resnet3(cls: Any) -> Any:
    """The same with three scales."""
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return cls(backbone_config=transformers.ResNetConfig(**small, out_indices=[2, 3, 4]), use_timm_backbone=False)


def grid_positions() -> Tensor:
    """3 16 2: the places of patches on a 4 × 4 grid."""
    return torch.cartesian_prod(torch.arange(4), torch.arange(4))[None].expand(3, -1, -1)


def patches(width: int) -> Callable[[], Tensor]:
    """3 16 width: row and column from 1, then pixels."""
    return lambda: torch.cat([grid_positions() + 1, randn(3, 16, width - 2)()], -1)


def long_mask(length: int) -> Callable[[], Tensor]:
    """3 length: padded left and right, longer than a block."""

    def make() -> Tensor:
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, : length // 6] = 0
        mask[2, -(length // 5) :] = 0
        return mask

    return make


def first_token(length: int) -> Callable[[], Tensor]:
    """3 length: 1 at the first token that is not padding."""

    def make() -> Tensor:
        mask = torch.zeros(3, length, dtype=torch.long)
        mask[:, 0], mask[1, 0], mask[1, length // 6] = 1, 0, 1
        return mask

    return make


def holders(token: int, n: int) -> Callable[[], Tensor]:
    """3 9 + n: text with n placeholders in it, away from the padding."""

    def make() -> Tensor:
        ids = ints(60, 3, 9 + n)()
        ids[:, 4 : 4 + n] = token
        return ids

    return make


def session(name: str, side: int) -> Callable[[], Any]:
    """Makes what a video segmenter keeps between frames: two frames, and one object that is pointed at in the first."""

    def make() -> Any:
        cls = getattr(transformers, name)
        made = cls(video=randn(2, 3, side, side)(), video_height=side, video_width=side, dtype=torch.float32)
        which = made.obj_id_to_idx(1)
        made.obj_with_new_inputs = [1]
        points = {"point_coords": side / 2 + randn(1, 1, 2, 2)(), "point_labels": torch.ones(1, 1, 2, dtype=torch.int)}
        made.add_point_inputs(which, 0, points)
        return made

    return make


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IMAGE = {"pixel_values": randn(3, 3, 64, 64)}
SAM = {
    "image_embeddings": randn(3, 64, 4, 4),
    "image_positional_embeddings": randn(3, 64, 4, 4),
    "sparse_prompt_embeddings": randn(3, 1, 2, 64),
    "dense_prompt_embeddings": randn(3, 64, 4, 4),
    "multimask_output": True,
}
SAM2 = {**SAM, "high_resolution_features": lambda: [randn(3, 8, 16, 16)(), randn(3, 16, 8, 8)()]}
SAM_CONFIG = {
    "vision_config.output_channels": 64,
    "prompt_encoder_config.image_size": 32,
    "prompt_encoder_config.patch_size": 8,
}
SAM3 = {"vision_features": randn(3, 16, 64), "text_features": randn(3, 5, 64)}
SERIES = {"prediction_length": 8, "num_time_features": 2, "lags_sequence": [1, 2, 3]}
POINTS = {"input_points": None, "input_labels": None, "input_boxes": randn(3, 2, 4), "input_masks": None}
EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 97,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 1,
    "eos_token_id": 1,
}
ROPE3 = {**ROPE, "mrope_section": [3, 3, 2]}
ROPE4 = {**ROPE, "mrope_section": [2, 1, 1]}
VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "attn_resolutions": [16],
    "resolution": 32,
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 32,
    "codebook_size": 16,
}
HIERA = {
    "hidden_size": 8,
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 4],
    "num_attention_heads": 1,
    "blocks_per_stage": [1, 2, 2, 1],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [4],
    "image_size": [64, 64],
}


def lacks(*libraries: str) -> str:
    """Why a type that needs these is not run; empty where they can all be imported."""
    for library in libraries:
        try:
            with contextlib.nullcontext() if library == "torchvision" else torchvision_stand_in():
                importlib.import_module(library)
        except ImportError as error:
            return f"needs {library}, which cannot be imported ({error})"
        # transformers asks for what a library imports besides, which the models that are made of it do without.
        asks = f"is_{library}_available"
        for module in (transformers.utils, import_utils):
            if hasattr(module, asks):
                setattr(module, asks, lambda: True)
        if library in import_utils.BACKENDS_MAPPING:
            import_utils.BACKENDS_MAPPING[library] = (lambda: True, "")
    return ""


TIMM = lacks("timm")
BLOCKS = "a convolutional net without attention, whose default configuration leaves out the table of its blocks"
PART = Recipe(part=True)
SESSION = "takes a video session object that only its processor makes"
MASKS = Recipe(inputs={"masks": randn(3, 1, 32, 32)})
