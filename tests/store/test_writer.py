"""The file layer: what is written is read back bit for bit, by us and by anyone else."""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hookattn.errors import TraceWriteError
from hookattn.store import FORMAT_VERSION, LazyFile, StreamWriter, format, partial, rawbytes, write_file, writer

DOCUMENT: dict[str, Any] = {"tokens": ["Ġthe", "\N{OWL}", "\ud800", "a\\u0041\n"], "n": 1, "none": None}


def stream(path: Path, tensors: dict[str, Tensor], document: dict[str, Any], **options: Any) -> Path:
    with StreamWriter(path, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish(document)


WRITERS = pytest.mark.parametrize("write", [write_file, stream])


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def patterns(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of a narrow dtype (so every NaN, infinity and zero), and many of a wide one."""
    if dtype is torch.bool:
        return torch.arange(6).reshape(2, 3) % 2 == 0
    if dtype.itemsize <= 2:
        every = torch.arange(256**dtype.itemsize)
        return every.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).reshape(2, -1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=generator).view(dtype)
    if not dtype.is_floating_point:
        return noise.reshape(2, -1)
    special = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan"), 5e-324, 1.0], dtype=dtype)
    return torch.cat([noise, special]).reshape(2, -1)


def plain_read(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, Any]]:
    """With struct and json alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 8 == 0
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")["hookattn"])
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        out[name] = (entry["dtype"], entry["shape"], data[8 + length + begin : 8 + length + end])
    return out, document


@WRITERS
@pytest.mark.parametrize("code", list(format.TORCH_DTYPES))
def test_every_dtype_bit_for_bit(tmp_path: Path, write: Any, code: str) -> None:
    dtype = format.TORCH_DTYPES[code]
    every = patterns(dtype)
    tensors = {
        "all": every,
        "transposed": every.T,
        "stepped": every[:, ::3],
        "expanded": every[:1].expand(3, *every.shape),
        "scalar": every[0, 1],
        "empty": every[:0],
        "empty later": every.new_empty(2, 0, 3),
        "one": every[:1, :1],
    }
    path = write(tmp_path / "run.safetensors", tensors, DOCUMENT)
    bare, document = plain_read(path)
    assert list(document)[:2] == ["format", "format_version"] and document["format_version"] == list(FORMAT_VERSION)
    with LazyFile(path) as file, safe_open(path, "pt") as theirs:
        assert file.document == document == {"format": "hookattn-trace", "format_version": [1, 3], **DOCUMENT}
        assert theirs.metadata()["format"] == "pt" and json.loads(theirs.metadata()["hookattn"]) == document
        assert set(file.keys()) == set(tensors) == set(theirs.keys()) == set(bare) and len(file) == len(tensors)
        for name, tensor in tensors.items():
            assert bare[name] == (code, list(tensor.shape), raw(tensor))
            assert file.shape(name) == tensor.shape and file.dtype(name) == dtype and name in file
            for got in (file.tensor(name), theirs.get_tensor(name)):
                assert got.dtype == dtype and got.shape == tensor.shape and raw(got) == raw(tensor)


def test_safetensors_knows_the_same_dtypes() -> None:
    from safetensors.torch import _TYPES

    assert {code: dtype for code, dtype in _TYPES.items() if dtype is not None}.items() <= format.TORCH_DTYPES.items()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(40, 50).T,
        lambda: torch.randn(1, 1, 40, 50)[..., ::2],
        lambda: torch.randn(1, 30, 1).expand(7, 30, 20),
        lambda: torch.randn(40, 50, dtype=torch.complex64).mT.conj(),
        lambda: torch.randn(400, dtype=torch.complex64).conj().imag,  # has its negative bit set
        lambda: torch.nn.Parameter(torch.randn(300)),
    ],
)
def test_blocks_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(rawbytes, "BLOCK", 100)
    tensor = make()
    file = LazyFile(stream(tmp_path / "f", {"x": tensor}, {}))
    assert torch.equal(file.tensor("x"), tensor.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(tmp_path: Path) -> None:
    x = torch.randn(6, 1 << 20, device="cuda", dtype=torch.bfloat16)
    file = LazyFile(stream(tmp_path / "f", {"x": x, "t": x.T}, {}))
    assert torch.equal(file.tensor("x"), x.cpu()) and torch.equal(file.tensor("t"), x.T.cpu())


def odd_sizes() -> dict[str, Tensor]:
    """Tensors that throw each other off their alignment in this order."""
    return {
        "mask": torch.arange(49).reshape(7, 7) % 3 == 0,
        "f32": torch.randn(5, 7),
        "bf16": torch.randn(3, 3).bfloat16(),
        "i64": torch.arange(3),
        "u8": torch.arange(3, dtype=torch.uint8),
        "f64": torch.randn(3, dtype=torch.float64),
        "more": torch.randn(11, 2),
    }


@WRITERS
def test_everything_is_aligned(tmp_path: Path, write: Any) -> None:
    tensors = odd_sizes()
    path = write(tmp_path / "f", tensors, {})
    with LazyFile(path) as file:
        for name in file:
            start = file._header.start + file._header.entries[name].begin
            # A stream that ends on a multiple of four has no better place for the rare tensor of eight-byte items.
            assert start % min(file.dtype(name).itemsize, 4 if write is stream else 8) == 0, name
            assert torch.equal(file.tensor(name), tensors[name])
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("order", [["f32", "more"], ["bf16", "u8", "bf16b"]])
def test_stream_keeps_the_order_where_nothing_is_off(tmp_path: Path, order: list[str]) -> None:
    tensors = odd_sizes() | {"bf16b": torch.randn(3, 5).bfloat16()}
    keys = LazyFile(stream(tmp_path / "f", {name: tensors[name] for name in order}, {})).keys()
    assert keys == [name for name in order if name != "u8"] + ["u8"] * ("u8" in order)


def test_one_shot_takes_no_more_than_it_needs(tmp_path: Path) -> None:
    tensors = odd_sizes()
    path = write_file(tmp_path / "f", ((name, tensor) for name, tensor in tensors.items()), {})
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = path.read_bytes()[8 : 8 + length]
    assert path.stat().st_size == 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    assert len(header) - len(header.rstrip()) < 8
    assert LazyFile(write_file(tmp_path / "none", {}, {"a": 1})).keys() == []


@WRITERS
def test_every_byte_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    written: list[int] = []
    own = partial.PartialFile.write

    def counted(self: Any, offset: int, data: bytes) -> None:
        written.append(len(data))
        own(self, offset, data)

    monkeypatch.setattr(partial.PartialFile, "write", counted)
    tensors = {f"t{i}": torch.full((1 << 18,), float(i)) for i in range(5)}
    path = write(tmp_path / "f", tensors, DOCUMENT)
    assert sum(written) == path.stat().st_size > writer.RESERVE


@pytest.mark.parametrize("reserve", [0, 13, 1024, 4096, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_stream_and_one_shot_hold_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserve: int, count: int
) -> None:
    """With room for the header, without it (the data moves up) and with far too much (it moves down)."""
    monkeypatch.setattr(partial, "CHUNK", 1000)
    tensors = {f"call/{i}/{name}": tensor + i for i in range(count) for name, tensor in odd_sizes().items()}
    one = LazyFile(write_file(tmp_path / "one", tensors, DOCUMENT))
    path = stream(tmp_path / "stream", tensors, DOCUMENT, reserve=reserve)
    many = LazyFile(path)
    assert one.document == many.document and set(one) == set(many) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(one.tensor(name), tensor) and torch.equal(many.tensor(name), tensor)
    assert set(plain_read(path)[0]) == set(tensors)
    assert path.stat().st_size <= 2 * one.path.stat().st_size + reserve * (count == 40)
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(tensors)


INDICES: list[Any] = [
    (),
    (slice(1, 2),),
    (slice(None), slice(0, 5, 2)),
    (slice(2, None), slice(3, 4)),
    (slice(5, 9),),
    2,
    (-1, slice(None)),
]


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("chunk", [8 << 20, 12])
def test_a_part_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Any, chunk: int) -> None:
    """Of an unfinished file as of a finished one, and no more bytes than from its first to its last element."""
    monkeypatch.setattr(writer, "CHUNK", chunk)
    read: list[int] = []
    own = partial.PartialFile.read
    monkeypatch.setattr(partial.PartialFile, "read", lambda self, at, n: (read.append(n), own(self, at, n))[1])
    tensors = {"mask": torch.rand(3, 5) > 0.5, "x": torch.randn(4, 6), "wide": torch.randn(3, 5, 7).bfloat16()}
    with StreamWriter(tmp_path / "f") as out:
        for name, x in tensors.items():
            out.add(name, x)
        for name, x in tensors.items():
            read.clear()
            got = out.slice(name, index)
            assert got.dtype == x.dtype and got.is_contiguous() and torch.equal(got, x[index])
            assert max(read, default=0) <= chunk
            part = x[index]
            span = 1 + sum((n - 1) * d for n, d in zip(part.shape, part.stride(), strict=True)) if part.numel() else 0
            assert sum(read) == span * x.itemsize
        with pytest.raises(IndexError, match="index 9 is out of range"):
            out.slice("x", 9)
        with pytest.raises(KeyError, match="no tensor 'y' was written"):
            out.slice("y", index)
        file = LazyFile(out.finish({}))
    assert all(torch.equal(file.slice(name, index), x[index]) for name, x in tensors.items())


def test_threads_write(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "f") as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: writer.add(str(i), torch.full((i + 1,), i)), range(100)))
        file = LazyFile(writer.finish({}))
    assert all((file.tensor(str(i)) == i).all() and file.shape(str(i)) == (i + 1,) for i in range(100))


def test_a_refused_tensor_leaves_the_writer_as_it_was(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    refused: list[tuple[Any, Any, str]] = [
        ("x", x, "already"),
        ("__metadata__", x, "name"),
        ("\ud800", x, "name"),
        (3, x, "name"),
        ("n", [1.0], "expected a tensor, and got list"),
        ("n", x.to_sparse(), "dense"),
        ("n", x.to("meta"), "dense"),
        ("n", torch.nested.nested_tensor([x]), "dense"),
        ("n", x.to(torch.complex128), "complex128.*C64"),
    ]
    with StreamWriter(tmp_path / "f") as out:
        out.add("x", x)
        for name, tensor, message in refused:
            with pytest.raises(TraceWriteError, match=message):
                out.add(name, tensor)
        for document in [{"a": x}, {"a": {1, 2}}, {(1, 2): 3}]:
            with pytest.raises(TraceWriteError, match="JSON"):
                out.finish(document)
        out.add("y", x + 1)
        assert not (tmp_path / "f").exists()
        assert out.finish({"format": "other", "a": 1}) == tmp_path / "f"
        for late in (lambda: out.add("z", x), lambda: out.finish({})):
            with pytest.raises(TraceWriteError, match="finished"):
                late()
    file = LazyFile(tmp_path / "f")
    assert torch.equal(file.tensor("y"), x + 1) and file.document["format"] == "hookattn-trace"


def test_a_header_too_long_for_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "HEADER_LIMIT", 1000)
    with StreamWriter(tmp_path / "f") as out:
        out.add("x", torch.ones(3))
        with pytest.raises(TraceWriteError, match="Keep fewer calls"):
            out.finish({"a": "x" * 1000})
        out.finish({"a": "x" * 100})
    assert len(LazyFile(tmp_path / "f").document["a"]) == 100


def test_interrupted_in_the_middle_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensor: Tensor) -> Any:
        yield b"half of it"
        raise KeyboardInterrupt

    x = torch.randn(5)
    with StreamWriter(tmp_path / "f") as out:
        out.add("x", x)
        with monkeypatch.context() as patch:
            patch.setattr(writer, "byte_blocks", interrupted)
            with pytest.raises(KeyboardInterrupt):
                out.add("y", x)
        out.add("y", x * 2)
        out.finish({})
    file = LazyFile(tmp_path / "f")
    assert torch.equal(file.tensor("x"), x) and torch.equal(file.tensor("y"), x * 2)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_leaving_without_finish_leaves_nothing(tmp_path: Path, error: Any) -> None:
    (tmp_path / "f").write_bytes(b"older")

    def leave() -> None:
        with StreamWriter(tmp_path / "f") as out:
            out.add("mask", torch.ones(3, dtype=torch.bool))
            out.add("x", torch.ones(3))
            assert len(os.listdir(tmp_path)) == 3  # what is there, and two partial files
            if error is not None:
                raise error

    if error is None:
        leave()
    else:
        with pytest.raises(error):
            leave()
    forgotten = StreamWriter(tmp_path / "f")
    forgotten.add("x", torch.ones(3))
    del forgotten
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"older"


def test_overwrite_links_and_permissions(tmp_path: Path) -> None:
    path = write_file(tmp_path / "f", {"x": torch.ones(3)}, {})
    for refuse in (lambda: write_file(path, {}, {}, overwrite=False), lambda: StreamWriter(path, overwrite=False)):
        with pytest.raises(TraceWriteError, match=r"exists.*overwrite=True"):
            refuse()
    late = StreamWriter(tmp_path / "g", overwrite=False)
    (tmp_path / "g").touch()
    with pytest.raises(TraceWriteError, match="exists"):
        late.finish({})
    late.abort()
    (tmp_path / "link").symlink_to("f")
    write_file(tmp_path / "link", {"x": torch.zeros(3)}, {}, overwrite=True)
    assert (tmp_path / "link").is_symlink() and LazyFile(path).tensor("x").sum() == 0
    assert path.stat().st_mode == (tmp_path / "g").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["f", "g", "link"]
    assert write_file(tmp_path / ("ü" * 127), {}, {}).exists()  # the longest name there can be
