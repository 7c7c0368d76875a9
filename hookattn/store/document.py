"""A Trace as named tensors and one JSON document, and back. docs/trace-format.md describes the result."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from ..certificate import Certificate
from ..errors import CorruptFileError
from ..memory import version_of
from ..record import FIELDS
from ..site import Site
from ..trace import Call, Skipped, Trace
from .rawbytes import byte_blocks
from .reader import LazyFile
from .writer import StreamWriter, write_file

# Fields that many calls have in common: stored once for each distinct content.
_SHARED = ("mask", "bias", "sinks")


class Names:
    """Gives every tensor of a trace its name, and the same name to the same content."""

    def __init__(self) -> None:
        self._by_content: dict[tuple[Any, ...], str] = {}
        self._by_identity: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._counts: Counter[str] = Counter()

    def name(self, call: Call, field: str, x: Tensor) -> tuple[str, bool]:
        """The name of a field, and whether it still has to be written."""
        if field not in _SHARED:
            return f"calls/{call.index:04d}/{call.site.path or 'model'}/{field}", True
        version = version_of(x)
        ref, then, name = self._by_identity.get(id(x), (None, -1, ""))
        if ref is not None and ref() is x and then == version:
            return name, False
        digest = hashlib.blake2b(digest_size=16)
        for block in byte_blocks(x):
            digest.update(block)
        content = (field, x.dtype, tuple(x.shape), digest.digest())
        known = self._by_content.get(content)
        name = known or f"shared/{field}/{self._counts[field]:03d}"
        self._counts[field] += known is None
        self._by_content[content] = name
        self._by_identity[id(x)] = (weakref.ref(x), version, name)
        return name, known is None


def save(trace: Trace, path: str | PathLike[str], *, compact: bool = False) -> str:
    """See :meth:`hookattn.Trace.save`."""
    names, tensors, calls = Names(), {}, []
    for call in trace.calls:
        left_out = {f for f in ("scores", "weights") if compact and f in call.derivable}
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


def _call_entry(
    call: Call, entries: dict[str, str | None], tensors: dict[str, Tensor], compact: bool
) -> dict[str, Any]:
    fields = {f: n for f, n in entries.items() if f != "scale"}
    scale: Any = call.scale
    if isinstance(scale, Tensor):
        name = entries.get("scale")
        if name is None:
            name = f"calls/{call.index:04d}/{call.site.path or 'model'}/scale"
            tensors[name] = scale
        scale = {"tensor": name}
    since_1_1 = {} if call.keys is None else {"keys": call.keys}
    return {
        "site": asdict(call.site),
        "step": call.step,
        "tap": call.tap,
        "dtype": str(call.dtype).removeprefix("torch."),
        "scale": _to_json_number(scale),
        "softcap": call.softcap,
        "causal": call.causal,
        "window": call.window,
        "dropout": call.dropout,
        "heads": call.heads,
        "own_scores": call.own_scores,
        "mixed": call.mixed,
        "kv_heads": call.kv_heads,
        "queries": call.queries,
        "notes": list(call.notes),
        "fields": fields,
        "derivable": list(call.derivable),
        "certificate": {k: _to_json_number(v) for k, v in call.certificate.to_json().items()},
        **since_1_1,
    }


def _document(trace: Trace, calls: list[dict[str, Any]], compact: bool) -> dict[str, Any]:
    from .. import __version__

    versions = {**trace.model.get("versions", {}), "hookattn": __version__}
    return {
        "model": _plain({**trace.model, "versions": versions}),
        "selection": _plain(trace.selection),
        "tokens": trace.tokens,
        "notes": trace.notes,
        "compact": compact,
        "skipped": [asdict(s) for s in trace.skipped],
        "calls": calls,
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
        _expect(
            "the document",
            document,
            tokens="texts?",
            model="object",
            notes="strs",
            selection="object",
            skipped="objects",
            calls="objects",
        )
        trace = Trace(
            tokens=document["tokens"],
            model=document["model"],
            notes=document["notes"],
            selection=document["selection"],
            path=fspath(path),
        )
        for entry in document["skipped"]:
            _expect("skipped", entry, path="str", reason="str", steps="ints")
            trace.skipped.append(Skipped(entry["path"], entry["reason"], tuple(entry["steps"])))
        trace.calls = [_read_call(file, i, entry) for i, entry in enumerate(document["calls"])]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptFileError(
            f"{fspath(path)}: the document in the header is not a trace's: {type(error).__name__}: {error}. The file "
            "was damaged or written by something else; save the trace again."
        ) from error
    return trace


def _read_call(file: LazyFile, index: int, entry: dict[str, Any]) -> Call:
    where = f"call {index}"
    _expect(
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
    _expect(
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
    _expect(
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
    if "keys" in entry:
        _expect(where, entry, keys="int?")
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

    def lazy(name: str) -> Any:
        return lambda: file.tensor(name)

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
        queries=_tuple(entry["queries"]),
        keys=entry.get("keys"),  # since 1.1
        own_scores=entry["own_scores"],
        mixed=entry["mixed"],
        notes=tuple(entry["notes"]),
        certificate=Certificate(**certificate),
        derivable=tuple(entry["derivable"]),
        fields={f: None if n is None else lazy(n) for f, n in names.items()},
    )


def _tuple(x: list[int] | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x)


def _each(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: type(x) is list and all(map(kind, x))


def _of(*types: type) -> Callable[[Any], bool]:
    return lambda x: type(x) in types  # not isinstance: True is an int too


_NUMBER: Callable[[Any], bool] = lambda x: type(x) in (int, float) or x in ("nan", "inf", "-inf")  # noqa: E731
_KINDS: dict[str, Callable[[Any], bool]] = {
    "bool": _of(bool),
    "int": _of(int),
    "str": _of(str),
    "object": _of(dict),
    "number": _NUMBER,
    "ints": _each(_of(int)),
    "strs": _each(_of(str)),
    "objects": _each(_of(dict)),
    "texts": _each(_each(_of(str))),
    "dtype": lambda x: type(x) is str and isinstance(getattr(torch, x, None), torch.dtype),
    "names": lambda x: type(x) is dict and all(type(n) in (str, type(None)) for n in x.values()),
    "scale": lambda x: _NUMBER(x) or (type(x) is dict and type(x.get("tensor")) is str),
}


def _expect(where: str, entry: dict[str, Any], **kinds: str) -> None:
    """Check that an object of the document has these keys, of these kinds (``?``: or null). Raises TypeError."""
    for key, kind in kinds.items():
        if key not in entry:
            raise TypeError(f"{where} has no {key!r}")
        x = entry[key]
        if not (_KINDS[kind.removesuffix("?")](x) or (x is None and kind.endswith("?"))):
            raise TypeError(f"{where}: {key!r} is {repr(x)[:60]}, expected {kind.replace('?', ' or null')}")
