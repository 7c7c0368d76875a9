"""Damaged trace files: whatever is damaged, all that reads a file gives what it says, or an error of ours.

A round takes one of several sound files, damages it in one of :data:`DAMAGE`'s ways, and reads all of it. Half of those
whose header was changed get checksums that fit again, as of a writer with a fault: else the checksum of the document
would be all that is attacked.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import hookattn
from hookattn.console.tables import print_calls, print_head, print_verdict, trace_as_json
from hookattn.errors import HookattnError
from hookattn.statistics import TopK
from hookattn.store import LazyFile
from hookattn.store.checksums import CHECKSUMS_KEY, begun, encode
from hookattn.store.format import TORCH_DTYPES, Entry
from hookattn.testing.recheck import recheck

from . import Figure

SLOW = 2.0
"""Seconds that nothing may take to read."""
ROOM = 300
"""MB that reading may take beside what the process had at its start."""
_LONG = 50
"""One in so many rounds is read by what is slow: tables for people, steps put together."""

Parts = tuple[dict[str, Any], dict[str, Any], bytes]
"""The tensors of a header, the document, and the data."""


# The sound files


class _Attention(nn.Module):
    """Keys and values are those of the calls before, too, and two query heads read each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 16), nn.Linear(8, 16)
        self.cache: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (4, 4)).transpose(1, 2).chunk(2, 1)
        if self.cache is not None:
            k, v = torch.cat([self.cache[0], k], 2), torch.cat([self.cache[1], v], 2)
        self.cache = k, v
        made = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=True)
        return made.transpose(1, 2).flatten(2)[..., :8]


def _run(
    folder: Path, name: str, steps: int = 1, streamed: bool = False, compact: bool = False, **options: Any
) -> bytes:
    torch.manual_seed(0)
    model = nn.Sequential(_Attention(), _Attention()).eval()
    path = folder / name
    with torch.no_grad(), hookattn.tracing(model, to=path if streamed else None, **options) as trace:
        for step in range(steps):
            model(torch.randn(2, 1 if step else 5, 8))
    if not streamed:
        trace.save(path, compact=compact)
    return path.read_bytes()


def sound_files(folder: Path) -> dict[str, bytes]:
    """Files of every kind, small ones."""
    words = [["a", "b", "c", "d", "e"]] * 2
    return {
        "full": _run(folder, "full", tokens=words),
        "compact": _run(folder, "compact", compact=True),
        "streamed": _run(folder, "streamed", streamed=True),
        "statistics": _run(folder, "statistics", capture=["entropy", "received", TopK(2), "weights"]),
        "generation": _run(folder, "generation", steps=4, compact=True),
        "streamed generation": _run(folder, "streamed generation", steps=3, streamed=True),
        "heads": _run(folder, "heads", compact=True, heads=[3, 0]),
        "queries": _run(folder, "queries", queries=[-1, 1]),
        "uneven heads": _run(folder, "uneven heads", compact=True, heads=[0, 1, 2]),
    }


def parted(raw: bytes) -> Parts:
    """A sound file's header, document and data."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")["hookattn"])
    return header, document, raw[8 + length :]


def whole(header: dict[str, Any], text: str, data: bytes, sums: bool, more: str = "") -> bytes:
    """The file of a header, the text of a document and data; with checksums that fit, as far as some can be made."""
    metadata = {"format": "pt", "hookattn": text}
    if sums:
        tensors = []
        for name, entry in sorted(header.items(), key=lambda item: _key(item[1])):
            try:
                begin, end = entry["data_offsets"]
                shown = Entry(TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
                tensors.append(_sum(name, shown, data))
            except Exception:  # noqa: BLE001  whatever stands there: the reader has to say so
                tensors.append(0)
        metadata[CHECKSUMS_KEY] = encode(text, tensors)
    raw = json.dumps({"__metadata__": metadata} | header)
    if more:
        raw = raw[:-1] + more + "}"
    made = raw.encode("utf-8", "surrogatepass")
    made += b" " * (-len(made) % 8)
    return len(made).to_bytes(8, "little") + made + data


def _key(entry: Any) -> tuple[float, float]:
    try:
        begin, end = entry["data_offsets"]
        return float(begin), float(end)
    except Exception:  # noqa: BLE001  likewise
        return math.inf, math.inf


def _sum(name: str, entry: Entry, data: bytes) -> int:
    import zlib

    return zlib.crc32(data[entry.begin : entry.end], begun(name, entry))


# The damage

_DEEP = "\0deep\0"
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 99, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.5, 1e308, math.nan,
    math.inf, "nan", "inf", "-inf", "", "x", "dot", "softmax", "sigmoid", "additive", "float64", "int64", "bool",
    "quint8", "float8_e4m3fn", "faithful", "good", "q", "k", "weights", "shared/mask/000", "\ud800", "a" * 5000,
    [], [0], [99], [-1], [0, 1], [1, 0], [0, 1, 2, 3], ["q"], ["weights"], [None], [[]], [["a"]], [10**400],
    {}, {"tensor": "x"}, {"x": 1}, {"tensor": "shared/mask/000"}, _DEEP,
]  # fmt: skip


def _text(document: Any) -> str:
    return json.dumps(document).replace(json.dumps(_DEEP), "[" * 900 + "]" * 900)


def _places(x: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document that has a value."""
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    return [p for key, value in items for p in ((*path, key), *_places(value, (*path, key)))]


def _inside(x: Any, path: Sequence[Any]) -> Any:
    for key in path:
        x = x[key]
    return x


class _Base:
    """A sound file, taken apart once."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.header, self.document, self.data = parted(raw)
        self.places = _places(self.document)

    def copied(self) -> Parts:
        """What may be changed."""
        return json.loads(json.dumps(self.header)), copy.deepcopy(self.document), self.data


Damage = Callable[[random.Random, _Base, bool], bytes]


def _flipped(r: random.Random, raw: bytes, start: int, stop: int) -> bytes:
    made = bytearray(raw)
    for _ in range(r.choice((1, 1, 1, 2, 8))):
        made[r.randrange(start, stop)] ^= 1 << r.randrange(8)
    return bytes(made)


def bits_of_header(r: random.Random, base: _Base, sums: bool) -> bytes:
    """Bits of the header flipped, the document in it."""
    return _flipped(r, base.raw, 0, 8 + int.from_bytes(base.raw[:8], "little"))


def bits_of_document(r: random.Random, base: _Base, sums: bool) -> bytes:
    """Characters of the document exchanged."""
    text = json.dumps(base.document)
    for _ in range(r.choice((1, 2, 4))):
        at = r.randrange(len(text))
        text = text[:at] + r.choice('0123456789-.eE"[]{},: aqkvNInfty\\') + text[at + r.randrange(2) :]
    return whole(base.header, text, base.data, sums)


def bits_of_data(r: random.Random, base: _Base, sums: bool) -> bytes:
    """Bits of the tensors flipped."""
    return _flipped(r, base.raw, len(base.raw) - len(base.data), len(base.raw))


def cut(r: random.Random, base: _Base, sums: bool) -> bytes:
    """Cut short, or with something behind."""
    return base.raw[: r.randrange(len(base.raw))] if r.random() < 0.7 else base.raw + r.randbytes(r.randrange(1, 40))


def replaced(r: random.Random, base: _Base, sums: bool) -> bytes:
    """A value of the document replaced by one of another type, out of range, huge or deep."""
    header, document, data = base.copied()
    for _ in range(r.choice((1, 1, 1, 2))):
        *path, key = r.choice(base.places)
        with contextlib.suppress(KeyError, IndexError, TypeError):  # it was in what the first one replaced
            _inside(document, path)[key] = copy.deepcopy(r.choice(_ODD))
    return whole(header, _text(document), data, sums)


def keys(r: random.Random, base: _Base, sums: bool) -> bytes:
    """A key of the document removed, renamed or put elsewhere."""
    header, document, data = base.copied()
    *path, key = r.choice(base.places)
    parent = _inside(document, path)
    value = parent.pop(key)
    if isinstance(parent, list):
        parent.extend(r.choice(([], [value, value])))
    elif r.random() < 0.6:
        parent[r.choice((*parent, "x", "q", "weights", "scores", "tensor"))] = value
    return whole(header, _text(document), data, sums)


def tensors(r: random.Random, base: _Base, sums: bool) -> bytes:
    """A shape, a dtype or offsets of the header altered, of the same number of bytes now and then."""
    header, document, data = base.copied()
    name = r.choice(list(header))
    entry = header[name]
    way = r.randrange(6)
    if way == 0:
        entry["shape"] = r.sample(entry["shape"], len(entry["shape"]))
    elif way == 1:
        shape = [n for n in entry["shape"] if n > 0] or [1]
        entry["shape"] = r.choice(
            ([math.prod(shape)], [1, *shape], shape[1:], [*shape, 1], [math.prod(shape[:2]), *shape[2:]])
        )
    elif way == 2:
        entry["dtype"] = r.choice((*TORCH_DTYPES, "F4", 3))
    elif way == 3:
        item = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
        size = item.get(entry["dtype"], 4) * math.prod(entry["shape"])
        entry["dtype"] = r.choice(list(item))
        count = size // item[entry["dtype"]]
        entry["shape"] = r.choice(
            (
                [count],
                [1, 1, 1, count],
                [1, count, 1, 1],
                [*entry["shape"][:-1], count // max(1, math.prod(entry["shape"][:-1]))],
            )
        )
    elif way == 4:
        entry["data_offsets"] = [x + r.choice((-8, -1, 0, 1, 4, 8, 2**62)) for x in entry["data_offsets"]]
    else:
        header[name] = header[r.choice(list(header))]
        if r.random() < 0.5:
            at = len(data)
            header[name] = {
                "dtype": "F32",
                "shape": r.choice(([0], [1, 2**20, 0, 2**20], [0, 4, 2**40, 4])),
                "data_offsets": [at, at],
            }
    return whole(header, _text(document), data, sums)


def fields(r: random.Random, base: _Base, sums: bool) -> bytes:
    """Fields renamed, removed, made null, or exchanged between calls or with each other."""
    header, document, data = base.copied()
    one, two = r.choice(document["calls"])["fields"], r.choice(document["calls"])["fields"]
    name, other = r.choice(list(one)), r.choice(list(two))
    way = r.randrange(5)
    if way == 0:
        one[r.choice((other, "qq", "entropy", "applied", "sinks"))] = one.pop(name)
    elif way == 1:
        del one[name]
    elif way == 2:
        one[name] = None
    elif way == 3:
        one[name], two[other] = two[other], one[name]
    else:
        one[name] = r.choice(list(header))
    return whole(header, _text(document), data, sums)


def twice(r: random.Random, base: _Base, sums: bool) -> bytes:
    """A key stands in an object twice: in the header or in the document."""
    text = json.dumps(base.document)
    if r.random() < 0.5:
        name = r.choice(list(base.header))
        entry = dict(base.header[name], shape=r.choice(([1], base.header[name]["shape"][::-1])))
        return whole(base.header, text, base.data, sums, f", {json.dumps(name)}: {json.dumps(entry)}")
    at = r.choice([i for i in range(len(text)) if text[i] == "{"]) + 1
    key = r.choice(("dtype", "scale", "fields", "status", "calls", "q", "heads"))
    return whole(base.header, f'{text[:at]}"{key}": {json.dumps(r.choice(_ODD[:12]))}, {text[at:]}', base.data, sums)


def length(r: random.Random, base: _Base, sums: bool) -> bytes:
    """Another length of the header."""
    n = int.from_bytes(base.raw[:8], "little")
    n = r.choice((0, 1, n - 1, n + 1, n + 8, n - 8, n * 256, 2**63, 2**64 - 1, r.randrange(2**20)))
    return n.to_bytes(8, "little") + base.raw[8:]


def torn(r: random.Random, base: _Base, sums: bool) -> bytes:
    """A stretch lost, repeated, zeroed, or random."""
    begin = r.randrange(len(base.raw))
    end = min(len(base.raw), begin + r.choice((1, 4, 64, 512, 4096)))
    piece = base.raw[begin:end]
    new = r.choice((b"", piece * 2, bytes(len(piece)), r.randbytes(len(piece))))
    return base.raw[:begin] + new + base.raw[end:]


DAMAGE: tuple[Damage, ...] = (
    bits_of_header, bits_of_document, bits_of_data, cut, replaced, keys, tensors, fields, twice, length, torn,
)  # fmt: skip


# What reads


def read_all(path: Path, long: bool) -> list[str]:
    """Read all of a file by all that reads; what is nonsense in what came.

    Raises:
        Exception: whatever reading raises that is no error of ours.
    """
    try:
        trace = hookattn.load(path)
    except HookattnError:
        return []
    wrong: list[str] = []
    for call in trace:
        wrong += _ours(lambda call=call: _nonsense(call)) or []
        for name in (*call.fields, *call.derivable):
            _ours(lambda call=call, name=name: call.get(name))
        _ours(lambda call=call: (str(call.certificate), repr(call), call.verdict, call.shape))
        _ours(lambda call=call: call.at(heads=0 if call.heads is None else call.heads[0], batch=0).get("weights"))
    if trace.calls:
        _ours(lambda: trace.select(layer=-1)[0].get("weights"))
        _ours(lambda: recheck(trace[len(trace) // 2]))
    _ours(lambda: json.dumps(trace_as_json(trace)))
    if long:
        out = Console(file=io.StringIO(), width=120)
        _ours(lambda: print_head(out, trace_as_json(trace)))
        _ours(lambda: (print_calls(out, trace.calls), print_verdict(out, trace)))
        _ours(lambda: trace.stitch())
        _ours(lambda: [recheck(call) for call in trace])
        _ours(lambda: trace.attentions)
    return wrong


def _ours(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except HookattnError:
        return None


def _nonsense(call: hookattn.Call) -> list[str]:
    """What contradicts itself in a call that was loaded, said in other words than the loader's."""
    found: list[str] = []
    shapes = {n: tuple(x.shape) for n in hookattn.FIELDS if call.has(n) and (x := call.get(n)) is not None}
    for name, axes in {
        "q": "BHTD",
        "k": "BGSD",
        "v": "BGSE",
        "scores": "BHTS",
        "weights": "BHTS",
        "output": "BHTE",
    }.items():
        if name in shapes:
            for other, others in {"q": "BHTD", "k": "BGSD", "v": "BGSE", "weights": "BHTS", "output": "BHTE"}.items():
                for letter in set(axes) & set(others) - {"B"} if other in shapes else ():
                    if shapes[name][axes.index(letter)] != shapes[other][others.index(letter)]:
                        found.append(f"{letter} of {name} and {other}: {shapes[name]}, {shapes[other]}")
    for name in shapes:
        x = call.get(name)
        if x is not None and (x.dtype is not torch.bool if name == "mask" else not x.is_floating_point()):
            found.append(f"{name} is {x.dtype}")
    heads = next((shapes[n][1] for n in ("q", "weights", "output") if n in shapes), None)
    for name, numbers in (("heads", call.heads), ("kv_heads", call.kv_heads)):
        if heads is not None and numbers is not None and len(numbers) != heads:
            found.append(f"{len(numbers)} {name} for {heads}")
    if not call.dtype.is_floating_point or call.certificate.status not in ("faithful", "unfaithful", "unverified"):
        found.append(f"{call.dtype}, {call.certificate.status}")
    if not 0 <= call.dropout <= 1 or (call.softcap is not None and not math.isfinite(call.softcap)):
        found.append(f"dropout {call.dropout}, softcap {call.softcap}")
    if isinstance(call.scale, float) and not math.isfinite(call.scale):
        found.append(f"scale {call.scale}")
    return found


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    """So many damaged files."""
    r = random.Random(seed)
    raised: list[str] = []
    nonsense: list[str] = []
    slow: list[str] = []
    untold: list[str] = []
    kinds: Counter[str] = Counter()
    loaded = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    try:
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            bases = {name: _Base(raw) for name, raw in sound_files(Path(folder)).items()}
            path = Path(folder) / "damaged"
            for name, base in bases.items():  # what sound files need is no fault of damage
                path.write_bytes(base.raw)
                assert not read_all(path, True), name
                path.write_bytes(whole(base.header, json.dumps(base.document), base.data, True))
                with LazyFile(path) as file:
                    assert all(file.intact(n) for n in file), name
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for i in range(rounds):
                name, damage = r.choice(list(bases)), DAMAGE[i % len(DAMAGE)]
                made = damage(r, bases[name], r.random() < 0.6)
                path.unlink()  # a file that is mapped is not changed in place
                path.write_bytes(made)
                where = f"round {i} ({damage.__name__} of {name})"
                kinds[damage.__name__] += 1
                began = time.monotonic()
                try:
                    found = read_all(path, i % _LONG < len(DAMAGE) and i % 3 == 0)
                    nonsense += [f"{where}: {x}" for x in found]
                except Exception as error:  # noqa: BLE001  those that are ours were caught
                    raised.append(f"{where}: {type(error).__name__}: {str(error)[:120]}")
                if (took := time.monotonic() - began) > SLOW:
                    slow.append(f"{where}: {took:.1f} s")
                if made != bases[name].raw and damage in (bits_of_data,):
                    try:
                        with LazyFile(path) as file:
                            if all(file.intact(n) for n in file):
                                untold.append(where)
                            loaded += 1
                    except HookattnError:
                        pass
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    finally:
        torch.set_num_threads(threads)
    return (
        Figure("damaged files", rounds),
        Figure("kinds of damage", len(kinds)),
        Figure("exceptions other than our own", len(raised), 0, tuple(raised[:8])),
        Figure("nonsense that the file contradicts", len(nonsense), 0, tuple(nonsense[:8])),
        Figure("flipped bits of data that no checksum told", len(untold), 0, tuple(untold[:8])),
        Figure(f"reads of more than {SLOW:g} s", len(slow), 0, tuple(slow[:8])),
        Figure("MB of memory beyond the start", round(grown), ROOM),
    )
