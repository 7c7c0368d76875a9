"""Is this header one of ours, and does it describe the file it stands in? Every byte is taken to be hostile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from ..errors import CorruptFileError, ForeignFileError, NewerFormatError
from .checksums import CHECKSUMS_KEY, Checksums, decode, of_text
from .format import FORMAT, FORMAT_VERSION, HEADER_LIMIT, LENGTH_BYTES, METADATA_KEY, TORCH_DTYPES, Entry

_ADVICE = "The file is damaged or was cut short: save the trace again, or fetch it again from where it came from."
_LARGEST = 2**63 - 1  # what torch can count


class Header(NamedTuple):
    """A header that was found to be sound.

    Attributes:
        document: the document.
        entries: of the tensors, in the order of their data.
        start: where the data starts in the file.
        checksums: of each tensor by its name; None: the file has none.
    """

    document: dict[str, Any]
    entries: dict[str, Entry]
    start: int
    checksums: dict[str, int] | None


def corrupt(path: str, what: str) -> NoReturn:
    """Raise :class:`CorruptFileError` for this file: what is wrong with it, and what to do."""
    raise CorruptFileError(f"{path}: {what}. {_ADVICE}")


def header_length(path: str, head: bytes, file_size: int) -> int:
    """The header's length, from the first bytes of the file (nine of them, or all there are).

    Raises:
        CorruptFileError: the file ends before its header does.
        ForeignFileError: this is not how a safetensors file begins.
    """
    if file_size < LENGTH_BYTES or len(head) < LENGTH_BYTES:
        corrupt(path, f"expected at least {LENGTH_BYTES} bytes, the length of the header, and got {file_size}")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    # With the brace in its place, a length that cannot be is more likely one of ours, damaged.
    if head[LENGTH_BYTES:] != b"{" and (length > HEADER_LIMIT or file_size > LENGTH_BYTES):
        raise ForeignFileError(
            f"{path}: not a safetensors file: it begins with {head!r}, expected the length of a JSON header (at most "
            f"{HEADER_LIMIT}) and its opening brace. Pass a file that hookattn wrote."
        )
    if length > file_size - LENGTH_BYTES:
        corrupt(path, f"expected a header of {length} bytes, and got {file_size - LENGTH_BYTES} bytes after its length")
    return length


def validate_header(path: str, raw: bytes, data_size: int) -> Header:
    """Check a header (without its length) against ``data_size``, the number of bytes that follow it.

    Raises:
        CorruptFileError: it is not JSON, not of the right form, or does not describe ``data_size`` bytes.
        ForeignFileError: it is a safetensors header, and not a trace's.
        NewerFormatError: the trace is in a newer format.
    """
    stripped = raw.rstrip(b" \t\r\n")  # the padding is long, and json slow over it
    header = _parse(path, stripped, "the header")
    metadata = header.pop("__metadata__", None)
    text = _text_of_document(path, metadata)
    has_checksums = CHECKSUMS_KEY in metadata
    checksums = _checksums(path, metadata[CHECKSUMS_KEY], text, len(header)) if has_checksums else None
    # A text that has its checksum is as it was written; else the same key may stand in it twice.
    document = _document(path, text, strict=checksums is None)
    newer = _check_version(path, document.get("format_version"))
    entries = {name: _entry(path, name, value, newer) for name, value in header.items()}
    if any(stripped.count(b'"%s"' % key) != len(entries) for key in (b"dtype", b"shape", b"data_offsets")):
        _parse(path, stripped, "the header", strict=True)  # quicker than to look at every object of every file
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    end = 0
    for name, entry in ordered:
        if entry.begin != end:
            fault = "overlaps the one before it" if entry.begin < end else "leaves a hole before it"
            corrupt(path, f"tensor {name!r} {fault}: expected it to begin at {end}, and it begins at {entry.begin}")
        end = entry.end
    if end != data_size:
        corrupt(path, f"expected {end} bytes of data after the header, and got {data_size}")
    of_tensors = None if checksums is None else dict(zip((n for n, _ in ordered), checksums.tensors, strict=True))
    return Header(document, dict(ordered), LENGTH_BYTES + len(raw), of_tensors)


def _checksums(path: str, said: object, document: str, count: int) -> Checksums | None:
    """The checksums of a file, once its document has its own; None: of an algorithm that nobody here knows."""
    try:
        found = decode(said, count)
    except ValueError as error:
        corrupt(path, f"cannot read the checksums in the metadata {CHECKSUMS_KEY!r}: {error}")
    if found is not None and found.document != (own := of_text(document)):
        corrupt(path, f"expected the document to have the checksum {found.document}, and it has {own}")
    return found


def _parse(path: str, raw: bytes | str, what: str, strict: bool = False) -> dict[str, Any]:
    """An object of JSON; ``strict``: no key of it or of what is in it may stand there twice."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object if strict else None)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
        raise CorruptFileError(f"{path}: {what} is not JSON: {error}. {_ADVICE}") from error
    if not isinstance(value, dict):
        corrupt(path, f"expected {what} to be a JSON object, and got {_kind(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {_show(twice)} stands in one object twice")
    return made


def _text_of_document(path: str, metadata: object) -> str:
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if text is None:
        raise ForeignFileError(
            f"{path}: a safetensors file, and not a trace: its metadata has no {METADATA_KEY!r}. Pass a file that "
            "hookattn wrote, or read this one with safetensors."
        )
    if not isinstance(text, str):
        corrupt(path, f"expected the metadata {METADATA_KEY!r} to be a string, and got {_kind(text)}")
    return text


def _document(path: str, text: str, strict: bool) -> dict[str, Any]:
    document = _parse(path, text, f"the metadata {METADATA_KEY!r}", strict)
    if document.get("format") != FORMAT:
        raise ForeignFileError(
            f"{path}: not a trace: expected the format {FORMAT!r}, and got {_show(document.get('format'))}."
        )
    return document


def _check_version(path: str, version: object) -> bool:
    """Whether the file is of a newer minor version, which may hold more than this reader knows."""
    if not isinstance(version, list) or len(version) != 2 or not all(_is_count(part) for part in version):
        corrupt(path, f"expected a format version of two numbers, as {list(FORMAT_VERSION)}, and got {_show(version)}")
    major, minor = version
    if major > FORMAT_VERSION[0]:
        raise NewerFormatError(_newer(path, major, minor, "a newer major version changes what older keys mean"))
    if major < FORMAT_VERSION[0]:
        corrupt(path, f"expected a format version of {FORMAT_VERSION[0]} or later, and got {major}.{minor}")
    return newer_minor(version)


def newer_minor(version: Sequence[int]) -> bool:
    """Whether a version of this major one has a newer minor one, which may hold more than this reader knows."""
    return version[1] > FORMAT_VERSION[1]


def _newer(path: str, major: object, minor: object, why: str) -> str:
    ours = ".".join(map(str, FORMAT_VERSION))
    return (
        f"{path}: written in format {major}.{minor}, and this version of hookattn reads {ours}: {why}. "
        "Upgrade hookattn (pip install -U hookattn)."
    )


def _entry(path: str, name: str, value: object, newer: bool) -> Entry:
    if not isinstance(value, dict):
        corrupt(path, f"expected tensor {name!r} to be a JSON object, and got {_kind(value)}")
    code, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    dtype = TORCH_DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        if newer and isinstance(code, str):
            raise NewerFormatError(
                _newer(path, FORMAT_VERSION[0], "later", f"tensor {name!r} has the dtype {_show(code)}")
            )
        corrupt(path, f"tensor {name!r}: expected a dtype among {', '.join(TORCH_DTYPES)}, and got {_show(code)}")
    if type(shape) is not list:
        corrupt(path, f"tensor {name!r}: expected a shape of non-negative integers, and got {_show(shape)}")
    span = numel = dtype.itemsize
    for size in shape:  # not by all(): half of the time that a load takes is spent on these lines
        if type(size) is not int or not 0 <= size <= _LARGEST:
            corrupt(path, f"tensor {name!r}: expected a shape of non-negative integers, and got {_show(shape)}")
        # Zeros are left out of the span: torch's strides overflow even where a tensor is empty.
        span, numel = span * (size or 1), numel * size
        if span > _LARGEST:
            corrupt(path, f"tensor {name!r}: expected fewer than 2**63 bytes, and got the shape {_show(shape)}")
    if type(offsets) is not list or len(offsets) != 2 or not (_is_count(offsets[0]) and _is_count(offsets[1])):
        corrupt(path, f"tensor {name!r}: expected two offsets, and got {_show(offsets)}")
    begin, end = offsets
    if end - begin != numel:
        size = f"{numel} bytes for {code} of shape {_show(shape)}"
        corrupt(path, f"tensor {name!r}: expected {size}, and got {end - begin}")
    return Entry(dtype, tuple(shape), begin, end)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST  # type(): True is an int too


def _kind(value: object) -> str:
    return {list: "an array", dict: "an object", str: "a string", type(None): "null"}.get(type(value), "a number")


def _show(value: object) -> str:
    try:
        return repr(value)[:80]
    except (RecursionError, ValueError):
        # An array in an array in an array: what the parser just bore, repr need not; nor an integer of many digits.
        return _kind(value)
