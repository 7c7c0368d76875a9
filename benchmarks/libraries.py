"""Models of other libraries, as their users take them, with random weights: the size is what counts.

What a library calls its defaults is left alone. A library that is not installed gives no rows, and a line that says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LibraryModel:
    """One model and what it is given.

    Attributes:
        name: says which and how large.
        package: what has to be importable.
        make: builds it.
        given: its arguments; images B 3 H W, token ids B T.
        calls: attention calls of a forward.
        heads, tokens: of its largest call, heads times windows where there are any.
        toy: whether it is so small that nearly all of its time is Python.
    """

    name: str
    package: str
    make: Callable[[], nn.Module]
    given: Callable[[], tuple[Tensor, ...]]
    calls: int
    heads: int
    tokens: int
    toy: bool = False

    @property
    def missing(self) -> bool:
        """Whether its library is not installed."""
        return find_spec(self.package) is None


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """While timm, open_clip and vit-pytorch are imported: they ask for torchvision, and their models never use it."""
    from tests.field.common import torchvision_stand_in

    with torchvision_stand_in():
        yield


def _timm(name: str, **settings: Any) -> nn.Module:
    with _without_torchvision():
        import timm

        return timm.create_model(name, **settings)  # type: ignore[no-any-return]


def _open_clip() -> nn.Module:
    with _without_torchvision():
        import open_clip

        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it warns that there are no trained weights
        try:
            return open_clip.create_model("ViT-B-32")  # type: ignore[no-any-return]
        finally:
            logging.root.setLevel(level)


def _open_clip_toy() -> nn.Module:
    with _without_torchvision():
        from open_clip.model import CLIP

        vision = {"layers": 4, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
        text = {"context_length": 32, "vocab_size": 1000, "width": 64, "heads": 4, "layers": 4}
        return CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)  # type: ignore[no-any-return]


def _unet(*widths: int, text: int, size: int, heads: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {"norm_num_groups": min(32, widths[0])}
    if len(widths) == 2:
        settings |= {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    return UNet2DConditionModel(  # type: ignore[no-any-return]
        sample_size=size, block_out_channels=widths, cross_attention_dim=text, attention_head_dim=heads, **settings
    )


def _x_transformers(layers: int, width: int, heads: int, tokens: int) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(  # type: ignore[no-any-return]
        num_tokens=1000, max_seq_len=tokens, attn_layers=Decoder(dim=width, depth=layers, heads=heads)
    )


def _vit_pytorch(layers: int, width: int, heads: int, size: int, patch: int) -> nn.Module:
    with _without_torchvision():
        from vit_pytorch import ViT

        return ViT(  # type: ignore[no-any-return]
            image_size=size,
            patch_size=patch,
            num_classes=1000,
            dim=width,
            depth=layers,
            heads=heads,
            mlp_dim=4 * width,
        )


def _encoder(layers: int, width: int, heads: int) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True), layers)


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_draw())


def _ids(tokens: int, vocabulary: int = 1000) -> Tensor:
    return torch.randint(0, vocabulary, (1, tokens), generator=_draw())


def _image(size: int = 224) -> tuple[Tensor, ...]:
    return (_normal(1, 3, size, size),)


def library_models() -> Iterator[LibraryModel]:
    """Those of ordinary size, then toys of four layers (the U-Net: two stages) and width 64."""
    of = LibraryModel
    vit, swin, dino = "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2"
    yield of("timm vit_base (224 px)", "timm", lambda: _timm(vit), _image, 12, 12, 197)
    yield of("timm swin_tiny (224 px)", "timm", lambda: _timm(swin), _image, 12, 3 * 64, 49)
    yield of("timm dinov2-small (224 px)", "timm", lambda: _timm(dino, img_size=224), _image, 12, 6, 257)
    yield of(
        "open_clip ViT-B-32 (224 px, 77 tokens)",
        "open_clip",
        _open_clip,
        lambda: (*_image(), _ids(77, 49408)),
        24,
        12,
        77,
    )
    yield of(
        "diffusers U-Net (widths 128 to 512, 32 × 32, 77 tokens)",
        "diffusers",
        lambda: _unet(128, 256, 512, 512, text=768, size=32, heads=8),
        lambda: (_normal(1, 4, 32, 32), torch.tensor(500), _normal(1, 77, 768)),
        32,
        8,
        1024,
    )
    yield of(
        "x-transformers (8 layers, width 384, 128 tokens)",
        "x_transformers",
        lambda: _x_transformers(8, 384, 6, 128),
        lambda: (_ids(128),),
        8,
        6,
        128,
    )
    yield of(
        "vit-pytorch (8 layers, width 384, 224 px)",
        "vit_pytorch",
        lambda: _vit_pytorch(8, 384, 6, 224, 16),
        _image,
        8,
        6,
        197,
    )
    yield of(
        "nn.TransformerEncoder (8 layers, width 384, 128 tokens)",
        "torch",
        lambda: _encoder(8, 384, 6),
        lambda: (_normal(1, 128, 384),),
        8,
        6,
        128,
    )
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
    yield of("timm ViT, toy", "timm", lambda: _timm(vit, **small), lambda: _image(32), 4, 4, 17, True)
    yield of("open_clip, toy", "open_clip", _open_clip_toy, lambda: (*_image(32), _ids(32)), 8, 4, 32, True)
    yield of(
        "diffusers U-Net, toy",
        "diffusers",
        lambda: _unet(32, 64, text=64, size=8, heads=4),
        lambda: (_normal(1, 4, 8, 8), torch.tensor(500), _normal(1, 8, 64)),
        12,
        4,
        64,
        True,
    )
    yield of(
        "x-transformers, toy",
        "x_transformers",
        lambda: _x_transformers(4, 64, 4, 32),
        lambda: (_ids(32),),
        4,
        4,
        32,
        True,
    )
    yield of(
        "vit-pytorch, toy", "vit_pytorch", lambda: _vit_pytorch(4, 64, 4, 32, 8), lambda: _image(32), 4, 4, 17, True
    )
    yield of(
        "nn.TransformerEncoder, toy", "torch", lambda: _encoder(4, 64, 4), lambda: (_normal(1, 32, 64),), 4, 4, 32, True
    )
