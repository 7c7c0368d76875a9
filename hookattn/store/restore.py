"""A Trace of a file's document; its fields stay in the file until they are read."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any, TypeVar

from ..calls.call import Call, Skipped
from ..calls.certificate import Certificate
from ..calls.fields import InFile
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..errors import CorruptFileError
from .reader import LazyFile
from .schema import CALL, CERTIFICATE, DOCUMENT, SITE, SKIPPED, from_entry

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
        values = from_entry(DOCUMENT, "the document", document)
        skipped, calls = values.pop("skipped"), values.pop("calls")
        trace = kind(**{**values, "notes": list(values["notes"])}, path=path)
        trace.skipped = [Skipped(**from_entry(SKIPPED, "skipped", entry)) for entry in skipped]
        trace.calls = [_call_of(file, i, entry) for i, entry in enumerate(calls)]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptFileError(
            f"{path}: the document in the header is not a trace's: {type(error).__name__}: {error}. The file "
            "was damaged or written by something else; save the trace again."
        ) from error
    return trace


def _call_of(file: LazyFile, index: int, entry: dict[str, Any]) -> Call:
    """One call of an open file. Raises TypeError, ValueError or CorruptFileError where its entry is no call's."""
    where = f"call {index}"
    values = from_entry(CALL, where, entry)
    queries, of_queries = values["queries"], values.get("of_queries")
    if of_queries is not None and queries is None:
        raise ValueError(f"{where}: 'of_queries' is {of_queries}, and 'queries' is null: expected both or neither")
    if of_queries is not None and of_queries <= max(queries, default=-1):
        raise ValueError(f"{where}: 'of_queries' is {of_queries}, and query row {max(queries)} was kept")
    names: dict[str, str | None] = values["fields"]
    missing = [n for n in names.values() if n is not None and n not in file]
    if missing:
        raise CorruptFileError(f"{file.path}: {where} names the tensor {missing[0]!r}, which is not in the file.")
    scale = values["scale"]
    values |= {
        "site": Site(**from_entry(SITE, f"{where}, site", values["site"])),
        "scale": file.tensor(scale["tensor"]) if isinstance(scale, dict) else float(scale),
        "certificate": Certificate(**from_entry(CERTIFICATE, f"{where}, certificate", values["certificate"])),
        "fields": {f: None if n is None else InFile(file, n) for f, n in names.items()},
    }
    return Call(index=index, **values)
