"""What a header and a document may say, at the edge of each rule: the last good value and the first bad one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from hookattn.errors import CorruptFileError, ForeignFileError, NewerFormatError, TraceWriteError
from hookattn.store.format import FORMAT, FORMAT_VERSION, HEADER_LIMIT, METADATA_KEY, TORCH_DTYPES
from hookattn.store.schema import (
    CALL,
    CERTIFICATE,
    DOCUMENT,
    EDIT,
    FIRST,
    LINK,
    MODEL,
    SHARD,
    SITE,
    SKIPPED,
    Scalar,
    Table,
    from_entry,
    to_entry,
)
from hookattn.store.validate import Header, header_length, validate_header

MAJOR, MINOR = FORMAT_VERSION


def header(
    *tensors: tuple[Any, Any, Any], version: Any = FORMAT_VERSION, size: int | None = None, **more: Any
) -> Header:
    """Of tensors a, b, …: dtype, shape and offsets."""
    document = {"format": FORMAT, "format_version": list(version) if isinstance(version, tuple) else version}
    made: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(document)}}
    for name, (dtype, shape, offsets) in zip("abcdef", tensors, strict=False):
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    end = max((t[2][1] for t in tensors), default=0) if size is None else size
    return validate_header("a file", json.dumps(made | more).encode(), end)


# ---------------------------------------------------------------------------------------------------- the header


def test_the_length_of_a_header() -> None:
    def length(n: int, brace: bytes = b"{", size: int = 100) -> int:
        return header_length("a file", n.to_bytes(8, "little") + brace, size)

    assert length(92) == 92 and length(2) == 2 and length(1 + 256, size=1000) == 257
    with pytest.raises(CorruptFileError, match="expected a header of 93 bytes, and got 92 bytes after its length"):
        length(93)
    assert length(0, b"", 8) == 0
    for head, size in ((b"1234567", 7), (b"", 0), (b"1234567", 20), (b"12345678", 7)):
        with pytest.raises(
            CorruptFileError, match=f"expected at least 8 bytes, the length of the header, and got {size}"
        ):
            header_length("a file", head, size)
    for n in (2, 92, HEADER_LIMIT, HEADER_LIMIT + 1):
        with pytest.raises(ForeignFileError):
            length(n, b"[")
    with pytest.raises(ForeignFileError):
        length(HEADER_LIMIT + 1, b"", 8)
    with pytest.raises(CorruptFileError):
        length(HEADER_LIMIT, b"", 8)
    with pytest.raises(CorruptFileError):
        length(HEADER_LIMIT + 1)


def test_tensors_lie_one_behind_the_other() -> None:
    """In whatever order the header names them; those without numbers take no room."""
    found = header(("F32", [2, 3], [8, 32]), ("U8", [8], [0, 8]), ("F64", [3, 0], [8, 8]), ("I64", [], [32, 40]))
    assert {name: (e.dtype, e.shape, e.begin, e.end) for name, e in found.entries.items()} == {
        "a": (torch.float32, (2, 3), 8, 32),
        "b": (torch.uint8, (8,), 0, 8),
        "c": (torch.float64, (3, 0), 8, 8),
        "d": (torch.int64, (), 32, 40),
    }
    assert list(found.entries) == ["b", "c", "a", "d"]
    assert found.document["format_version"] == [MAJOR, MINOR]


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ([("U8", [8], [1, 9])], 9),  # a hole at the start
        ([("U8", [8], [0, 8]), ("U8", [2], [9, 11])], 11),  # a hole of one byte
        ([("U8", [8], [0, 8]), ("U8", [2], [7, 9])], 9),  # one byte of both
        ([("U8", [8], [0, 8])], 9),
        ([("U8", [8], [0, 8])], 7),
        ([("U8", [8], [0, 9])], 9),
        ([("U8", [8], [0, 7])], 7),
        ([("F32", [2], [8, 0])], 8),
        ([], 1),
    ],
)
def test_bytes_that_are_of_no_tensor_or_of_two(tensors: list[Any], size: int) -> None:
    with pytest.raises(CorruptFileError):
        header(*tensors, size=size)


def test_shapes_and_offsets_are_counts() -> None:
    assert header(("U8", [0, 2**63 - 1], [0, 0])).entries["a"].shape == (0, 2**63 - 1)
    for shape in ([-1], [True], [1.0], ["1"], [None], "1", 1, None, {"0": 1}, [2**63]):
        with pytest.raises(CorruptFileError):
            header(("U8", shape, [0, 1]))
    for shape in ([0, 2**62, 2], [2**61 * 2, 2], [0, 2**32, 2**31]):
        with pytest.raises(CorruptFileError, match=r"fewer than 2\*\*63 bytes"):
            header(("U8", shape, [0, 0]))
    with pytest.raises(CorruptFileError, match=r"fewer than 2\*\*63 bytes"):
        header(("F64", [0, 2**60], [0, 0]))
    assert header(("F64", [0, 2**60 - 1], [0, 0])).entries["a"].shape == (0, 2**60 - 1)
    for offsets in ([0], [0, 1, 2], [0, True], [-1, 0], [0, 1.0], "01", None, [None, 1], [0, 2**63]):
        with pytest.raises(CorruptFileError):
            header(("U8", [1], offsets), size=1)


def test_dtypes() -> None:
    for name, dtype in TORCH_DTYPES.items():
        assert header((name, [3], [0, 3 * dtype.itemsize])).entries["a"].dtype == dtype
    for name in ("F4", "f32", "", None, 3, ["F32"], True):
        with pytest.raises(CorruptFileError):
            header((name, [1], [0, 1]))
    with pytest.raises(NewerFormatError):
        header(("F4", [1], [0, 1]), version=(MAJOR, MINOR + 1))
    for name in (None, 3, ["F32"]):
        with pytest.raises(CorruptFileError):
            header((name, [1], [0, 1]), version=(MAJOR, MINOR + 1))


@pytest.mark.parametrize("entry", [None, 3, "U8", ["U8"], {}, {"dtype": "U8"}, {"dtype": "U8", "shape": [1]}])
def test_what_is_no_entry(entry: Any) -> None:
    with pytest.raises(CorruptFileError):
        header(size=1, a=entry)


# ---------------------------------------------------------------------------------------------------- the version


def test_versions_from_the_first_of_this_major_one_on_are_read() -> None:
    for minor in (0, MINOR, MINOR + 1, 99):
        assert header(version=(MAJOR, minor)).document["format_version"] == [MAJOR, minor]
    for version in ((MAJOR + 1, 0), (MAJOR + 1, 99)):
        with pytest.raises(NewerFormatError, match=rf"written in format {MAJOR + 1}\.\d+.*reads {MAJOR}\.{MINOR}:"):
            header(version=version)
    for version in ((MAJOR - 1, 9), [MAJOR], [MAJOR, 0, 0], [MAJOR, True], [MAJOR, -1], [MAJOR, 0.0], "1.3", None, []):
        with pytest.raises(CorruptFileError):
            header(version=version)


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        (None, ForeignFileError),
        ([], ForeignFileError),
        ({}, ForeignFileError),
        ({METADATA_KEY: None}, ForeignFileError),
        ({METADATA_KEY: 3}, CorruptFileError),
        ({METADATA_KEY: {}}, CorruptFileError),
        ({METADATA_KEY: "{"}, CorruptFileError),
        ({METADATA_KEY: "[]"}, CorruptFileError),
        ({METADATA_KEY: "{}"}, ForeignFileError),
        ({METADATA_KEY: json.dumps({"format": "another"})}, ForeignFileError),
        ({METADATA_KEY: json.dumps({"format": FORMAT})}, CorruptFileError),
    ],
)
def test_what_is_no_document(metadata: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        header(__metadata__=metadata)


def test_what_is_no_json() -> None:
    for raw in (b"", b"{", b"nul", b"\xff{}", b"[" * 100_000):
        with pytest.raises(CorruptFileError):
            validate_header("a file", raw, 0)
    for raw in (b"[]", b"3", b"null", b'"{}"'):
        with pytest.raises(CorruptFileError, match="expected the header to be a JSON object, and got"):
            validate_header("a file", raw, 0)


def test_the_data_starts_behind_the_padding() -> None:
    raw = json.dumps(
        {"__metadata__": {METADATA_KEY: json.dumps({"format": FORMAT, "format_version": [MAJOR, 0]})}}
    ).encode()
    assert validate_header("a file", raw, 0).start == 8 + len(raw)
    assert validate_header("a file", raw + b" \t\r\n" * 3, 0).start == 8 + len(raw) + 12


# ---------------------------------------------------------------------------------------------------- the document

KINDS: dict[str, tuple[list[Any], list[Any]]] = {
    # kind: what is of it, what is not
    "bool": ([True, False], [0, 1, None, "true"]),
    "count": ([0, 3, 2**63 - 1], [-1, True, 1.0, "1", None, 2**63]),
    "str": (["", "a"], [b"a", 1, None, ["a"]]),
    "object": ([{}, {"a": 1}], [[], None, "{}"]),
    "data": ([{}, {"a": [1, {"b": None}]}], [[], None, "{}"]),
    "error": ([0, 1.5, "nan", "inf"], [True, -1, -0.5, "-inf", "1.5", "NaN", "infinity", None, [1]]),
    "factor": ([1, -2.5, 1e-30], [0, 0.0, math.inf, math.nan, 1e39, "inf", True, None]),
    "probability": ([0, 1, 0.25], [-0.1, 1.1, math.nan, "0.5", True, None]),
    "scale": ([1.0, 3, 0, -2.5, {"tensor": "a"}], [{"tensor": 1}, {}, None, "a", "nan", math.inf, 1e39, True, [1.0]]),
    "counts": ([[], [1, 2], [2**63 - 1]], [[True], [1.0], ["1"], [-1], [2**63], 1, None, {"1": 1}]),
    "strs": ([[], ["a"]], [[1], [None], "a", {"a": 1}, None]),
    "pairs": (
        [[], [[1, 2]], [[0, 0], [3, 2**63 - 1]]],
        [[1], [[1]], [[1, 2, 3]], [[1, True]], [[-1, 1]], [["1", 1]], {}, None],
    ),
    "numbers": ([[1], [2, 0]], [[], [1, 1], [-1], [True], [1.0], ["1"], 1, None]),
    "word": (["zero"], ["", "a\x1b", 1, None]),
    "edited": (["q", "weights"], ["sinks", "", 1, None]),
    "axis": (["H", "T", "B"], ["S", "", "HT", 1, None]),
    "objects": ([[], [{}]], [[[]], [None], {}, None]),
    "texts": ([[], [[]], [["a"], []]], [["a"], [[1]], [None], None, "a"]),
    "dtype": (["float32", "bfloat16", "float8_e4m3fn"], ["float", "int64", "bool", "Tensor", "", "torch.float32", 3]),
    "stacks": ([{}, {"a": []}, {"a": [["b"]]}], [{"a": ["b"]}, {"a": [[1]]}, {"a": None}, [], None]),
    "segments": ([[], [[]], [[0, 1, -1], [0, 0, 0]]], [[0], [[-2]], [[0.5]], [["a"]], [[True]], {}, "0", None]),
    "names": ([{}, {"q": "a", "k": None}], [{"q": 1}, {"q": ["a"]}, [], None]),
    "words": ([{}, {"B": "kernel"}], [{"B": None}, {"B": 1}, [], None]),
    "basis": ([{}, {"B": "kernel", "G": "guessed"}], [{"X": "kernel"}, {"B": "seen"}, {"B": None}, [], None]),
    "status": (["faithful", "unverified"], ["good", "", None, True, ["faithful"]]),
    "derivable": ([[], ["scores", "weights"]], [["q"], ["weights", "mask"], [1], "weights", None]),
    "links": ([{}, {"k": {}}], [{"k": None}, {"k": []}, [], None]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_of_a_kind_and_what_is_not(kind: str) -> None:
    good, bad = KINDS[kind]
    for value in good:
        assert "x" in from_entry(Table(Scalar("x", kind)), "here", {"x": value})
    for value in bad:
        with pytest.raises(TypeError, match=r"here: 'x' is "):
            from_entry(Table(Scalar("x", kind)), "here", {"x": value})
    assert from_entry(Table(Scalar("x", f"{kind}?")), "here", {"x": None}) == {"x": None}


def test_every_kind_of_the_tables_is_tried() -> None:
    tables = (DOCUMENT, MODEL, SKIPPED, CALL, EDIT, SHARD, LINK, SITE, CERTIFICATE)
    assert {scalar.kind.removesuffix("?") for table in tables for scalar in table} <= KINDS.keys()


def test_values_are_read_as_what_they_are_in_memory() -> None:
    def read(kind: str, value: Any) -> Any:
        return from_entry(Table(Scalar("x", kind)), "here", {"x": value})["x"]

    assert math.isnan(read("error", "nan")) and read("error", "inf") == math.inf
    assert read("error", 3) == 3 and read("error", 2.5) == 2.5 and read("probability", 1) == 1
    assert read("counts", [1, 2]) == (1, 2) and read("strs", ["a"]) == ("a",)
    assert read("dtype", "bfloat16") is torch.bfloat16


def test_values_are_written_as_json_has_them() -> None:
    class Has:
        n, i, s, d, gone = math.inf, (1, 2), ("a",), torch.bfloat16, None
        early, late = 7, 7

    table = Table(
        Scalar("n", "error"), Scalar("i", "counts"), Scalar("s", "strs"), Scalar("d", "dtype"), Scalar("gone", "count?")
    )
    made = to_entry(table, Has())
    assert made == {"n": "inf", "i": [1, 2], "s": ["a"], "d": "bfloat16", "gone": None}
    assert json.loads(json.dumps(made)) == made
    later = (FIRST[0], FIRST[1] + 1)
    # What came later is left out where it is the default, and what was always there never is.
    both = Table(Scalar("early", "count", FIRST, 7), Scalar("late", "count", later, 7))
    assert to_entry(both, Has()) == {"early": 7}
    assert to_entry(Table(Scalar("late", "count", later, 8)), Has()) == {"late": 7}
    assert to_entry(Table(Scalar("late", "count", later, 8)), Has(), late=8) == {}
    assert to_entry(Table(Scalar("early", "str")), Has(), early="another form") == {"early": "another form"}
    with pytest.raises(TraceWriteError, match="'early' is 7, expected a string"):
        to_entry(Table(Scalar("early", "str")), Has())


def test_what_may_be_missing() -> None:
    later = (FIRST[0], FIRST[1] + 1)
    assert from_entry(Table(Scalar("x", "count", later)), "here", {"y": 3}) == {}
    assert from_entry(Table(Scalar("x", "count"), optional=True), "here", {"y": 3}) == {}
    with pytest.raises(TypeError, match="here has no 'x'"):
        from_entry(Table(Scalar("x", "count?")), "here", {"y": 3})
    with pytest.raises(TypeError, match="'x' is None, expected an integer from 0"):
        from_entry(Table(Scalar("x", "count", later)), "here", {"x": None})
