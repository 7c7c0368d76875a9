"""The file layer and files that are damaged, foreign or newer: a clear error each, and nothing else ever."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hookattn.errors import CorruptFileError, ForeignFileError, NewerFormatError, TraceFileError
from hookattn.store import LazyFile, write_file

X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    path = write_file(tmp_path / "good", {"x": X, "mask": X > 2, "none": X[:0]}, {"calls": [1]})
    return path.read_bytes()


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def described(document: Any, data: bytes = b"", **entries: Any) -> bytes:
    """A file with this document (text, or a dict to which the format is added) and these entries, whatever they are."""
    if isinstance(document, dict):
        document = json.dumps({"format": "hookattn-trace", "format_version": [1, 0]} | document)
    return framed(json.dumps({"__metadata__": {"hookattn": document}} | entries).encode(), data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def read_all(path: Path) -> LazyFile:
    with LazyFile(path) as file:
        for name in file:
            assert file.tensor(name).shape == file.shape(name)
        return file


def test_cut_anywhere_and_too_long(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "f"
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptFileError, match=r"expected .* got .*save the trace again"):
            LazyFile(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CorruptFileError, match="expected 30 bytes of data after the header, and got 31"):
        LazyFile(path)


def test_every_bit_of_the_header_flipped(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "f"
    refused = 0
    for bit in range((8 + int.from_bytes(good[:8], "little")) * 8):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read_all(path)
        except TraceFileError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        with safe_open(path, "pt") as theirs:  # we are no more lenient than the library
            list(theirs.keys())
    assert refused > 2000


HUGE = 2**63
BAD: dict[str, tuple[bytes, str]] = {
    "not json": (framed(b"{nonsense"), "not JSON"),
    "not utf-8": (framed(b'{"\xff": 1}'), "not JSON"),
    "deep": (framed(b'{"a":' + b"[" * 100_000), "not JSON"),
    "long number": (framed(b'{"a":' + b"9" * 10_000 + b"}"), "not JSON"),
    "no header": (framed(b"", b"{"), "not JSON"),
    "length too long": (framed(b"{}", length=1000), "expected a header of 1000 bytes, and got 2"),
    "length absurd": (framed(b"{}", length=2**64 - 1), "expected a header of 18446744073709551615"),
    "document not text": (framed(b'{"__metadata__":{"hookattn":1}}'), "to be a string, and got a number"),
    "document not json": (described("{"), "metadata 'hookattn' is not JSON"),
    "document not an object": (described("[]"), "to be a JSON object, and got an array"),
    "no version": (described('{"format":"hookattn-trace"}'), r"as \[1, 3\], and got None"),
    "version of three": (described({"format_version": [1, 0, 0]}), "got .1, 0, 0"),
    "version of bools": (described({"format_version": [True, False]}), "got .True, False"),
    "version nought": (described({"format_version": [0, 9]}), "and got 0.9"),
    "entry not an object": (described({}, x=[1]), "'x' to be a JSON object, and got an array"),
    "no dtype": (described({}, x={"shape": [], "data_offsets": [0, 0]}), "expected a dtype among .*, and got None"),
    "unknown dtype": (described({}, b" " * 8, x=entry("F99")), "and got 'F99'"),
    "dtype not text": (described({}, x=entry([])), r"and got \[\]"),
    "no shape": (
        described({}, x={"dtype": "U8", "data_offsets": [0, 0]}),
        "shape of non-negative integers, and got None",
    ),
    "negative shape": (described({}, x=entry(shape=[-2])), r"non-negative integers, and got \[-2\]"),
    "shape of floats": (described({}, x=entry(shape=[2.0])), r"non-negative integers, and got \[2.0\]"),
    "shape of bools": (described({}, x=entry(shape=[True])), "non-negative integers"),
    "shape too large": (described({}, x=entry(shape=[2**40] * 2)), "fewer than"),
    "shape too large, and empty": (described({}, x=entry(shape=[2**40, 0, 2**40], offsets=[0, 0])), "fewer than"),
    "size too large": (described({}, x=entry(shape=[HUGE])), "non-negative integers"),
    "one offset": (described({}, x=entry(offsets=[0])), "two offsets"),
    "offset too large": (described({}, x=entry(offsets=[HUGE, HUGE + 8])), "two offsets"),
    "offsets swapped": (described({}, b" " * 8, x=entry(offsets=[8, 0])), "expected 8 bytes for F32 .*, and got -8"),
    "shape and size differ": (
        described({}, b" " * 8, x=entry(shape=[3])),
        "expected 12 bytes for F32 of shape .3., and",
    ),
    "beyond the file": (described({}, b" " * 7, x=entry()), "expected 8 bytes of data after the header, and got 7"),
    "more than described": (described({}, b" "), "expected 0 bytes of data after the header, and got 1"),
    "hole before": (
        described({}, b" " * 9, x=entry(offsets=[1, 9])),
        "leaves a hole before it: expected it to begin at 0",
    ),
    "overlap": (
        described({}, b" " * 12, x=entry(), y=entry(offsets=[4, 12])),
        "overlaps the one before it.* begin at 8",
    ),
    "inside another": (described({}, b" " * 8, x=entry(), y=entry("U8", [0], [4, 4])), "overlaps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CorruptFileError, match=message) as caught:
        LazyFile(tmp_path / "f")
    assert str(tmp_path / "f") in str(caught.value) and "save the trace again" in str(caught.value)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "f"

    def refuse(message: str) -> None:
        with pytest.raises(ForeignFileError, match=message):
            LazyFile(path)

    torch.save({"x": X}, path)
    refuse(r"not a safetensors file: it begins with b'PK")
    path.write_text("a text about something else")
    refuse("not a safetensors file")
    path.write_bytes(bytes(100))
    refuse("not a safetensors file")
    for metadata in (None, {"format": "pt"}):
        save_file({"x": X}, path, metadata=metadata)
        refuse("a safetensors file, and not a trace")
    for metadata_json in ("[]", "3", "null"):
        path.write_bytes(framed(b'{"__metadata__":%s}' % metadata_json.encode()))
        refuse("a safetensors file, and not a trace")
    for document in ("{}", '{"format":"other"}', '{"format":[1]}'):
        path.write_bytes(described(document))
        refuse("expected the format 'hookattn-trace'")


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="No such file") as caught:
        LazyFile(tmp_path / "none")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(TraceFileError, match="directory"):
        LazyFile(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(TraceFileError):
            LazyFile(tmp_path / "pipe")


def test_newer_formats(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(described({"format_version": [2, 3]}, x="of a shape to come"))
    with pytest.raises(NewerFormatError, match=r"format 2\.3, and this .* reads 1\.3.*Upgrade hookattn"):
        LazyFile(path)
    path.write_bytes(described({"format_version": [1, 7], "later": 1}, b" " * 8, x=entry(later=2)))
    assert read_all(path).document["later"] == 1
    path.write_bytes(described({"format_version": [1, 7]}, b" " * 8, x=entry("F99")))
    with pytest.raises(NewerFormatError, match="dtype 'F99'"):
        LazyFile(path)


JSON: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([2**62, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62]), max_size=3)
ENTRIES = JSON | st.builds(
    entry,
    st.sampled_from(["F32", "U8", "BOOL", "F4", "C64"]) | JSON,
    SIZES | JSON,
    st.lists(st.integers(0, 16), max_size=3) | JSON,
)
VERSIONS = JSON | st.tuples(st.integers(0, 2), st.integers(0, 2))
DESCRIBED = st.builds(
    lambda document, version, entries, data: described(document | {"format_version": version}, data, **entries),
    st.dictionaries(st.text(max_size=3), JSON, max_size=2),
    VERSIONS,
    st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3),
    st.binary(max_size=16),
)
FRAMED = st.builds(
    framed, st.binary(max_size=40).map(lambda tail: b"{" + tail), st.binary(max_size=4), st.none() | st.integers(0, 50)
)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "f"


@settings(deadline=None, max_examples=600)
@given(data=st.binary(max_size=60) | FRAMED | DESCRIBED)
def test_fuzzed_files(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    with contextlib.suppress(TraceFileError):
        read_all(scratch)


@settings(deadline=None, max_examples=400)
@given(draw=st.data())
def test_fuzzed_headers(scratch: Path, draw: st.DataObject) -> None:
    """A good file with a piece of its header replaced by anything."""
    data = write_file(scratch, {"x": X, "mask": X > 2}, {"calls": [1]}).read_bytes()
    begin = draw.draw(st.integers(0, len(data) - 31))
    end = draw.draw(st.integers(begin, min(begin + 12, len(data) - 31)))
    piece = draw.draw(st.binary(max_size=12) | st.text('{}[]",:0123456789-eE.truefalsn ', max_size=12).map(str.encode))
    changed = data[:begin] + piece + data[end:]
    if draw.draw(st.booleans()):  # with a length that fits, so that what is inside is looked at
        changed = framed(changed[8:-30], changed[-30:])
    scratch.write_bytes(changed)
    with contextlib.suppress(TraceFileError):
        read_all(scratch)


def test_cut_in_place_while_open(tmp_path: Path) -> None:
    path = write_file(tmp_path / "f", {"x": X, "large": torch.zeros(1 << 20)}, {})
    with LazyFile(path) as file:
        os.truncate(path, 2000)
        with pytest.raises(CorruptFileError, match="cut to 2000 bytes while it was open"):
            file.tensor("large")
