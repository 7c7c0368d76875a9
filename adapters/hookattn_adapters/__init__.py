"""The built-in adapters: one architecture family a file, all of them in :data:`ADAPTERS`.

They use the public API alone, and come in through the same entry point as anyone else's. None of them reads a kernel's
arguments: a family looks its kernel up through the attention interface of transformers, or calls one that a tap knows,
or does arithmetic that is watched. What an adapter says is where attention happens and what it is called.
"""

from __future__ import annotations

from .albert import Albert
from .bart import Bart
from .beit import Beit
from .bert import Bert
from .bloom import Bloom
from .clip import CLIP
from .cohere import Cohere
from .deberta import Deberta
from .deepseek import DeepSeek
from .deit import DeiT
from .diffusers import Diffusers
from .dinov2 import Dinov2
from .distilbert import DistilBert
from .einops import Einops
from .esm import ESM
from .falcon import Falcon
from .gemma import Gemma
from .glm import GLM
from .gpt2 import GPT2
from .gpt_bigcode import GPTBigCode
from .gpt_neo import GPTNeo
from .gpt_neox import GPTNeoX
from .gpt_oss import GptOss
from .gptj import GPTJ
from .granite import Granite
from .llama import Llama
from .mistral import Mistral
from .modernbert import ModernBert
from .mpnet import MPNet
from .mpt import MPT
from .mt5 import MT5
from .olmo import Olmo
from .open_clip import OpenCLIP
from .opt import OPT
from .phi import Phi
from .qwen import Qwen
from .roberta import Roberta
from .shared import Shared
from .siglip import Siglip
from .smollm3 import SmolLM3
from .stablelm import StableLM
from .starcoder2 import Starcoder2
from .swin import Swin
from .t5 import T5
from .timm import Timm
from .torch_geometric import TorchGeometric
from .vit import ViT
from .vit_pytorch import ViTPytorch
from .wav2vec2 import Wav2Vec2
from .whisper import Whisper
from .x_transformers import XTransformers

ADAPTERS = (
    Albert(),
    Bart(),
    Beit(),
    Bert(),
    Bloom(),
    CLIP(),
    Cohere(),
    Deberta(),
    DeepSeek(),
    DeiT(),
    Diffusers(),
    Dinov2(),
    DistilBert(),
    Einops(),
    ESM(),
    Falcon(),
    Gemma(),
    GLM(),
    GPT2(),
    GPTBigCode(),
    GPTNeo(),
    GPTNeoX(),
    GptOss(),
    GPTJ(),
    Granite(),
    Llama(),
    Mistral(),
    ModernBert(),
    MPNet(),
    MPT(),
    MT5(),
    Olmo(),
    OpenCLIP(),
    OPT(),
    Phi(),
    Qwen(),
    Roberta(),
    Shared(),
    Siglip(),
    SmolLM3(),
    StableLM(),
    Starcoder2(),
    Swin(),
    T5(),
    Timm(),
    TorchGeometric(),
    ViT(),
    ViTPytorch(),
    Wav2Vec2(),
    Whisper(),
    XTransformers(),
)

__all__ = ["ADAPTERS"]
