"""Copies to the host beside the model's work: with a stand-in for the GPU's stream, whose copies take as long as a test
says; and with a GPU where there is one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.errors import FieldNotCaptured, TraceWriteError
from hookattn.recording import host_transfer
from hookattn.recording.host_transfer import Transfer, copy_through_buffers
from hookattn.store.writer import StreamWriter
from hookattn.torch_internals import devices
from tests.reference import draw

CPU = torch.device("cpu")


class Slow:
    """A lane whose copies wait until the gate is open."""

    def __init__(self, device: torch.device = CPU):
        self.gate, self.marks, self.fetched, self.last = threading.Event(), 0, 0, 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def fetch(self, x: Tensor, mark: int) -> Tensor:
        assert threading.current_thread() is not threading.main_thread() and self.gate.wait(20)
        self.fetched += 1
        assert mark > self.last, "out of order"
        self.last = mark
        return x.clone()


class Overwriting(nn.Module):
    """Attends, then writes over what it attended with; as a cache that is used in place, or an in-place activation."""

    def forward(self, x: Tensor) -> Tensor:
        for scale in (1.0, 2.0, 3.0):
            q, k, v = x * scale, x + scale, x - scale
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            for y in (q, k, v):
                y.fill_(torch.nan)
        return x


X = draw(1, 2, 12, 8, seed=1)


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """Every tensor is taken for one on a GPU."""
    made = Slow()
    monkeypatch.setattr(host_transfer, "CudaLane", lambda device: made)
    monkeypatch.setattr(devices, "on_gpu", lambda x: True)
    monkeypatch.setattr("hookattn.attention.kernels.derive", lambda *args: "this is none")
    yield made
    made.gate.set()
    assert not [t for t in threading.enumerate() if t.name.startswith("hookattn-transfer")], "a thread was left"


def plain() -> hookattn.Trace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "on_gpu", lambda x: False)
        return hookattn.trace(Overwriting(), X)


FIELDS = ("q", "k", "v", "scores", "mask", "weights", "output")


def same(made: hookattn.Trace) -> None:
    want = plain()
    assert len(made) == len(want) == 3 and made.faithful
    for a, b in zip(made, want, strict=True):
        for name in FIELDS:
            torch.testing.assert_close(a.get(name), b.get(name))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 7), (64,)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64])
def test_a_buffer_is_emptied_when_it_is_full_and_filled_when_it_is_empty(
    count: int, late: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (draw(*shape, seed=2) * 9).to(dtype) if shape else torch.tensor(3.0).to(dtype)
    out, busy = torch.zeros_like(x), set()

    def copy(buffer: Tensor, part: Tensor) -> Callable[[], None]:
        assert buffer.data_ptr() not in busy, "filled again before it was emptied"
        busy.add(buffer.data_ptr())
        if not late:
            buffer.copy_(part)

        def full() -> None:
            buffer.copy_(part)
            busy.discard(buffer.data_ptr())

        return full

    copy_through_buffers(x, out, [torch.full((16,), 255, dtype=torch.uint8) for _ in range(count)], copy)
    assert torch.equal(out, x) and not busy


def test_what_the_model_overwrites_is_what_it_was(lane: Slow) -> None:
    """Nothing is copied before the forward is over."""
    with hookattn.tracing(model := Overwriting(), device="cpu") as made:
        model(X)
        assert len(made) == 3 and lane.fetched == 0 and lane.marks > 9
        lane.gate.set()
    same(made)
    assert all(isinstance(value, Tensor) or value is None for call in made for value in call.fields.values())


def test_a_field_that_is_read_early_is_waited_for(lane: Slow) -> None:
    model = Overwriting()
    with hookattn.tracing(model, device="cpu", dtype=torch.float16) as made:
        model(X)
        opener = threading.Timer(0.2, lane.gate.set)
        start = time.perf_counter()
        opener.start()
        early = made[1].q, made[1].mask
        assert time.perf_counter() - start > 0.1 and early[0].dtype == torch.float16
        opener.join()
    assert early[0] is made[1].q and not early[0].isnan().any() and early[1].all(-1).any()


def test_a_file_is_the_same(lane: Slow, tmp_path: Path) -> None:
    lane.gate.set()
    same(hookattn.trace(Overwriting(), X, to=tmp_path / "one.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "on_gpu", lambda x: False)
        hookattn.trace(Overwriting(), X, to=tmp_path / "two.safetensors")
        one, two = (hookattn.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.fields.keys() == b.fields.keys()


def test_a_field_is_read_while_its_file_is_written(lane: Slow, tmp_path: Path) -> None:
    """One that has not arrived is waited for, one that was written is read back; both while others are on their way."""
    model = Overwriting()
    with hookattn.tracing(model, to=tmp_path / "x.safetensors") as made:
        threading.Timer(0.2, lane.gate.set).start()
        model(X)
        early = [(call.q, call.weights, call.mask, repr(call)) for call in (made[0], made[-1])]
    for call, (q, weights, mask, said) in zip((made[0], made[-1]), early, strict=True):
        assert torch.equal(q, call.q) and torch.equal(weights, call.weights) and torch.equal(mask, call.mask)
        assert not q.isnan().any() and call.shape == "B1 H2 T12 S12" in said
    same(made)


def test_a_trace_reads_nothing_back_by_itself(lane: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: StreamWriter, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(StreamWriter, "tensor", never)
    lane.gate.set()
    same(hookattn.trace(Overwriting(), X, to=tmp_path / "x.safetensors"))


def test_what_was_given_up_says_so(lane: Slow) -> None:
    """The block raised before the GPU's copies had arrived."""
    opener = threading.Timer(0.5, lane.gate.set)
    with pytest.raises(KeyError), hookattn.tracing(model := Overwriting(), device="cpu") as made:
        model(X)
        opener.start()
        raise KeyError
    opener.join()
    assert lane.fetched < lane.marks
    with pytest.raises(FieldNotCaptured, match="still to be copied from the GPU when the traced block raised"):
        _ = made[2].weights
    assert made[0].bias is None
    assert made[2].certificate.faithful and "faithful" in repr(made[2])  # which needs none of them


def test_writing_goes_on_beside_the_model(lane: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is written in the second thread, and no more than one waits while another is made."""
    heard: list[tuple[bool, int]] = []
    add = StreamWriter.add

    def listened(self: StreamWriter, name: str, tensor: Tensor) -> None:
        heard.append((threading.current_thread() is threading.main_thread(), lane.marks))
        add(self, name, tensor)

    monkeypatch.setattr(StreamWriter, "add", listened)
    threading.Timer(0.2, lane.gate.set).start()
    hookattn.trace(Overwriting(), X, to=tmp_path / "x.safetensors")
    assert heard and not any(main for main, _ in heard)
    first = heard[0][1]
    assert first < lane.marks, "the model waited to the end"


def test_what_waits_is_bounded() -> None:
    lane = Slow()
    sent = Transfer(lambda device: lane, limit=3 * 400)
    done: list[Callable[[], Tensor]] = []

    def send() -> None:
        for i in range(8):
            done.append(sent.send(torch.full((100,), float(i)), torch.float32, ours=False))

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.3)
    assert len(done) == 3, "three fit"
    lane.gate.set()
    thread.join(20)
    assert [copy().unique().tolist() for copy in done] == [[float(i)] for i in range(8)] and lane.fetched == 8
    large = sent.send(torch.ones(5000), torch.float64, ours=True)  # larger than the limit: alone
    assert torch.equal(large(), torch.ones(5000, dtype=torch.float64))
    sent.close()


def test_a_fresh_tensor_is_not_copied_on_its_device() -> None:
    seen: list[int] = []

    class Looking(Slow):
        def fetch(self, x: Tensor, mark: int) -> Tensor:
            seen.append(x.data_ptr())
            return x.clone()

    sent, x = Transfer(Looking), torch.ones(4, 4)
    for fresh, y in ((True, x), (False, x), (True, x.t()[:, :2])):
        sent.send(y, torch.float32, fresh)()
    assert [at == x.data_ptr() for at in seen] == [True, False, False]
    sent.close()


def test_a_copy_that_fails_is_an_error_of_the_trace(lane: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(x: Tensor, mark: int) -> Tensor:
        raise RuntimeError("out of memory on the host")

    monkeypatch.setattr(lane, "fetch", failing)
    with pytest.raises(RuntimeError, match="on the host"):
        hookattn.trace(Overwriting(), X, device="cpu")


def test_a_disk_that_refuses_is_an_error_of_the_trace(
    lane: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(self: StreamWriter, name: str, tensor: Tensor) -> None:
        raise TraceWriteError("no space left")

    lane.gate.set()
    monkeypatch.setattr(StreamWriter, "add", refusing)
    with pytest.raises(TraceWriteError, match="no space"):
        hookattn.trace(Overwriting(), X, to=tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_model_that_raises_leaves_no_thread_and_no_file(lane: Slow, tmp_path: Path) -> None:
    class Raising(Overwriting):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            lane.gate.set()
            raise ValueError("the model's own")

    for options in ({"device": "cpu"}, {"to": tmp_path / "x.safetensors"}):
        lane.gate.clear()
        with pytest.raises(ValueError, match="own"), hookattn.tracing(model := Raising(), **options):  # type: ignore[arg-type]
            if "to" in options:
                threading.Timer(0.2, lane.gate.set).start()
            model(X)
    assert not list(tmp_path.iterdir())


def test_nothing_is_sent_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Transfer, "send", None)
    same(hookattn.trace(Overwriting(), X, device="cpu"))
    same(hookattn.trace(Overwriting(), X, to=tmp_path / "x.safetensors"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("large", [False, True])
def test_on_a_gpu(tmp_path: Path, large: bool) -> None:
    x = draw(2, 8, 2048 if large else 12, 64, seed=1).cuda()
    here = hookattn.trace(Overwriting(), x)
    for made in (
        hookattn.trace(Overwriting(), x, device="cpu"),
        hookattn.trace(Overwriting(), x, to=tmp_path / "x.safetensors"),
    ):
        for a, b in zip(made, here, strict=True):
            for name in FIELDS:
                got, want = a.get(name), b.get(name)
                assert got is not None and want is not None and not got.is_cuda
                torch.testing.assert_close(got, want.cpu())
