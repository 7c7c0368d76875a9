"""Layers of einops, which many libraries are built of, and which only regroup axes."""

from __future__ import annotations

from hookattn import Adapter


class Einops(Adapter):
    """``Rearrange``, ``Reduce`` and ``EinMix``, and the helpers around them: no attention.

    Two adapters may not claim one Python module; so what several families share has an adapter of its own.
    """

    name = "einops"
    covers = ("einops.layers", "torch_einops_utils")
