"""A Trace of a file's document; its fields stay in the file until they are read."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any, TypeVar

import torch

from ..calls.call import Call, Skipped
from ..calls.certificate import Certificate
from ..calls.fields import InFile
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..errors import CorruptFileError
from .reader import LazyFile
from .schema import expect

Made = TypeVar("Made", bound=TraceData)


def load(path: str | PathLike[str], kind: type[Made]) -> Made:
    """See :func:`hookattn.load`; ``kind`` is the class that is made."""
    return trace_of(LazyFile(path), fspath(path), kind)


def trace_of(file: LazyFile, path: str, kind: type[Made]) -> Made:
    """The trace of an open file, which is called ``path``, as an object of the class ``kind``.

    Raises:
        CorruptFileError: its document is no trace's.
    """
    document = file.document
    try:
        expect(
            "the document",
            document,
            tokens="texts?",
            model="object",
            notes="strs",
            selection="object",
            skipped="objects",
            calls="objects",
        )
        trace = kind(
            tokens=document["tokens"],
            model=document["model"],
            notes=document["notes"],
            selection=document["selection"],
            path=path,
        )
        for entry in document["skipped"]:
            expect("skipped", entry, path="str", reason="str", steps="ints")
            trace.skipped.append(Skipped(entry["path"], entry["reason"], tuple(entry["steps"])))
        trace.calls = [_read_call(file, i, entry) for i, entry in enumerate(document["calls"])]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptFileError(
            f"{path}: the document in the header is not a trace's: {type(error).__name__}: {error}. The file "
            "was damaged or written by something else; save the trace again."
        ) from error
    return trace


def _read_call(file: LazyFile, index: int, entry: dict[str, Any]) -> Call:
    where = f"call {index}"
    expect(
        where,
        entry,
        site="object",
        step="int",
        tap="str",
        dtype="dtype",
        scale="scale",
        softcap="number?",
        causal="bool",
        own_scores="bool",
        mixed="bool",
        window="int?",
        dropout="number",
        heads="ints?",
        kv_heads="ints?",
        queries="ints?",
        notes="strs",
        fields="names",
        derivable="strs",
        certificate="object",
    )
    expect(
        f"{where}, site",
        entry["site"],
        path="str",
        layer="int?",
        stack="str",
        kind="str",
        module="str",
        axes="str",
        layers="int?",
    )
    expect(
        f"{where}, certificate",
        entry["certificate"],
        status="str",
        basis="str",
        rows="int",
        of_rows="int",
        output_error="number",
        weights_error="number?",
        row_sum_error="number",
        tolerance="number",
        weights_tolerance="number",
    )
    known = {k: v for k, v in entry["site"].items() if k in Site.__dataclass_fields__}
    expect(where, entry, **{key: "int?" for key in ("keys", "of_queries") if key in entry})
    queries, of_queries = entry["queries"], entry.get("of_queries")
    if of_queries is not None and queries is None:
        raise ValueError(f"{where}: 'of_queries' is {of_queries}, and 'queries' is null: expected both or neither")
    if of_queries is not None and of_queries <= max(queries, default=-1):
        raise ValueError(f"{where}: 'of_queries' is {of_queries}, and query row {max(queries)} was kept")
    scale = entry["scale"]
    names: dict[str, str | None] = entry["fields"]
    missing = [n for n in names.values() if n is not None and n not in file]
    if missing:
        raise CorruptFileError(f"{file.path}: {where} names the tensor {missing[0]!r}, which is not in the file.")
    dtype = getattr(torch, entry["dtype"])
    certificate: dict[str, Any] = {
        k: float(v) if isinstance(v, str) and k not in ("status", "basis") else v
        for k, v in entry["certificate"].items()
        if k in Certificate.__dataclass_fields__
    }

    return Call(
        site=Site(**known),
        step=entry["step"],
        index=index,
        tap=entry["tap"],
        dtype=dtype,
        scale=file.tensor(scale["tensor"]) if isinstance(scale, dict) else float(scale),
        softcap=entry["softcap"],
        causal=entry["causal"],
        window=entry["window"],
        dropout=entry["dropout"],
        heads=_tuple(entry["heads"]),
        kv_heads=_tuple(entry["kv_heads"]),
        queries=_tuple(queries),
        of_queries=of_queries,  # since 1.2
        keys=entry.get("keys"),  # since 1.1
        own_scores=entry["own_scores"],
        mixed=entry["mixed"],
        notes=tuple(entry["notes"]),
        certificate=Certificate(**certificate),
        derivable=tuple(entry["derivable"]),
        fields={f: None if n is None else InFile(file, n) for f, n in names.items()},
    )


def _tuple(x: list[int] | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x)
