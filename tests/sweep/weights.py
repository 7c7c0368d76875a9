"""Parameters that make attention far from uniform, and that leave no term at its neutral value.

A library's initialisation makes every row of attention nearly flat, biases zero and scales one: a wrong record would
match as well as a right one. So everything is drawn again, by shape and by name.
"""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor, nn

_QUERY_KEY = re.compile(
    r"(^|[._])(q|k|query|key|queries|keys|qkv|in_proj|c_attn|query_key_value|to_q|to_k|to_qkv|wq|wk|wqkv|q_proj|k_proj|qkv_proj"
    r"|q_lin|k_lin|q_[ab]_proj|kv_[ab]_proj\w*|query_proj|key_proj|kv_proj|qk_proj|linear_q|linear_k|query_layer|key_layer|q_norm|k_norm|query_norm|key_norm"
    r"|q_a_layernorm|q_layernorm|k_layernorm|to_kv|Wqkv|q_head|k_head|kv|sampling|in_proj_weight|proj_q|proj_k|q_up_proj|attention\.self\.\w+)(\.|_weight|$)"
)
_KEEP = re.compile(
    r"(A_log|dt_bias|\bD$|dt_proj|time_decay|time_first|inv_freq|rotary|logit_scale|temperature|tau|spline|running|codebook|cluster|num_batches|lambda_\w+init|weight_g|parametrizations|filter_bank|window$|enc_out_bbox_embed)"
)
_SHALLOW = re.compile(r"(layer_scale|lambda_?1|lambda_?2|ls\d|gamma|layerscale|gate)")


@torch.no_grad()
def draw(model: nn.Module, gain: float = 1.6) -> None:
    """Draw the parameters again, each from its own name: the same whatever else a model has.

    Args:
        model: the model, changed in place.
        gain: how large what queries and keys are made with is, in units that keep the variance.
    """
    for name, p in model.named_parameters():
        if not p.is_floating_point() or p.is_meta or not p.numel() or _KEEP.search(name):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(_new(name, p, noise, gain))


def _new(name: str, p: Tensor, noise: Tensor, gain: float) -> Tensor:
    asks = bool(_QUERY_KEY.search(name))
    if p.dim() < 2:
        if _SHALLOW.search(name) and p.numel() and p.abs().max() < 0.2:
            return 0.5 + 0.1 * noise
        constant = bool((p == p.reshape(-1)[0]).all())
        if not constant:
            return p + 0.1 * noise
        first = float(p.reshape(-1)[0])
        if "sink" in name:
            return noise
        scale = gain if asks and first == 1 else 1.0
        return first * scale + 0.2 * noise
    if re.search(
        r"(embed|position|relative|rel_pos|table|token|wte|wpe|query_|queries|prompt|probe|latent|bias)", name
    ) and not re.search(r"proj|patch|conv|dense|linear|fc\d", name):
        return 0.8 * noise
    fan = p[0].numel()
    return noise * ((gain if asks else 1.0) / max(fan, 1) ** 0.5)
