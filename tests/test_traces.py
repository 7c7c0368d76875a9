"""The public class of a trace and the data that it is made of: what is taken of a trace is of its class."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

import hookattn
from hookattn import statistics as st


class Named(hookattn.Trace):
    """A user's own trace."""


class Attends(nn.Module):
    """One causal self-attention of 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def traced(capture: tuple[object, ...] | None = None) -> hookattn.Trace:
    torch.manual_seed(0)
    model = nn.Sequential(Attends(), Attends())
    return hookattn.trace(model, torch.randn(1, 5, 8), capture=capture)  # type: ignore[arg-type]


def named(trace: hookattn.Trace) -> Named:
    return Named(**vars(trace))


def test_a_part_is_of_the_class_that_it_is_taken_of() -> None:
    trace = named(traced())
    for part in (trace[:1], trace.select(layer=0), trace.stitch()):
        assert type(part) is Named and part.model == trace.model and part.selection == trace.selection
    assert len(trace[:1]) == 1 and trace[:1][0] is trace[0] and trace[:1].calls is not trace.calls
    assert type(traced()[:1]) is hookattn.Trace


def test_merged_statistics_are_of_the_class_of_the_first_trace() -> None:
    trace = named(traced((st.Entropy(),)))
    assert type(st.merge(trace)) is Named and type(st.merge([traced((st.Entropy(),)), trace])) is hookattn.Trace


def test_a_trace_is_itself_and_says_what_it_is() -> None:
    trace = traced()
    assert repr(trace) == "Trace(2 calls of Sequential)" and repr(named(trace)) == "Named(2 calls of Sequential)"
    assert trace == trace and trace != hookattn.Trace(**vars(trace)), "traces are equal only to themselves"
    assert hookattn.Trace.__doc__ and "skipped:" in hookattn.Trace.__doc__


def test_copied_and_pickled_it_is_of_its_class() -> None:
    trace = traced()
    trace.output = None
    for other in (copy.copy(trace), copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        assert type(other) is hookattn.Trace and torch.equal(other[1].weights, trace[1].weights)


def test_a_file_is_opened_as_a_trace_and_names_the_version(tmp_path: Path) -> None:
    path = traced().save(tmp_path / "t.safetensors")
    trace = hookattn.load(path)
    assert type(trace) is hookattn.Trace and type(trace[1:]) is hookattn.Trace
    assert trace.model["versions"]["hookattn"] == hookattn.__version__ == "0.1.0"
    assert torch.equal(trace.stitch()[0].weights, trace[0].weights)


def test_a_stream_is_the_trace_that_was_handed_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attends(), Attends()), torch.randn(1, 5, 8)
    with hookattn.tracing(model, to=tmp_path / "t.safetensors") as trace:
        model(x)
    assert type(trace) is hookattn.Trace and type(trace.select(layer=-1)) is hookattn.Trace
    assert torch.equal(trace[1].weights, hookattn.trace(model, x)[1].weights)
