"""Saving: call by call, so that no more than one is derived at a time, and what calls share is looked at once."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import Certificate, Trace, TraceTooLargeError
from hookattn.calls import deriving
from hookattn.calls.derived_cache import DERIVED_CACHE
from hookattn.calls.fields import Derived
from hookattn.store import LazyFile, StreamWriter, call_writer, names
from hookattn.torch_internals import devices
from tests.reference import draw, same_bits

T, WIDTH, LAYERS, H = 24, 32, 4, 4
X = draw(2, T, WIDTH, seed=1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3 * H, -1)).transpose(1, 2).chunk(3, 1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


def traced(**options: Any) -> Trace:
    torch.manual_seed(0)
    return hookattn.trace(Model(), X, **options)


def test_what_was_derived_is_let_go_before_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    own = call_writer.derive_field

    def watched(call: Any, name: str) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(found := own(call, name)))
        return found

    trace, held = traced(), DERIVED_CACHE.size
    monkeypatch.setattr(call_writer, "derive_field", watched)
    trace.save(tmp_path / "f")
    assert alive == [0, 1] * LAYERS  # the weights are made of the scores, which are not made twice
    monkeypatch.setattr(call_writer, "_TOGETHER", trace[0].scores.nbytes - 1)
    alive.clear()
    trace.certify()
    again = traced()
    again.save(tmp_path / "g")
    assert alive == [0, 0] * LAYERS  # larger ones are not held
    one, two = LazyFile(tmp_path / "f"), LazyFile(tmp_path / "g")
    assert list(one) == list(two) and all(same_bits(one.tensor(n), two.tensor(n)) for n in one)
    assert not any(call.made for call in again) and DERIVED_CACHE.size - held < trace[0].scores.nbytes * 2


def test_what_a_reader_has_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced()
    weights = [call.weights for call in trace]
    made: list[str] = []
    own = call_writer.derive_field
    monkeypatch.setattr(call_writer, "derive_field", lambda call, name: (made.append(name), own(call, name))[1])
    loaded = hookattn.load(trace.save(tmp_path / "f"))
    assert made == ["scores"] * LAYERS and all(same_bits(c.weights, w) for c, w in zip(loaded, weights, strict=True))


PEAK = """
import resource, sys, torch, hookattn, torch.nn.functional as F
class Model(torch.nn.Module):
    def forward(self, x):
        for _ in range(8):
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.manual_seed(0)
small, large = (hookattn.trace(Model(), torch.randn(1, 4, t, 16)) for t in (64, 1024))
small.save(sys.argv[1])
large.certify()
before = peak()
large.save(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in KiB there alone")
def test_the_peak_is_one_call(tmp_path: Path) -> None:
    # What is freed goes back to the system, so that what is counted is what is in use.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(Path(hookattn.__file__).parents[1]), **allocator}
    command = [sys.executable, "-c", PEAK, tmp_path / "f"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    one = 2 * 4 * 1024 * 1024 * 4  # scores and weights of a call, of which there are eight
    assert int(done.stdout) < 2 * one and os.path.getsize(tmp_path / "f") > 8 * one


def test_what_is_too_large_to_derive_says_so_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (older := tmp_path / "older").write_text("mine")
    trace = traced()
    monkeypatch.setattr(deriving, "_LARGE", 0)
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    for path in (tmp_path / "f", older):
        with pytest.raises(TraceTooLargeError, match=r"its scores .*What would fit: call\.at") as caught:
            trace.save(path)
        assert any("compact=True) leaves out" in note for note in caught.value.__notes__)
    assert os.listdir(tmp_path) == ["older"] and older.read_text() == "mine"
    loaded = hookattn.load(trace.save(tmp_path / "f", compact=True))  # nothing is derived for it
    assert all(same_bits(a.q, b.q) for a, b in zip(trace, loaded, strict=True))


@pytest.mark.parametrize("compact", [False, True])
def test_a_certificate_is_measured_before_the_numbers_of_its_call_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compact: bool
) -> None:
    trace, seen = traced(), []
    own = StreamWriter.add

    def watched(self: StreamWriter, name: str, x: Tensor) -> None:
        number = int(name.split("/")[1]) if name.startswith("calls/") else 0
        seen.append(isinstance(vars(trace[number])["_certificate"], Certificate))
        own(self, name, x)

    monkeypatch.setattr(StreamWriter, "add", watched)
    assert not any(isinstance(vars(call)["_certificate"], Certificate) for call in trace)
    loaded = hookattn.load(trace.save(tmp_path / "f", compact=compact))
    assert all(seen) and len(seen) >= 4 * LAYERS
    assert [c.certificate for c in loaded] == [c.certificate for c in trace] and loaded.faithful


def test_what_calls_share_is_read_and_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Tensor] = []
    own = names.byte_blocks
    monkeypatch.setattr(names, "byte_blocks", lambda x: (looked.append(x), own(x))[1])
    trace = traced()
    loaded = hookattn.load(trace.save(tmp_path / "f"))
    assert [x.shape for x in looked] == [(1, 1, T, T)]
    reads: list[str] = []
    read = LazyFile.slice
    monkeypatch.setattr(LazyFile, "slice", lambda self, name, i: (reads.append(name), read(self, name, i))[1])
    loaded.save(tmp_path / "g")
    assert len(looked) == 2 and reads.count("shared/mask/000") == 1
    both = Trace([*trace, *traced()]).save(tmp_path / "h")  # of another object, and the same
    assert len(looked) == 4 and [n for n in LazyFile(both) if n.startswith("shared")] == ["shared/mask/000"]


def test_calls_with_the_same_number_are_kept_apart(tmp_path: Path) -> None:
    """Of two traces put together: each call is written under its place in the new one."""
    one, two = traced(capture=("q", "weights")), hookattn.trace(Model(), X * 2, capture=("q", "weights"))
    loaded = hookattn.load(Trace([*one, *two]).save(tmp_path / "f"))
    for a, b in zip([*one, *two], loaded, strict=True):
        assert same_bits(a.q, b.q) and same_bits(a.weights, b.weights)


@pytest.mark.parametrize("options", [{}, {"heads": [1]}, {"capture": "weights"}])
def test_the_header_has_the_room_that_was_left_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """So that the data, which may be large, is not moved; and little of it stays empty."""
    moved: list[int] = []
    own = hookattn.store.partial.PartialFile.move

    def watched(self: Any, begin: int, size: int, to: int, source: Any = None) -> None:
        moved.append(size if source is None and begin != to else 0)
        own(self, begin, size, to, source)

    monkeypatch.setattr("hookattn.store.partial.PartialFile.move", watched)
    path = traced(tokens=['ä"\\'] * T, **options).save(tmp_path / "f")
    assert not any(moved)
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length - len(raw[8 : 8 + length].rstrip()) < 200 + 900 * LAYERS


def test_nothing_is_derived_of_what_has_its_own_values(tmp_path: Path) -> None:
    trace = traced(dtype=torch.float16)
    assert not any(isinstance(x, Derived) for call in trace for x in call.fields.values())
    loaded = hookattn.load(trace.save(tmp_path / "f"))
    assert all(same_bits(a.get(f), b.get(f)) for a, b in zip(trace, loaded, strict=True) for f in hookattn.FIELDS)
