"""A Trace of a file's document; its fields stay in the file until they are read."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any, TypeVar

from torch import Tensor

from ..attention.kernel_call import DOT, FIELDS
from ..calls.call import Call, Skipped
from ..calls.certificate import Certificate
from ..calls.fields import Field, InFile
from ..calls.key_history import Continued
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..errors import CorruptFileError
from .links import LINKED
from .reader import LazyFile
from .schema import CALL, CERTIFICATE, DOCUMENT, LINK, SITE, SKIPPED, from_entry
from .stored_history import StoredHistory

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
        values |= {"notes": list(values["notes"]), "stack_tokens": dict(values.pop("stack_tokens", None) or {})}
        trace = kind(**values, path=path)
        trace.skipped = [Skipped(**from_entry(SKIPPED, "skipped", entry)) for entry in skipped]
        for i, entry in enumerate(calls):
            trace.calls.append(_call_of(file, i, entry, trace.calls))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptFileError(
            f"{path}: the document in the header is not a trace's: {type(error).__name__}: {error}. The file "
            "was damaged or written by something else; save the trace again."
        ) from error
    return trace


def _call_of(file: LazyFile, index: int, entry: dict[str, Any], before: list[Call]) -> Call:
    """One call of an open file, in which those ``before`` it are.

    Raises:
        TypeError, ValueError, CorruptFileError: its entry is no call's.
    """
    where = f"call {index}"
    values = from_entry(CALL, where, entry)
    queries, of_queries = values["queries"], values.get("of_queries")
    if of_queries is not None and queries is None:
        raise ValueError(f"{where}: 'of_queries' is {of_queries}, and 'queries' is null: expected both or neither")
    if of_queries is not None and of_queries <= max(queries, default=-1):
        raise ValueError(f"{where}: 'of_queries' is {of_queries}, and query row {max(queries)} was kept")
    names: dict[str, str | None] = values["fields"]
    links = {f: from_entry(LINK, f"{where}, continued {f}", x) for f, x in (values.pop("continued", {}) or {}).items()}
    missing = [n for n in (*names.values(), *(x["tensor"] for x in links.values())) if n is not None and n not in file]
    if missing:
        raise CorruptFileError(f"{file.path}: {where} names the tensor {missing[0]!r}, which is not in the file.")
    scale = values["scale"]
    fields: dict[str, Field] = {f: None if n is None else InFile(file, n) for f, n in names.items()}
    for field, link in links.items():
        if field not in LINKED or field in fields:
            why = "'fields' has it, too" if field in fields else f"expected {' or '.join(LINKED)}"
            raise ValueError(f"{where}, continued {field}: {why}")
        try:
            fields[field] = _continued(field, link, before)
        except ValueError as error:
            raise ValueError(f"{where}, continued {field}: {error}") from None
    before_applied = "weights" in fields and "applied" not in fields
    if before_applied and not values["mixed"] and not values["dropout"]:
        fields["applied"] = None  # a file of format 1.2 or older does not name it, and here nothing lay in between
    if links or before_applied:
        fields = {f: fields[f] for f in (*FIELDS, *fields) if f in fields}
    values |= {
        "site": Site(**from_entry(SITE, f"{where}, site", values["site"])),
        "scale": None if values.get("score") not in (None, DOT) else _scale_of(file, scale),
        "certificate": Certificate(**from_entry(CERTIFICATE, f"{where}, certificate", values["certificate"])),
        "fields": fields,
    }
    return Call(index=index, **values)


def _scale_of(file: LazyFile, scale: Any) -> float | Tensor:
    return file.tensor(scale["tensor"]) if isinstance(scale, dict) else float(scale)


def _continued(field: str, link: dict[str, Any], before: list[Call]) -> Continued:
    """The step of a history that a field is which goes on from that of a call before it.

    Raises:
        ValueError: there is no such field, or it does not go on from it; says why.
    """
    number = link.pop("continues")
    if not 0 <= number < len(before):
        raise ValueError(f"'continues' is {number}, expected the number of a call before it")
    earlier = before[number].fields.get(field)
    if isinstance(earlier, InFile):
        earlier = before[number].fields[field] = Continued(StoredHistory(earlier.file, earlier.name), 0)
    if not isinstance(earlier, Continued):
        raise ValueError(f"call {number} has no {field}")
    history = earlier.history
    assert isinstance(history, StoredHistory)
    if earlier.step != len(history) - 1:
        raise ValueError(f"another call continues that of call {number} already")
    history.add(**link)
    return Continued(history, len(history) - 1)
