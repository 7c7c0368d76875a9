"""ALBERT: an encoder whose layers share their weights."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site


class Albert(Adapter):
    """ALBERT.

    The layers here are those that have weights of their own; one that runs several times in a forward has as many
    calls.

    There is no option to refuse: ``num_hidden_groups`` and ``inner_group_num`` say how many layers there are, and a
    smaller ``embedding_size`` is widened before the first.
    """

    name = "albert"
    covers = ("transformers.models.albert.modeling_albert",)
    attention = MappingProxyType({"AlbertAttention": "self"})
    stack = "encoder"

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """Numbered through all groups, which may have several layers each."""
        order = [p for p, m in root.named_modules() if type(m).__name__ in self.attention and self.knows(m)]
        return replace(super().site(path, module, root), layer=order.index(path), layers=len(order))
