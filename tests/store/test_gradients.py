"""The gradient of a call's output in a trace file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import hookattn
from hookattn import CorruptFileError
from hookattn.errors import GradientError
from hookattn.testing.recheck import STORED, recheck
from tests.reference import draw

NAMES = ("output", "weights", "scores", "q", "k", "v")


class Attend(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(x, x, x, is_causal=True) + 0 * attend(y, y, y).detach()


def traced(**options: Any) -> hookattn.Trace:
    given = draw(1, 2, 5, 4).requires_grad_(), draw(1, 2, 5, 4, seed=1).requires_grad_()
    trace = hookattn.trace(Attend(), given, gradients=True, **options)
    trace.output.square().sum().backward()
    return trace


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_loaded_has_the_same_gradients(tmp_path: Path, compact: bool) -> None:
    trace = traced()
    back = hookattn.load(trace.save(tmp_path / "f", compact=compact))
    for name in NAMES:
        assert torch.equal(back[0].grad(name), trace[0].grad(name)), name
        if name not in ("k", "v"):
            part = back[0].at(heads=1, queries=[3, 0]).grad(name)
            torch.testing.assert_close(part, trace[0].grad(name)[:, 1:][:, :, [3, 0]])
    with pytest.raises(GradientError, match=r"gradients=True.*before the trace is saved"):
        back[1].grad("weights")
    again = hookattn.load(back.save(tmp_path / "again"))
    assert torch.equal(again[0].grad("weights"), back[0].grad("weights"))


def test_the_document_names_the_tensor(tmp_path: Path) -> None:
    trace = traced()
    with safe_open(trace.save(tmp_path / "f"), framework="pt") as file:
        calls = json.loads(file.metadata()["hookattn"])["calls"]
        assert torch.equal(file.get_tensor(calls[0]["output_grad"]), trace[0].grad("output"))
        assert "output_grad" not in calls[1] and calls[0]["output_grad"] not in calls[0]["fields"].values()
    plain = hookattn.trace(Attend(), (draw(1, 2, 5, 4), draw(1, 2, 5, 4)))
    with safe_open(plain.save(tmp_path / "plain"), framework="pt") as file:
        assert "output_grad" not in file.metadata()["hookattn"]


def test_a_stream_has_what_had_come_by_its_end(tmp_path: Path) -> None:
    given = draw(1, 2, 5, 4).requires_grad_(), draw(1, 2, 5, 4, seed=1)
    model = Attend()
    with hookattn.tracing(model, gradients=True, to=tmp_path / "f") as trace:
        model(*given).square().sum().backward()
    expected = traced()[0]
    for name in NAMES:
        assert torch.equal(trace[0].grad(name), expected.grad(name))
        assert torch.equal(hookattn.load(tmp_path / "f")[0].grad(name), expected.grad(name))
    late = traced(to=tmp_path / "late")
    assert torch.equal(late[0].grad("q"), expected.grad("q"))
    with pytest.raises(GradientError):
        hookattn.load(tmp_path / "late")[0].grad("q")
    assert torch.equal(hookattn.load(late.save(tmp_path / "saved"))[0].grad("q"), expected.grad("q"))


def altered(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """The file with another header: ``change(header, call)``."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    document = json.loads(header["__metadata__"]["hookattn"])
    change(header, document["calls"][0])
    header["__metadata__"] = {"hookattn": json.dumps(document)}
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + n :])
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, call: call.update(output_grad="nothing"), "'output_grad' names the tensor 'nothing'"),
        (lambda header, call: call.update(output_grad=3), "'output_grad' is 3, expected a string"),
        (lambda header, call: header[call["output_grad"]].update(shape=[1, 2, 4, 5]), "has T|has E"),
        (lambda header, call: header[call["output_grad"]].update(shape=[2, 5, 4]), r"expected B H T E"),
        (lambda header, call: header[call["output_grad"]].update(dtype="I32"), "int32, expected floating"),
    ],
)
def test_a_gradient_that_does_not_fit(tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    path = altered(Path(traced().save(tmp_path / "f")), change)
    with pytest.raises(CorruptFileError, match=message):
        hookattn.load(path)


def test_verify_looks_at_its_bytes(tmp_path: Path) -> None:
    path = Path(traced().save(tmp_path / "f"))
    assert recheck(hookattn.load(path)[0])[STORED].passed
    raw = bytearray(path.read_bytes())
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    call = json.loads(header["__metadata__"]["hookattn"])["calls"][0]
    raw[8 + n + header[call["output_grad"]]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)
    assert not recheck(hookattn.load(path)[0])[STORED].passed


def test_attached_traces_are_saved_as_values(tmp_path: Path) -> None:
    given = draw(1, 2, 5, 4).requires_grad_(), draw(1, 2, 5, 4, seed=1)
    trace = hookattn.trace(Attend(), given, attached=True)
    assert trace[0].weights.requires_grad
    back = hookattn.load(trace.save(tmp_path / "f"))
    for name in ("q", "weights", "scores", "output"):
        assert not back[0].get(name).requires_grad and torch.equal(back[0].get(name), trace[0].get(name))
    assert not back[0].attached
