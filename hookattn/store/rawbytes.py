"""A tensor's bytes, in the order safetensors wants them, a bounded block at a time."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import TraceWriteError
from ..torch_internals.tensor_identity import address_of
from .format import DTYPE_NAMES, TORCH_DTYPES

BLOCK = 16 << 20
"""How many bytes are copied at once where a copy is needed (not contiguous, or on another device)."""


def check_storable(name: str, tensor: Tensor) -> None:
    """Check that safetensors can hold this tensor under this name.

    Raises:
        TraceWriteError: the name is reserved or not text; the tensor is not a dense tensor with data, or its dtype has
            no name in safetensors.
    """
    if not isinstance(name, str) or name == "__metadata__" or not _is_text(name):
        raise TraceWriteError(f"{name!r} cannot be a tensor's name: expected text other than '__metadata__'.")
    if not isinstance(tensor, Tensor):
        raise TraceWriteError(f"{name!r}: expected a tensor, and got {type(tensor).__name__}.")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
        kind = "nested" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
        raise TraceWriteError(
            f"{name!r}: expected a dense tensor with data, and got one that is {kind}. Make it dense first."
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise TraceWriteError(
            f"{name!r}: safetensors has no form for {tensor.dtype}. Convert it to one of: {', '.join(TORCH_DTYPES)}."
        )
    if sys.byteorder != "little":
        raise TraceWriteError("safetensors is little-endian, and this machine is not: write the trace on another one.")


def byte_blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's elements in row-major order as bytes; what is contiguous on the CPU is not copied.

    Raises:
        TraceWriteError: the tensor has no memory of its own (a fake or a wrapped one).
    """
    for part in _parts(tensor.detach()):
        # The copies last as long as the view on them: until the next block.
        plain = part.to("cpu").resolve_conj().resolve_neg().contiguous()
        if plain.nbytes:
            yield memory_of(plain)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Split along the leading dimensions until a part is small, or needs no copy."""
    as_is = tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    if as_is or tensor.nbytes <= BLOCK:
        yield tensor
    elif tensor.shape[0] == 1:
        yield from _parts(tensor[0])
    else:
        rows = max(1, BLOCK * tensor.shape[0] // tensor.nbytes)
        for first in range(0, tensor.shape[0], rows):
            yield from _parts(tensor[first : first + rows])


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor that is contiguous, on the CPU and not empty; valid as long as it is.

    Raises:
        TraceWriteError: it has no memory of its own.
    """
    # Not by way of numpy, which torch can be without, and which has no bfloat16 or float8.
    try:
        address = address_of(tensor)
    except RuntimeError as error:
        raise TraceWriteError(f"a {type(tensor).__name__} has no bytes to write: {error}") from error
    if address == 0:
        raise TraceWriteError(f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no bytes to write.")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(address)).cast("B")


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
