"""The file layer: what is written is read back bit for bit, by us and by anyone else, and only as far as asked for."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from hookattn.errors import TraceFileError
from hookattn.store import FORMAT_VERSION, LazyFile, StreamWriter, format, mapping, partial, rawbytes, write_file
from hookattn.store.indexing import select

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
        every = torch.arange(256 ** dtype.itemsize)
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
        assert file.document == document == {"format": "hookattn-trace", "format_version": [1, 0], **DOCUMENT}
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
            assert start % file.dtype(name).itemsize == 0, name
            assert torch.equal(file.tensor(name), tensors[name])
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("order", [["f32", "more"], ["bf16", "u8", "bf16b"]])
def test_stream_keeps_the_order_where_nothing_is_off(tmp_path: Path, order: list[str]) -> None:
    tensors = odd_sizes() | {"bf16b": torch.randn(3, 5).bfloat16()}
    keys = LazyFile(stream(tmp_path / "f", {name: tensors[name] for name in order}, {})).keys()
    assert keys == [name for name in order if name != "u8"] + ["u8"] * ("u8" in order)


def test_misaligned_file_of_another_writer(tmp_path: Path) -> None:
    """Nothing of ours writes these, and safetensors allows them."""
    x, document = torch.randn(3, 600, 500), format.encode_document({})
    entries = {
        "mask": format.Entry(torch.bool, (1,), 0, 1),
        "x": format.Entry(x.dtype, tuple(x.shape), 1, 1 + x.nbytes),
    }
    header = format.encode_header(entries, document)
    (tmp_path / "f").write_bytes(format.frame_header(header, 8 + len(header)) + b"\1" + raw(x))
    with LazyFile(tmp_path / "f") as file:
        got = file.tensor("x")
        assert torch.equal(got, x) and got.data_ptr() % 4 == 0
        assert torch.equal(file.slice("x", (slice(None, None, 2), 5, slice(3, 400, 7))), x[::2, 5, 3:400:7])
        assert file.slice("x", (1, 2, 3)) == x[1, 2, 3] and bool(file.tensor("mask"))


def test_one_shot_takes_no_more_than_it_needs(tmp_path: Path) -> None:
    tensors = odd_sizes()
    path = write_file(tmp_path / "f", ((name, tensor) for name, tensor in tensors.items()), {})
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = path.read_bytes()[8 : 8 + length]
    assert path.stat().st_size == 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    assert len(header) - len(header.rstrip()) < 8
    assert LazyFile(write_file(tmp_path / "none", {}, {"a": 1})).keys() == []


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


INDICES = st.lists(st.integers(-5, 5) | st.slices(6), max_size=4).map(tuple)


@settings(deadline=None, max_examples=400)
@given(shape=st.lists(st.integers(0, 5), max_size=4), index=INDICES)
def test_select_is_torch_indexing(shape: list[int], index: tuple[Any, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    try:
        expected = whole[index]
    except (IndexError, ValueError) as error:
        with pytest.raises(type(error)):
            select(tuple(shape), index)
        return
    got = select(tuple(shape), index)
    assert got.shape == expected.shape
    if expected.numel():
        assert torch.equal(whole.flatten().as_strided(got.shape, got.strides, got.offset), expected)
        assert got.offset + got.span <= whole.numel()


@pytest.mark.parametrize("keep_from", [0, 1 << 40], ids=["mapped", "copied"])
def test_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_from: int) -> None:
    monkeypatch.setattr(mapping, "KEEP_FROM", keep_from)
    x = torch.randn(2, 4, 33, 65)
    with LazyFile(write_file(tmp_path / "f", {"x": x}, {})) as file:
        for index in [(), 1, -1, slice(1, None), (0, 3), (slice(None), 2), (1, slice(0, 4, 3), -1), (1, 3, 32, 64)]:
            assert torch.equal(file.slice("x", index), x[index])
        assert file.slice("x", (slice(2, 2),)).shape == (0, 4, 33, 65)
        for index, kind in [((0,) * 5, IndexError), (2, IndexError), (True, TypeError), ([0], TypeError)]:
            with pytest.raises(kind):
                file.slice("x", index)
        with pytest.raises(TypeError):
            file.slice("x", (..., 0))
        with pytest.raises(KeyError, match="no tensor 'y'.*'x'"):
            file.tensor("y")


@pytest.mark.parametrize("keep_from", [0, 1 << 40], ids=["mapped", "copied"])
def test_what_is_read_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_from: int) -> None:
    monkeypatch.setattr(mapping, "KEEP_FROM", keep_from)
    x = torch.randn(16, 100, 100)
    path = write_file(tmp_path / "f", {"x": x}, {})
    before = path.read_bytes()
    file = LazyFile(path)
    first, head = file.tensor("x"), file.slice("x", 3)
    first.zero_()
    head[:] = 7
    assert torch.equal(file.tensor("x"), x) and path.read_bytes() == before
    path.unlink()
    file.close()
    file.close()
    assert (first == 0).all() and (head == 7).all() and "closed" in repr(file)
    with pytest.raises(TraceFileError, match="closed"):
        file.tensor("x")


def test_a_file_replaced_while_open_is_read_as_it_was(tmp_path: Path) -> None:
    path = write_file(tmp_path / "f", {"x": torch.zeros(1 << 20)}, {})
    old = LazyFile(path)
    write_file(path, {"x": torch.ones(3)}, {})
    assert old.tensor("x").sum() == 0 and LazyFile(path).tensor("x").sum() == 3


def test_many_live_tensors_do_not_use_up_the_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "KEEP_FROM", 0)
    file = LazyFile(write_file(tmp_path / "f", {str(i): torch.full((8,), i) for i in range(2000)}, {}))
    held = [file.tensor(name) for name in file]
    assert all((tensor == int(name)).all() for name, tensor in zip(file, held, strict=True))
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) < 600


def test_threads_read_and_close(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((300, 1000), float(i)) for i in range(8)}
    file = LazyFile(write_file(tmp_path / "f", tensors, {}))

    def read(i: int) -> bool:
        name = str(i % 8)
        return torch.equal(file.tensor(name), tensors[name]) and bool((file.slice(name, i % 300) == i % 8).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))

    def until_closed() -> None:
        with pytest.raises(TraceFileError, match="closed"):
            while True:
                assert (file.slice("3", 5) == 3).all()

    threads = [threading.Thread(target=until_closed) for _ in range(4)]
    for thread in threads:
        thread.start()
    file.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_threads_write(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "f") as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: writer.add(str(i), torch.full((i + 1,), i)), range(100)))
        file = LazyFile(writer.finish({}))
    assert all((file.tensor(str(i)) == i).all() and file.shape(str(i)) == (i + 1,) for i in range(100))


def test_pickled_by_path_into_a_spawned_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 400, 500)
    write_file(tmp_path / "f", {"x": x}, {"a": 1})
    monkeypatch.chdir(tmp_path)
    file = LazyFile("f")
    assert pickle.loads(pickle.dumps(file)).document == file.document and len(pickle.dumps(file)) < 500
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(file.slice, ("x", 1)).equal(x[1])


HEAD = """
import sys, time
from hookattn.store import LazyFile
import torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before, start = resident(), time.perf_counter()
head = LazyFile(sys.argv[1]).slice("weights", (0, 3))
elapsed, after = time.perf_counter() - start, resident()
assert head.shape == (int(sys.argv[2]),) * 2 and head[-1, -1] == 3.5 and head[0, 0] == 3, head
print(elapsed, after - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("side", [2161, pytest.param(5793, marks=pytest.mark.slow)], ids=["300MB", "2GB"])
def test_one_head_reads_one_head(tmp_path: Path, side: int) -> None:
    """Odd sides and a mask first: the case in which a stream has to take care of the alignment."""
    weights = torch.arange(16.0).reshape(1, 16, 1, 1).repeat(1, 1, side, side)
    weights[..., -1, -1] += 0.5
    tensors = {"mask": torch.ones(side, side, dtype=torch.bool), "weights": weights}
    path = stream(tmp_path / "f", tensors, {})
    del weights, tensors
    runs = []
    for _ in range(3):  # the machine may be busy: the best of three
        done = subprocess.run([sys.executable, "-c", HEAD, path, str(side)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        runs.append([float(word) for word in done.stdout.split()])
    elapsed, mapped, touched = (min(column) for column in zip(*runs, strict=True))
    assert elapsed < 0.02 and mapped < 8e6 and touched < 12e6, runs


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="overcommitment is the system's own")
def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """A hole in a sparse file stands for most of it; safetensors itself cannot open this one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = (16, 2 * memory // (16 * 4 * 1024), 1024)
    size = 4 * shape[0] * shape[1] * shape[2]
    header = format.encode_header({"x": format.Entry(torch.float32, shape, 0, size)}, format.encode_document({}))
    start = format.data_start(header)
    with open(tmp_path / "f", "wb") as out:
        out.write(format.frame_header(header, start))
        try:
            out.truncate(start + size)
        except OSError:
            pytest.skip("the file system has no file as large")
        out.seek(start + size - 4)
        out.write(struct.pack("<f", 2.5))
    with LazyFile(tmp_path / "f") as file:
        assert file.slice("x", (-1, -1))[-1] == 2.5 and file.slice("x", (3, slice(0, 5))).sum() == 0
        assert file.slice("x", (slice(None), 7, 9)).sum() == 0
