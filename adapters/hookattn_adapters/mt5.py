"""mT5 and umT5: T5 with another feed-forward, or a position bias in every layer."""

from __future__ import annotations

from types import MappingProxyType

from .t5 import T5


class MT5(T5):
    """mT5 and umT5.

    There is no option to refuse: as in T5 nothing is scaled, and the relative position bias, which in umT5 each layer
    has for itself, arrives at the kernel as a bias.
    """

    name = "mt5"
    covers = ("transformers.models.mt5.modeling_mt5", "transformers.models.umt5.modeling_umt5")
    attention = MappingProxyType({"MT5Attention": "auto", "UMT5Attention": "auto"})
