"""Merging reads headers alone; reading a head, one rank's bytes; writing the whole takes the memory of a field."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import hookattn
from hookattn.store.reader import LazyFile
from tests import tiny_models
from tests.merging.cuts import cut, same_tensor


@pytest.fixture
def whole() -> hookattn.Trace:
    with torch.no_grad():
        return hookattn.trace(tiny_models.llama(), {"input_ids": tiny_models.ids(5, 3)})


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, int]]]:
    """The file, the tensor and the bytes of everything that is read in the block."""
    found: list[tuple[str, str, int]] = []
    slice_of, bytes_of = LazyFile.slice, LazyFile._bytes

    def noted(self, name, index):  # type: ignore[no-untyped-def]
        made = slice_of(self, name, index)
        found.append((self.path.name, name.rsplit("/")[-1], made.nbytes))
        return made

    def noted_bytes(self, name, begin, size):  # type: ignore[no-untyped-def]
        found.append((self.path.name, name, size))
        return bytes_of(self, name, begin, size)

    with monkeypatch.context() as patch:
        patch.setattr(LazyFile, "slice", noted)
        patch.setattr(LazyFile, "_bytes", noted_bytes)
        yield found


@pytest.mark.parametrize(("axis", "counts"), [("H", [1, 1, 1, 1]), ("H", [2, 2]), ("T", [2, 3]), ("B", [1, 2])])
def test_merging_reads_headers_alone(
    axis: str, counts: list[int], whole: hookattn.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [r.save(tmp_path / f"{i}.safetensors") for i, r in enumerate(cut(whole, axis, counts))]
    with reads(monkeypatch) as found:
        merged = hookattn.merge(paths)
        assert [call.shape for call in merged] == [call.shape for call in whole]
        assert not found
        assert merged[0].weights.shape == whole[0].weights.shape
        assert len(found) == len(counts)


@pytest.mark.parametrize("head", [0, 1, 2, 3])
@pytest.mark.parametrize("field", ["q", "k", "v", "weights", "output", "mask"])
def test_a_head_is_read_of_the_file_of_its_rank(
    head: int, field: str, whole: hookattn.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [r.save(tmp_path / f"{i}.safetensors") for i, r in enumerate(cut(whole, "H", [2, 2]))]
    merged = hookattn.merge(paths)
    with reads(monkeypatch) as found:
        part = merged[1].at(heads=head).get(field)
    expected = whole[1].at(heads=head).get(field)
    assert part is not None and expected is not None
    same_tensor(part, expected)
    assert [name for name, _, _ in found] == ["0.safetensors" if field == "mask" else f"{head // 2}.safetensors"]
    assert sum(size for _, _, size in found) == part.nbytes


def test_a_compact_file_derives_the_head_that_is_read(
    whole: hookattn.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [r.save(tmp_path / f"{i}.safetensors", compact=True) for i, r in enumerate(cut(whole, "H", [2, 2]))]
    merged = hookattn.merge(paths)
    with reads(monkeypatch) as found:
        same_tensor(merged[0].at(heads=3).weights, whole[0].at(heads=3).weights)
    assert {name for name, field, _ in found if field in ("q", "k")} == {"1.safetensors"}


def test_part_of_the_files_compact(whole: hookattn.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank's file has the weights and another's has what they follow from, no more is read than the part."""
    paths = [r.save(tmp_path / f"{i}.safetensors", compact=i == 1) for i, r in enumerate(cut(whole, "H", [2, 2]))]
    merged = hookattn.merge(paths)
    with reads(monkeypatch) as found:
        same_tensor(merged[0].at(heads=0).weights, whole[0].at(heads=0).weights)
        assert {name for name, _, _ in found} == {"0.safetensors"}
        same_tensor(merged[0].weights, whole[0].weights)


MEMORY = """
import sys
import torch, torch.nn.functional as F
import hookattn
from hookattn import Shard

class Layers(torch.nn.Module):
    def forward(self, x):
        for _ in range(LAYERS):
            x = F.scaled_dot_product_attention(x, x, x)
        return x

LAYERS, T, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
for rank in range(2):
    trace = hookattn.trace(Layers(), torch.randn(1, 4, T, 16), to=f"{folder}/{LAYERS}-{rank}.safetensors",
                           shard=Shard("H", 4 * rank, 8, 4 * rank, 8, "tp", rank, 2))
del trace

def peak(run):
    # What is anonymous memory at its highest; pages of mapped files are the system's to drop.
    import threading
    stop, highest = threading.Event(), [0]
    def watch():
        while not stop.wait(0.001):
            anonymous = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
            highest[0] = max(highest[0], anonymous)
    thread = threading.Thread(target=watch)
    before = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
    thread.start(); run(); stop.set(); thread.join()
    return (highest[0] - before) * 1024

def run():
    whole = hookattn.merge([f"{folder}/{LAYERS}-{rank}.safetensors" for rank in range(2)])
    whole.save(f"{folder}/{LAYERS}.safetensors")
print(peak(run))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_writing_the_whole_takes_the_memory_of_a_field(tmp_path: Path) -> None:
    layers, t = 8, 512
    field = 8 * t * t * 4  # the weights of one call; scores and weights of all calls are sixteen times that
    command = [sys.executable, "-c", MEMORY, str(layers), str(t), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    assert int(said.stdout) < 4 * field
