"""Where a field of a call is: the same answers whether it is in memory, still to be made, in a file that is being
written or in a finished one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import Call, Trace, TraceFileError
from hookattn.calls.fields import DERIVED, InFile, Later, dtype_of, shape_of, tensor_of
from hookattn.errors import FieldNotCaptured
from hookattn.generation.merge_statistics import merge
from hookattn.render.trace_files import trace_file
from hookattn.store import LazyFile, StreamWriter, partial
from tests.reference import draw, same_bits
from tests.store.test_trace_file import Model, X

T, TWICE = 6, (X, X[:1, :4])
Options = dict[str, Any]
ALL: list[Options] = [
    {},
    {"capture": ("q", "k", "bias", "mask", "sinks")},  # scores and weights are derived
    {"capture": ("weights", "entropy", "received")},
    {"heads": [3, 1], "queries": slice(-2, None)},
    {"layers": [0, -1]},  # which of them are kept is known at the end alone
    {"dtype": torch.bfloat16, "device": "cpu"},
    {"verify": "off"},
]
NAMES = (*hookattn.FIELDS, "entropy", "received")
pytestmark = pytest.mark.filterwarnings("ignore::hookattn.SkippedWarning")


def told(call: Call) -> dict[str, Any]:
    """All that a call says of its fields; tensors, or the words of the errors."""

    def get(name: str) -> Any:
        try:
            return call.get(name)
        except hookattn.HookattnError as error:
            return type(error), str(error)

    made = {name: get(name) for name in NAMES} | {f"has {name}": call.has(name) for name in NAMES}
    return made | {"repr": repr(call), "shape": call.shape, "names": list(call.fields), "absent": absent(call)}


def absent(call: Call) -> list[str]:
    return [name for name, field in call.fields.items() if field is None]


def same(a: dict[str, Any], b: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if name not in but:
            assert type(a[name]) is type(b[name]) and same_bits(a[name], b[name]), (name, a[name], b[name])


def run(to: Path | None = None, look: Callable[[Trace], Any] = lambda trace: None, **options: Any) -> tuple[Trace, Any]:
    """A trace of two forwards, and what ``look`` makes of it before the block ends."""
    torch.manual_seed(0)
    model = Model().eval()
    with hookattn.tracing(model, to=to, **options) as trace:
        for x in TWICE:
            model(x)
        seen = look(trace)
    return trace, seen


def all_told(trace: Trace) -> list[dict[str, Any]]:
    return [told(call) for call in trace]


@pytest.mark.parametrize("options", ALL, ids=lambda options: " ".join(options) or "everything")
def test_a_call_says_the_same_while_it_is_written(tmp_path: Path, options: Options) -> None:
    _, memory = run(look=all_told, **options)
    trace, streamed = run(tmp_path / "x.safetensors", all_told, **options)
    assert len(memory) == len(streamed) == (4 if "layers" in options else 10)
    for a, b in zip(memory, streamed, strict=True):
        same(a, b)
        assert a["shape"] != "?"
    if "layers" not in options:
        for a, b in zip(streamed, all_told(trace), strict=True):  # the certificate is read at the end
            same(a, b, but=("repr",))


def test_absent_is_absent_and_what_was_not_captured_is_not_there(tmp_path: Path) -> None:
    def look(trace: Trace) -> None:
        call = trace[0]
        assert call.bias is None and call.sinks is None and absent(call) == ["bias", "sinks"]
        assert "q" in call.fields and "v" not in call.fields and isinstance(call.fields["q"], InFile)
        with pytest.raises(FieldNotCaptured, match=r"'v' of layers\.0 was not captured"):
            call.get("v")

    run(tmp_path / "x.safetensors", look, capture=("q", "k", "bias", "sinks", "mask"))


def test_nothing_of_a_streamed_call_stays_in_memory(tmp_path: Path) -> None:
    def look(trace: Trace) -> None:
        assert all(field is None or isinstance(field, InFile) for call in trace for field in call.fields.values())
        first, second = trace[0].q, trace[0].q
        first.zero_()
        assert second.any() and torch.equal(trace[0].q, second)

    trace, _ = run(tmp_path / "x.safetensors", look)
    assert all(isinstance(f.file, LazyFile) for call in trace for f in call.fields.values() if f is not None)


def test_a_whole_trace_is_read_while_it_is_written(tmp_path: Path) -> None:
    """Attentions, a selection, a stitched picture, merged statistics and a file of it, in the block and after it."""

    def look(trace: Trace) -> list[Any]:
        first = trace.select(step=0)
        whole = replace(trace, calls=[c for c in trace if c.step == 0])
        path = trace.save(tmp_path / f"saved-{len(list(tmp_path.iterdir()))}.safetensors")
        made = [list(first.attentions), all_told(trace.select(layer=-1)), all_told(first.stitch())]
        return [*made, all_told(merge(whole)), all_told(hookattn.load(path))]

    capture = (*hookattn.FIELDS, "entropy", "received")
    _, memory = run(look=look, capture=capture)
    _, streamed = run(tmp_path / "x.safetensors", look, capture=capture)
    assert same_bits(memory[0], streamed[0]) and len(memory[0]) == 5
    for a, b in zip(memory[1:], streamed[1:], strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)


@pytest.mark.parametrize("reserve", ["moved", "in place"])
def test_copies_of_a_call_that_were_made_in_the_block_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserve: str
) -> None:
    """Whether the end of the block moves the data, as in a small file, or not."""
    if reserve == "in place":
        monkeypatch.setattr(StreamWriter.__init__, "__kwdefaults__", {"reserve": 1 << 15, "checksums": True})

    def look(trace: Trace) -> list[Call]:
        a = trace[1]
        with pytest.raises(TraceFileError, match="pickled"):
            pickle.dumps(a)
        return [a, replace(a, step=9), replace(a, fields=dict(a.fields)), copy.copy(a), copy.deepcopy(a)]

    trace, copies = run(tmp_path / "x.safetensors", look)
    (tmp_path / "x.safetensors").rename(tmp_path / "moved.safetensors")
    expected = told(run()[0][1])
    for call in copies:
        same(told(call), expected, but=("repr",))
    (tmp_path / "moved.safetensors").rename(tmp_path / "x.safetensors")
    for call in (trace[1], *copies):
        assert torch.equal(pickle.loads(pickle.dumps(call)).weights, trace[1].weights)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_the_block_raised(tmp_path: Path, error: type[BaseException]) -> None:
    found: list[Trace] = []
    for to in (None, tmp_path / "x.safetensors"):
        with pytest.raises(error), hookattn.tracing(model := Model().eval(), to=to) as trace:
            found.append(trace)
            model(X)
            raise error
    memory, file = (trace[2] for trace in found)
    assert memory.q.shape == (2, 4, T, 8) and not list(tmp_path.iterdir())
    assert file.shape == "B2 H4 T6 S6" in repr(file) and file.has("q") and file.bias is None
    for name in ("q", "weights", "mask"):
        with pytest.raises(TraceFileError, match=f"{name}.*deleted.*Trace again"):
            file.get(name)


class Turns(nn.Module):
    """Attends as often as it is told, with queries that grow."""

    def forward(self, x: Tensor, n: int) -> Tensor:
        for i in range(n):
            x = F.scaled_dot_product_attention(x + i, x, x, is_causal=True)
        return x


def test_another_thread_reads_while_the_model_runs(tmp_path: Path) -> None:
    x, n, wrong, read = draw(1, 2, 37, 8, seed=2), 60, [], [0]
    expected = hookattn.trace(Turns(), {"x": x, "n": n})
    over = threading.Event()

    def look(trace: Trace) -> None:
        while not over.is_set():
            for call in trace.calls[-3:]:  # the last may not be written yet
                for name in ("q", "weights", "mask"):
                    read[0] += isinstance(call.fields[name], InFile)
                    if not torch.allclose(call.get(name).float(), expected[call.index].get(name).float(), atol=1e-6):
                        wrong.append((call, name))

    model = Turns()
    with hookattn.tracing(model, to=tmp_path / "x.safetensors") as trace:
        reader = threading.Thread(target=look, args=(trace,))
        reader.start()
        model(x, n)
        while read[0] < 50 and reader.is_alive():
            pass
        over.set()
        reader.join()
    assert not wrong and read[0] >= 50 and len(trace) == n
    for a, b in zip(trace, hookattn.load(tmp_path / "x.safetensors"), strict=True):
        assert same_bits(a.q, b.q) and same_bits(a.mask, b.mask)


def test_what_follows_from_other_fields_is_derived_when_it_is_read() -> None:
    torch.manual_seed(0)
    with hookattn.tracing(model := Turns()) as trace:
        model(draw(2, 4, T, 8, seed=3), 2)
        assert trace[0].fields["weights"] is DERIVED and trace[0].shape == f"B2 H4 T{T} S{T}"
        assert trace[0].weights.shape == (2, 4, T, T) and trace[0].weights is trace[0].weights
        assert trace[0].fields["weights"] is DERIVED
    assert trace.faithful


# What the types answer


def test_each_place_gives_its_tensor_shape_and_dtype(tmp_path: Path) -> None:
    x = draw(2, 3, seed=4).to(torch.float16)
    with StreamWriter(tmp_path / "x.safetensors") as writer:
        writer.add("x", x)
        for field in (x, Later(lambda: x), Later(torch.clone, x), InFile(writer, "x")):
            found = tensor_of(field)
            assert found is not None and same_bits(found, x)
            assert shape_of(field) == (2, 3) and dtype_of(field) == torch.float16
        writer.finish({})
    assert tensor_of(None) is None
    assert same_bits(tensor_of(InFile(LazyFile(tmp_path / "x.safetensors"), "x")), x)


def test_the_shape_of_what_is_in_a_file_is_told_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("read")

    def look(trace: Trace) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(StreamWriter, "tensor", never)
            return [repr(call) for call in trace]

    assert len(run(tmp_path / "x.safetensors", look)[1]) == 10
    trace = hookattn.load(tmp_path / "x.safetensors")
    monkeypatch.setattr(LazyFile, "tensor", never)
    assert [call.shape for call in trace] == ["B2 H4 T6 S6"] * 5 + ["B1 H4 T4 S4"] * 5


def test_a_field_that_is_made_later_is_not_in_the_file_of_its_trace(tmp_path: Path) -> None:
    """What draws from a trace's own file must not show what was there before a field was exchanged."""
    path = tmp_path / "x.safetensors"
    trace = hookattn.load(hookattn.trace(Model().eval(), X).save(path))
    with trace_file(trace) as own:
        assert own == str(path)
    zeros = torch.zeros_like(trace[0].weights)
    trace[0].fields["weights"] = Later(lambda: zeros)
    with trace_file(trace) as other:
        assert other != str(path) and not hookattn.load(other)[0].weights.any()


# The writer reads back


@pytest.mark.parametrize("chunk", [8 << 20, 8, 5])
def test_a_writer_reads_back_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """In both of its files: of odd sizes, strided, without elements, without dimensions."""
    monkeypatch.setattr("hookattn.store.writer.CHUNK", chunk)
    monkeypatch.setattr(partial, "CHUNK", chunk)
    odd = (draw(3, 3, seed=1) > 0, torch.arange(5, dtype=torch.uint8))
    plain = (draw(4, 6, seed=2).mT, draw(3, seed=3).to(torch.bfloat16), torch.empty(0, 4), torch.tensor(2.5).double())
    tensors = {f"{i}": x for i, x in enumerate((*odd, *plain, draw(8, seed=4).to(torch.float8_e4m3fn)))}
    with StreamWriter(tmp_path / "x.safetensors") as writer:
        for i, (name, x) in enumerate(tensors.items()):
            writer.add(name, x)
            for earlier, y in list(tensors.items())[: i + 1]:
                assert same_bits(writer.tensor(earlier), y.contiguous()), earlier
                assert (writer.shape(earlier), writer.dtype(earlier)) == (y.shape, y.dtype)
        assert len(list(tmp_path.iterdir())) == 2
        with pytest.raises(KeyError, match="no tensor 'y' was written"):
            writer.tensor("y")
        writer.finish({})
        with pytest.raises(TraceFileError, match=r"finished\. Open it to read '0'"):
            writer.tensor("0")
    file = LazyFile(tmp_path / "x.safetensors")
    assert all(same_bits(file.tensor(name), x.contiguous()) for name, x in tensors.items())


def test_a_file_that_was_cut_is_reported(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "x.safetensors") as writer:
        writer.add("x", draw(64, seed=1))
        (hidden,) = tmp_path.iterdir()
        with open(hidden, "r+b") as file:
            file.truncate(1 << 20)
        with pytest.raises(TraceFileError, match=r"cannot read 'x' back.*without to="):
            writer.tensor("x")
