"""What may be skipped: attention that is no softmax over the scores of queries and keys, and softmaxes that are none.

Everything else that a trace skips is attention that it could not read, and makes its row red.
"""

from __future__ import annotations

import re

# Recurrences, kernels, sampling, hashing: by the class that ran.
_NO_SOFTMAX = re.compile(
    r"(FrozenBatchNorm|PatchTSMixerGatedAttention|Mamba|Ssm|SSM|DeltaNet|DeltaAttention|LightningAttention|LinearAttention|Rwkv|RWKV|Retention|Hyena|Deformable"
    r"|FourierTransform|EfficientAdditiveAttention|AttentionGRUCell|YosoSelfAttention|MraSelfAttention|MobileViTV2LinearSelf"
    r"|AutoformerAttention|Recurrent|XLSTM|xLSTM|ShortConv|GatedMLP|AttentionGate|AttentionFreeTransformer)\w* ran"
)
# What is true of the modules that mix positions through a state, and of no other.
_STATE_SPACE = "a state space, or causal linear attention"
_MIXES = re.compile(r"(?i:mixer|mamba|ssm|lstm|delta|linear_attn|attention|attn)")
# A softmax over something else: (type, part of the path, why).
_ELSEWHERE = (
    ("convbert", "", "a softmax over the taps of a dynamic convolution"),
    ("deepseek_v4", "layers", "the mixing of residual streams, and a gate over the keys that are pooled into one"),
    ("glm5_next", "layers", "the mixing of residual streams, and a gate over the keys that are pooled into one"),
    ("mgp-str", "a3_module", "attention whose scores a convolution makes, without queries or keys"),
    ("groupvit", "downsample.assign", "a softmax over groups, made hard: each patch is assigned to one"),
    ("sam2", "", "a softmax over heads that the model computes and throws away"),
    ("edgetam", "", "a softmax over heads that the model computes and throws away"),
    ("deformable_detr", "normalization", "a normalisation that is named after deformable attention"),
    ("videoprism", "", "the similarity of images and texts"),
)


def unread(model_type: str, path: str, reason: str) -> bool:
    """Whether a skipped site is attention that the trace should have read."""
    if _NO_SOFTMAX.search(reason) or (_STATE_SPACE in reason and _MIXES.search(path)):
        return False
    return not any(model_type.startswith(t) and part in path for t, part, _ in _ELSEWHERE)
