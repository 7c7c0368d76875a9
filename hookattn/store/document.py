"""A Trace as named tensors and one JSON document. docs/trace-format.md describes the result."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

from torch import Tensor

from ..attention.kernel_call import DERIVED, FIELDS
from ..calls.call import Call
from ..calls.trace_data import TraceData
from ..version import __version__
from .json_values import json_number, json_value
from .names import Names
from .schema import CALL, CERTIFICATE, SITE, SKIPPED, to_entry
from .writer import write_file


def save(trace: TraceData, path: str | PathLike[str], *, compact: bool = False) -> str:
    """See :meth:`hookattn.Trace.save`."""
    names, tensors, calls = Names(), {}, []
    for call in trace.calls:
        left_out = {f for f in DERIVED if compact and f in call.derivable}
        entries: dict[str, str | None] = {}
        for field in (*FIELDS, *(f for f in call.fields if f not in FIELDS)):
            if field in call.fields and field not in left_out:
                value = call.get(field)
                entries[field] = None
                if value is not None:
                    name, new = names.name(call, field, value)
                    entries[field] = name
                    if new:
                        tensors[name] = value
        calls.append(call_entry(call, entries, tensors, compact))
    return fspath(write_file(path, tensors, document_of(trace, calls, compact)))


def call_entry(call: Call, entries: dict[str, str | None], tensors: dict[str, Tensor], compact: bool) -> dict[str, Any]:
    """A call in the document; a scale that is a tensor and has no name yet is named, and put to ``tensors``."""
    fields = {f: n for f, n in entries.items() if f != "scale"}
    scale: Any = call.scale
    if isinstance(scale, Tensor):
        name = entries.get("scale")
        if name is None:
            name = f"calls/{call.index:04d}/{call.site.path or 'model'}/scale"
            tensors[name] = scale
        scale = {"tensor": name}
    site, certificate = to_entry(SITE, call.site), to_entry(CERTIFICATE, call.certificate)
    return to_entry(CALL, call, site=site, scale=json_number(scale), fields=fields, certificate=certificate)


def document_of(trace: TraceData, calls: list[dict[str, Any]], compact: bool) -> dict[str, Any]:
    """The document of a trace with these entries of its calls."""
    versions = {**trace.model.get("versions", {}), "hookattn": __version__}
    return {
        "model": json_value({**trace.model, "versions": versions}),
        "selection": json_value(trace.selection),
        "tokens": trace.tokens,
        "notes": trace.notes,
        "compact": compact,
        "skipped": [to_entry(SKIPPED, s) for s in trace.skipped],
        "calls": calls,
    }
