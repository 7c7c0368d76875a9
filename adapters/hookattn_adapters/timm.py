"""timm: every attention of its vision models, numbered through all stages."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site

_CHANNELS = frozenset("ChannelAttention ChannelAttentionV2 CrossCovarianceAttn XCA".split())
# Read by no tap, and listed as skipped: there is no softmax over q·k in them, or one over the keys' channels alone.
_LINEAR = "EfficientAdditiveAttention FactorAttnConvRelPosEnc HSMSSD LambdaLayer LinearSelfAttention LiteMLA".split()
_CROSS = "AttentionPoolLatent AttentionPoolPrr CrossAttention SimPool1d SimPool2d".split()
_SELF = """
    Attention Attention2d Attention2dDownsample AttentionCl AttentionDownsample AttentionPool2d AttentionRope
    BottleneckAttn CascadedGroupAttention ClassAttention ClassAttn ConvAttention DiffAttention DiffParallelScalingBlock
    EfficientAttention EvaAttention GPSA Gemma4Attention GlobalSubSampleAttn HaloAttn LocallyGroupedAttn MHSA
    MaskUnitAttention MultiQueryAttention2d MultiQueryAttentionV2 MultiScaleAttention MultiScaleAttentionPoolFirst
    NonLocalAttn OutlookAttention ParallelScalingBlock RelPosAttention RotAttentionPool2d SHMA SHSA
    SpatialTransformerBlock TalkingHeadAttn WindowAttention WindowAttentionGlobal WindowMultiHeadAttention
""".split()


class Timm(Adapter):
    """timm.

    T and S count patches (of one window, where there are windows: those are in the batch), or channels in
    cross-covariance attention. Pooling with learned or averaged queries is ``cross``.

    There is no option to refuse: ``fused_attn`` picks the kernel, and norms, rotary and relative positions, windows and
    masks show in its arguments.
    """

    name = "timm"
    covers = ("timm.layers", "timm.models")
    attention = MappingProxyType(
        {**dict.fromkeys((*_SELF, *_LINEAR, *_CHANNELS), "self"), **dict.fromkeys(_CROSS, "cross")}
    )
    stack = "vision"
    axes = "patches"

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """Numbered in the order of the model: a path starts with a stage, and stages have several layers."""
        kind = self.kind(path, module)
        order = [p for p, m in root.named_modules() if self.attention.get(type(m).__name__) == kind and self.knows(m)]
        axes = "channels" if type(module).__name__ in _CHANNELS else self.axes
        return replace(super().site(path, module, root), layer=order.index(path), layers=len(order), axes=axes)
