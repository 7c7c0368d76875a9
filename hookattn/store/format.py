"""What a trace file looks like: its names, its dtypes, and the bytes of its header.

A safetensors file is ``u64 n`` (little-endian), ``n`` bytes of JSON, then the tensors' bytes without holes. The JSON
maps every tensor's name to its dtype, shape and offsets, and ``__metadata__`` to a map of strings: one of them is ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..errors import TraceWriteError

METADATA_KEY = "hookattn"
FORMAT = "hookattn-trace"
FORMAT_VERSION: tuple[int, int] = (1, 3)

LENGTH_BYTES = 8
"""The size of the header's length, which precedes the header."""
DATA_ALIGNMENT = 8
"""The header is padded with spaces until the data starts at a multiple of this, the largest item size."""
HEADER_LIMIT = 100_000_000
"""The safetensors library refuses to read a longer header."""

# Looked up by name, as an older torch lacks some. Sub-byte types are left out: their shape in torch is another one.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _TORCH_NAMES.items() if hasattr(torch, attribute)
}
FLOATING: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values() if dtype.is_floating_point
}
"""By torch's own names, the floating ones: what a kernel can have run in."""
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Entry(NamedTuple):
    """One tensor in the header; ``begin`` and ``end`` count from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_document(document: Mapping[str, Any]) -> str:
    """The JSON text of a document, ``format`` and ``format_version`` first, whatever the document says about these two.

    Raises:
        TraceWriteError: the document holds something that JSON has no form for.
    """
    own: dict[str, Any] = {"format": FORMAT, "format_version": list(FORMAT_VERSION)}
    full = own | {key: value for key, value in document.items() if key not in own}
    try:
        # Tokens are full of non-ASCII characters, and each would be escaped twice: 7 bytes for one.
        text = json.dumps(full, ensure_ascii=False, separators=(",", ":"))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
            text = json.dumps(full, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceWriteError(
            f"the document cannot be written as JSON: {error}. Convert what it holds to dict, list, str, int, float, "
            "bool or None."
        ) from error
    return text


def encode_header(entries: Mapping[str, Entry], document: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """The header's JSON, not padded; ``entries`` are in the order of their offsets, ``metadata`` stands beside the
    document.

    Raises:
        TraceWriteError: the header is longer than the safetensors library reads.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", METADATA_KEY: document, **(metadata or {})}}
    for name, entry in entries.items():
        offsets = [entry.begin, entry.end]
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    if len(raw) + DATA_ALIGNMENT > HEADER_LIMIT:
        raise TraceWriteError(
            f"the header takes {len(raw)} bytes ({len(entries)} tensors, a document of {len(document)} characters), "
            f"and safetensors allows {HEADER_LIMIT}. Keep fewer calls in one file: fewer steps or layers."
        )
    return raw


def data_start(header: bytes) -> int:
    """Where the data starts after a header of this length at the least: aligned, the gap to be filled with spaces."""
    return -(-(LENGTH_BYTES + len(header)) // DATA_ALIGNMENT) * DATA_ALIGNMENT


def frame_header(header: bytes, start: int) -> bytes:
    """The header with its length before it, and padded with spaces so that the data starts at ``start``."""
    length = start - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + header.ljust(length)
