"""What a file says of a call has to agree with itself, and what nothing contradicts has a checksum."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import Call, CorruptFileError, Site, Trace
from hookattn.errors import TraceFileError
from hookattn.store import LazyFile, StreamWriter, partial, write_file
from hookattn.store.format import FLOATING
from hookattn.testing.recheck import recheck
from tests.reference import draw


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    trace = hookattn.trace(Attend(), draw(1, 2, 5, 4))
    return Path(trace.save(tmp_path_factory.mktemp("good") / "f", compact=True)).read_bytes()


def altered(good: bytes, path: Path, change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any]) -> Path:
    """The file with another header, as of a writer that makes no checksums: ``change(header, document, call)``."""
    n = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + n])
    document = json.loads(header["__metadata__"]["hookattn"])
    change(header, document, document["calls"][0])
    header["__metadata__"] = {"hookattn": json.dumps(document)}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + good[8 + n :])
    return path


def call(**changed: Any) -> Callable[..., Any]:
    return lambda header, document, call: call.update(changed)


def tensor(field: str, **changed: Any) -> Callable[..., Any]:
    return lambda header, document, call: header[call["fields"][field]].update(changed)


WRONG: list[tuple[Callable[..., Any], str]] = [
    (tensor("q", shape=[4, 5, 2, 1]), r"field 'k' has S|field .* has"),
    (tensor("q", shape=[10, 4]), r"call 0: field 'q' is \[10, 4\], expected B H T D"),
    (tensor("q", dtype="I32"), "call 0: field 'q' is int32, expected floating"),
    (tensor("mask", dtype="U8"), "call 0: field 'mask' is uint8, expected bool"),
    *(
        (call(dtype=name), f"'dtype' is '{name}', expected the name of a floating")
        for name in ("int64", "bool", "quint8")
    ),
    (call(heads=[99]), "'heads' has 1 entries, and field 'q' has H = 2"),
    (call(queries=[7, 8, 9]), "'queries' has 3 entries, and field 'q' has T = 5"),
    (call(kv_heads=[0, 99]), "'kv_heads' has 99, and field 'k' has 2 heads"),
    (call(kv_heads=[0]), "'kv_heads' has 1 entries"),
    (call(kv_heads=[-1, 0]), "'kv_heads' is .*expected a list of integers from 0"),
    (call(keys=6), "'keys' is 6, and field 'k' has S = 5"),
    (call(softcap="inf"), "'softcap' is 'inf', expected a finite number"),
    (call(dropout="nan"), "'dropout' is 'nan', expected a number from 0 to 1"),
    (call(scale="nan"), "'scale' is 'nan', expected a finite number"),
    (call(scale=10**400), "'scale' is 1000"),
    (call(normalizer="sigmoid"), "'derivable' has 'weights', and the normalizer is 'sigmoid'"),
    (call(score="additive"), "'score' is 'additive', and 'own_scores' is false"),
    (call(derivable=["q"]), "'derivable' is .*expected a list of scores, weights"),
    (lambda h, d, c: c["fields"].pop("q"), "'derivable' has 'scores', which follows from 'q'"),
    (lambda h, d, c: c["fields"].update(q=None), "call 0: field 'q' is null"),
    (lambda h, d, c: c["fields"].update(mask=c["fields"]["q"]), "field 'mask' is float32, expected bool"),
    (
        lambda h, d, c: c["fields"].update(qq=c["fields"]["q"]),
        "'qq' is no field, and nothing of that name was captured",
    ),
    (
        lambda h, d, c: c["fields"].update(entropy=c["fields"]["q"]),
        r"field 'entropy' is \[1, 2, 5, 4\], expected B H T",
    ),
    (lambda h, d, c: c["certificate"].update(status="good"), "certificate: 'status' is 'good', expected one of"),
    (lambda h, d, c: c["certificate"].update(weights_tolerance=10**400), "certificate: 'weights_tolerance' is 1000"),
    (lambda h, d, c: c["certificate"].update(output_error=9.0), "'status' is 'faithful', and the error is 9.0"),
    (lambda h, d, c: c["certificate"].update(rows=9), "certificate: 'rows' is 9 of 5"),
    (lambda h, d, c: c["basis"].update(B="hearsay"), "'basis' is"),
    (lambda h, d, c: c["site"].update(layer=-1), "site: 'layer' is -1"),
    (lambda h, d, c: d["model"].update(versions="x"), "the model: 'versions' is 'x', expected an object of strings"),
    (lambda h, d, c: d["model"].update(config=deep(200)), "the document: 'model' is .*at most 100 levels"),
    (lambda h, d, c: d.update(compact="yes"), "the document: 'compact' is 'yes'"),
]


def deep(levels: int) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_cannot_be_true_is_refused(tmp_path: Path, good: bytes, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(CorruptFileError, match=f"(?s){message}.*save the trace again"):
        hookattn.load(altered(good, tmp_path / "f", change))


def test_every_floating_dtype_is_one_that_a_kernel_may_have_run_in(tmp_path: Path, good: bytes) -> None:
    assert {"float32", "bfloat16", "float16", "float64"} < FLOATING.keys()
    for name in FLOATING:
        loaded = hookattn.load(altered(good, tmp_path / name, call(dtype=name)))[0]
        assert (
            loaded.weights.dtype is FLOATING[name] and recheck(loaded)["stored"].reason == "the file has no checksums"
        )


def test_a_key_that_stands_twice_is_refused(tmp_path: Path, good: bytes) -> None:
    raw = altered(good, tmp_path / "f", lambda *_: None).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    for old, new in (
        (rb"\"dtype\": \"float32\"", rb"\"dtype\": \"float64\", \"dtype\": \"float32\""),
        (b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"'),
    ):
        header = raw[8 : 8 + n].replace(old, new, 1)
        assert header != raw[8 : 8 + n]
        (tmp_path / "g").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n :])
        with pytest.raises(CorruptFileError, match="the key 'dtype' stands in one object twice"):
            hookattn.load(tmp_path / "g")


def test_a_config_that_is_too_deep_is_saved_without_what_is_deep(tmp_path: Path) -> None:
    path = Trace(model={"config": deep(5000)}).save(tmp_path / "f")
    assert "nested deeper than 100" in json.dumps(dict(hookattn.load(path).model))


# Checksums


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_every_flipped_bit_of_the_data_is_told(tmp_path: Path, streamed: bool, compact: bool) -> None:
    path = tmp_path / "f"
    if streamed:
        with hookattn.tracing(model := Attend(), to=path):
            model(draw(1, 2, 3, 4))
    else:
        hookattn.trace(Attend(), draw(1, 2, 3, 4)).save(path, compact=compact)
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    assert recheck(hookattn.load(path)[0])["stored"].passed is True
    for bit in range(start * 8, len(raw) * 8, 7):
        raw[bit // 8] ^= 1 << bit % 8
        path.unlink()
        path.write_bytes(raw)
        with LazyFile(path) as file:
            assert sum(file.intact(name) is False for name in file) == 1
        raw[bit // 8] ^= 1 << bit % 8


def test_a_text_that_was_changed_is_told_at_once(tmp_path: Path, good: bytes) -> None:
    assert good.count(b"causal") >= 1
    (tmp_path / "f").write_bytes(good.replace(b"sdpa", b"sdqa", 1))
    with pytest.raises(CorruptFileError, match=r"expected the document to have the checksum .* and it has"):
        hookattn.load(tmp_path / "f")


def test_a_scale_that_was_changed_is_told_when_it_is_loaded(tmp_path: Path) -> None:
    scale = torch.tensor([1.5, 2.5]).view(1, 2, 1, 1)
    path = Path(Trace([Call(Site("a"), 0, 0, "t", torch.float32, scale)]).save(tmp_path / "f"))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"\0")
    with pytest.raises(CorruptFileError, match="'calls/0000/a/scale' does not have the checksum"):
        hookattn.load(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("7", "they name no algorithm"),
        ("{", "they are no JSON"),
        ('{"algorithm":"crc32","document":1,"tensors":[1]}', "there are 1, for"),
        ('{"algorithm":"crc32","document":"x","tensors":[]}', "expected integers"),
        ('{"algorithm":"of a later version"}', ""),
    ],
)
def test_checksums_of_another_form(tmp_path: Path, good: bytes, said: str, message: str) -> None:
    n = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + n])
    header["__metadata__"]["hookattn_checksums"] = said
    raw = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(raw).to_bytes(8, "little") + raw + good[8 + n :])
    if message:
        with pytest.raises(CorruptFileError, match=message):
            hookattn.load(tmp_path / "f")
    else:
        assert recheck(hookattn.load(tmp_path / "f")[0])["stored"].passed is None


def test_a_reader_that_knows_only_the_page_finds_the_same(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "f", {"a b": draw(2, 3), "mask": torch.ones(3, dtype=torch.bool), "n": torch.ones(())}, {}
    )
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    metadata = header.pop("__metadata__")
    said = json.loads(metadata["hookattn_checksums"])
    assert said["algorithm"] == "crc32" and said["document"] == zlib.crc32(metadata["hookattn"].encode())
    for (name, entry), expected in zip(header.items(), said["tensors"], strict=True):
        begin, end = entry["data_offsets"]
        shape = ",".join(map(str, entry["shape"]))
        shown = f"{name} {entry['dtype']} [{shape}]\n".encode()
        assert zlib.crc32(shown + raw[8 + n + begin : 8 + n + end]) == expected


def test_a_bool_that_is_neither_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = write_file(tmp_path / "f", {"mask": torch.ones(4, dtype=torch.bool)}, {})
    path.write_bytes(path.read_bytes()[:-1] + b"\x03")
    with pytest.raises(CorruptFileError, match="'mask' is bool, and has a byte that is neither"):
        LazyFile(path).tensor("mask")


# Rights, leftovers, forks


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="no such rights here")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int, streamed: bool) -> None:
    path = write_file(tmp_path / "f", {}, {})
    path.chmod(mode)
    if streamed:
        with hookattn.tracing(model := Attend(), to=path):
            model(draw(1, 2, 3, 4))
            unfinished = [x for x in tmp_path.iterdir() if x != path]  # nobody else reads these before either
            assert unfinished and {stat.S_IMODE(x.stat().st_mode) for x in unfinished} == {mode}
    else:
        write_file(path, {"x": draw(2)}, {})
    assert stat.S_IMODE(path.stat().st_mode) == mode and len(LazyFile(path)) > 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    path = write_file(tmp_path / "f", {}, {})
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    write_file(path, {"x": draw(2)}, {})
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o640)


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="no such rights here")
def test_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert stat.S_IMODE(write_file(tmp_path / "f", {}, {}).stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = [tmp_path / f".f.{gone.pid}-0123abcd.partial", tmp_path / f".f.{os.getpid()}-0123abcd.partial"]
    alive = [tmp_path / f".f.{os.getppid()}-0123abcd.partial"]
    others = [tmp_path / f".g.{gone.pid}-0123abcd.partial", tmp_path / f".f.{gone.pid}.partial", tmp_path / ".f.x"]
    for file in (*dead, *alive, *others):
        file.write_bytes(b"")
    with StreamWriter(tmp_path / "f") as first:
        write_file(tmp_path / "f", {}, {})  # beside another writer of this process
        assert sorted(x for x in tmp_path.iterdir() if x in (*dead, *alive, *others)) == sorted((*alive, *others))
        first.finish({})
    if sys.platform != "win32":
        held = partial.PartialFile(tmp_path / "h")  # as on another machine: no process of its number is here
        foreign = tmp_path / f".h.{gone.pid}-89abcdef.partial"
        os.rename(held._temporary, foreign)
        write_file(tmp_path / "h", {}, {})
        assert foreign.exists()
        held.discard()
        write_file(tmp_path / "h", {}, {})
        assert not foreign.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_that_leaves_the_block_leaves_the_file_to_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, {}, {})
    before, x = path.read_bytes(), draw(1, 2, 3, 4)
    with hookattn.tracing(model := Attend(), to=path) as trace:
        model(x)
        stream = trace[0].fields["q"].file  # type: ignore[union-attr]
        reads, writes = os.pipe()
        if os.fork() == 0:
            try:
                said = [torch.equal(trace[0].q, x), path.read_bytes() == before]
                with pytest.raises(hookattn.TraceWriteError, match="being written by another process"):
                    stream.writer.add("x", x)
                with pytest.raises(hookattn.TraceWriteError, match="being written by another process"):
                    stream.finish({})
                stream.writer.abort()
                with pytest.raises(TraceFileError, match="written by another process, of which this one is a fork"):
                    _ = trace[0].q
                os.write(writes, bytes([all(said), path.read_bytes() == before]))
            finally:
                os._exit(0)
        os.wait()
        assert os.read(reads, 2) == b"\1\1" and path.read_bytes() == before
        os.close(reads), os.close(writes)
        model(x)
    assert len(hookattn.load(path)) == 2 and torch.equal(trace[1].q, x) and os.listdir(tmp_path) == ["f"]
