"""A Trace as named tensors and one JSON document, and back. docs/trace-format.md describes the result."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from ..certificate import Certificate
from ..errors import CorruptFileError
from ..record import FIELDS
from ..site import Site
from ..trace import Call, Skipped, Trace
from .reader import LazyFile
from .writer import StreamWriter, write_file

# Fields that many calls have in common: stored once for each distinct content.
_SHARED = ("mask", "bias", "sinks")


class Names:
    """Gives every tensor of a trace its name, and the same name to the same content."""

    def __init__(self) -> None:
        self._by_content: dict[tuple[Any, ...], str] = {}
        self._by_identity: dict[tuple[Any, ...], tuple[Tensor, str]] = {}

    def name(self, call: Call, field: str, x: Tensor) -> tuple[str, bool]:
        """The name of a field, and whether it still has to be written."""
        if field not in _SHARED:
            return f"calls/{call.index:04d}/{call.site.path or 'model'}/{field}", True
        identity = (id(x), -1 if x.is_inference() else x._version)
        if identity in self._by_identity:
            return self._by_identity[identity][1], False
        plain = x.detach().cpu().contiguous()
        content = (field, x.dtype, tuple(x.shape),
                   hashlib.blake2b(plain.flatten().view(torch.uint8).numpy(), digest_size=16).digest())
        known = self._by_content.get(content)
        name = known or f"shared/{field}/{sum(k[0] == field for k in self._by_content):03d}"
        self._by_content[content] = name
        self._by_identity[identity] = (x, name)
        return name, known is None


def save(trace: Trace, path: str | PathLike[str], *, compact: bool = False) -> str:
    """See :meth:`hookattn.Trace.save`."""
    names, tensors, calls = Names(), {}, []
    for call in trace.calls:
        left_out = {f for f in ("scores", "weights") if compact and f in call.derivable}
        entries: dict[str, str | None] = {}
        for field in FIELDS:
            if field in call.fields and field not in left_out:
                value = call.get(field)
                entries[field] = None
                if value is not None:
                    name, new = names.name(call, field, value)
                    entries[field] = name
                    if new:
                        tensors[name] = value
        calls.append(_call_entry(call, entries, tensors, compact))
    return fspath(write_file(path, tensors, _document(trace, calls, compact)))


class Stream:
    """Writes the calls of a running trace as they come; the fields leave memory."""

    def __init__(self, path: str | PathLike[str], trace: Trace):
        self.path, self.trace = fspath(path), trace
        self.writer = StreamWriter(path)
        self.names = Names()
        self.written: dict[int, dict[str, str | None]] = {}

    def add(self, call: Call) -> None:
        """Write one call's fields and drop them."""
        entries: dict[str, str | None] = {}
        for field, value in list(call.fields.items()):
            entries[field] = None
            if isinstance(value, Tensor):
                name, new = self.names.name(call, field, value)
                if new:
                    self.writer.add(name, value)
                entries[field] = name
                call.fields[field] = None
        if isinstance(call.scale, Tensor):
            name, _ = self.names.name(call, "scale", call.scale)
            self.writer.add(name, call.scale)
            entries["scale"] = name
        self.written[id(call)] = entries

    def finish(self) -> None:
        """Complete the file and let the trace read its fields from it."""
        for call in self.trace.calls:
            if id(call) not in self.written:
                self.add(call)
        extra: dict[str, Tensor] = {}
        calls = [_call_entry(c, self.written[id(c)], extra, False) for c in self.trace.calls]
        self.writer.finish(_document(self.trace, calls, False))
        stored = load(self.path)
        for call, on_disk in zip(self.trace.calls, stored.calls, strict=True):
            call.fields = on_disk.fields
        self.trace.path = self.path

    def close(self) -> None:
        """Remove what is unfinished."""
        self.writer.abort()


def _call_entry(call: Call, entries: dict[str, str | None], tensors: dict[str, Tensor], compact: bool) -> dict[str, Any]:
    fields = {f: n for f, n in entries.items() if f in FIELDS}
    scale: Any = call.scale
    if isinstance(scale, Tensor):
        name = entries.get("scale")
        if name is None:
            name = f"calls/{call.index:04d}/{call.site.path or 'model'}/scale"
            tensors[name] = scale
        scale = {"tensor": name}
    return {
        "site": asdict(call.site), "step": call.step, "tap": call.tap,
        "dtype": str(call.dtype).removeprefix("torch."), "scale": scale, "softcap": call.softcap,
        "causal": call.causal, "window": call.window, "dropout": call.dropout, "heads": call.heads,
        "kv_heads": call.kv_heads, "queries": call.queries, "notes": list(call.notes), "fields": fields,
        "derivable": list(call.derivable),
        "certificate": {k: _to_json_number(v) for k, v in call.certificate.to_json().items()},
    }


def _document(trace: Trace, calls: list[dict[str, Any]], compact: bool) -> dict[str, Any]:
    from .. import __version__
    versions = {**trace.model.get("versions", {}), "hookattn": __version__}
    return {
        "model": _plain({**trace.model, "versions": versions}), "selection": _plain(trace.selection),
        "tokens": trace.tokens, "notes": trace.notes, "compact": compact,
        "skipped": [asdict(s) for s in trace.skipped], "calls": calls,
    }


def _to_json_number(x: Any) -> Any:
    return repr(x) if isinstance(x, float) and not math.isfinite(x) else x


def _plain(x: Any) -> Any:
    """Something JSON can hold, and hold strictly: no NaN, keys as strings, the rest by its repr."""
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set, frozenset)):
        return [_plain(v) for v in x]
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return _to_json_number(x)
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else repr(x)


def load(path: str | PathLike[str]) -> Trace:
    """See :func:`hookattn.load`."""
    file = LazyFile(path)
    document = file.document
    try:
        trace = Trace(tokens=document.get("tokens"), model=document.get("model", {}), notes=document.get("notes", []),
                      selection=document.get("selection", {}), path=fspath(path))
        trace.skipped = [Skipped(s["path"], s["reason"], tuple(s.get("steps", ()))) for s in document.get("skipped", [])]
        trace.calls = [_read_call(file, i, entry) for i, entry in enumerate(document["calls"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"{fspath(path)}: the document in the header is not a trace's: {type(error).__name__}: {error}. The file was "
            "damaged or written by something else; save the trace again.") from error
    return trace


def _read_call(file: LazyFile, index: int, entry: dict[str, Any]) -> Call:
    known = {k: v for k, v in entry["site"].items() if k in Site.__dataclass_fields__}
    scale = entry["scale"]
    names: dict[str, str | None] = entry["fields"]
    missing = [n for n in names.values() if n is not None and n not in file.keys()]
    if missing:
        raise CorruptFileError(f"{file.path}: call {index} names the tensor {missing[0]!r}, which is not in the file.")
    dtype = getattr(torch, entry["dtype"])
    certificate = {k: float(v) if isinstance(v, str) and k not in ("status", "basis") else v
                   for k, v in entry["certificate"].items() if k in Certificate.__dataclass_fields__}

    def lazy(name: str) -> Any:
        return lambda: file.tensor(name)

    return Call(
        site=Site(**known), step=entry["step"], index=index, tap=entry["tap"], dtype=dtype,
        scale=file.tensor(scale["tensor"]) if isinstance(scale, dict) else float(scale),
        softcap=entry["softcap"], causal=entry["causal"], window=entry["window"], dropout=entry["dropout"],
        heads=_tuple(entry["heads"]), kv_heads=_tuple(entry["kv_heads"]), queries=_tuple(entry["queries"]),
        notes=tuple(entry["notes"]), certificate=Certificate(**certificate), derivable=tuple(entry["derivable"]),
        fields={f: None if n is None else lazy(n) for f, n in names.items()})


def _tuple(x: list[int] | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x)
