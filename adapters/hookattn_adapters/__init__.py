"""The built-in adapters: one architecture family a file, all of them in :data:`ADAPTERS`.

They use the public API alone, and come in through the same entry point as anyone else's. None of them reads a kernel's
arguments: every family here looks its kernel up through the attention interface of transformers or calls one that a tap
knows. What an adapter says is where attention happens and what it is called.
"""

from __future__ import annotations

from .bert import Bert
from .diffusers import Diffusers
from .einops import Einops
from .gpt2 import GPT2
from .llama import Llama
from .open_clip import OpenCLIP
from .shared import Shared
from .t5 import T5
from .timm import Timm
from .torch_geometric import TorchGeometric
from .vit import ViT
from .vit_pytorch import ViTPytorch
from .x_transformers import XTransformers

ADAPTERS = (
    Bert(),
    Diffusers(),
    Einops(),
    GPT2(),
    Llama(),
    OpenCLIP(),
    Shared(),
    T5(),
    Timm(),
    TorchGeometric(),
    ViT(),
    ViTPytorch(),
    XTransformers(),
)

__all__ = ["ADAPTERS"]
