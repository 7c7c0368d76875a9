"""diffusers: U-Nets and diffusion transformers, with whatever attention processor is set."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site

_ANY = """
    AceStep AnimaTextConditioner AnyFlow AudioDiT Bria BriaFibo2 BriaFibo Cosmos3PackedMoT CosmosCausal ErnieImage Flux2
    Flux2ParallelSelf Flux3 Flux Helios HiDream Ideogram4 JoyImage JoyImageEditPlus KVAEAudio Kandinsky5 Kandinsky6
    Kandinsky6SR Krea2 LTX2 LTX2VideoVaeNeighborhood LTX LongCatImage MiniMaxH3 MiniMaxH3AudioCausal MiniMaxH3Video
    MiniMaxMusic3 MiniMaxMusic3Depth Mochi MotifVideo MotifVideoCross MultiHeadCross OvisImage PRX Perceiver
    PerceiverCross QwenImage21 RFD4ProteinaPair SAME SanaMultiscaleLinear SanaWMLTX2 SanaWMSoftmax SkyReelsV2
    StableAudio3Cross StableAudio3Self WanAnimate2 WanAnimateFaceBlockCross Wan
""".split()
_OTHERS = """
    Attention AttentionPooling HunyuanImageAttentionBlock HunyuanImageRefinerAttnBlock HunyuanVideo15AttnBlock
    IPAdapterTimeImageProjectionBlock LTX2AudioAttnBlock MMAudioAttnBlock1D MochiAttentionPool
    QwenImage21AttentionBlock QwenImageAttentionBlock SanaWMSoftmaxCamAttention SelfAttention1d VidTokAttnBlock
    WanAttentionBlock
""".split()
_SECOND = re.compile(r"attn2$|_to_\w+_attn$")  # gets the condition, also where the class does not say so
_UNET = re.compile(r"(down|mid|up)_block")


class Diffusers(Adapter):
    """diffusers.

    ``cross`` attends to the condition, ``joint`` to the condition and the latents together: those sequences are joined
    along T and S, in the order of the model. The blocks of a U-Net are stacks of their own: ``down``, ``mid``, ``up``.

    There is no option to refuse: an attention processor is the code that runs, and is watched like any other.
    """

    name = "diffusers"
    covers = ("diffusers.models",)
    attention = MappingProxyType(dict.fromkeys([*(f"{name}Attention" for name in _ANY), *_OTHERS], "auto"))
    axes = "patches"

    def kind(self, path: str, module: nn.Module) -> str:
        """Projections of a second sequence make it joint, in place of the self-attention."""
        if getattr(module, "added_kv_proj_dim", None) is not None and not path.endswith("attn2"):
            return "joint"
        crosses = getattr(module, "is_cross_attention", _SECOND.search(path) is not None)
        return "cross" if crosses else super().kind(path, module)

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """Numbered in the order of the stack, since a block has several layers."""
        site, block = super().site(path, module, root), _UNET.match(path)
        if block is None:
            return site
        inside = [(p, m) for p, m in root.named_modules() if p.startswith(block[0])]
        alike = [p for p, m in inside if type(m).__name__ in self.attention and self.kind(p, m) == site.kind]
        return replace(site, stack=block[1], layer=alike.index(path), layers=len(alike))
