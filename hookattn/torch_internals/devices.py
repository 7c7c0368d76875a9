"""What a device can do: asked here, so that one that is not known goes the plain way everywhere."""

from __future__ import annotations

from torch import Tensor


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is where the kernels of :mod:`hookattn.attention.kernels` run, and where copies to the host take
    time of their own."""
    return x.is_cuda
