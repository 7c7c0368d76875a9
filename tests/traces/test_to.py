"""``trace.to``: another device or dtype, and numbers and certificates that stay true."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import edit
from hookattn.calls.fields import Derived
from hookattn.calls.key_history import Continued
from hookattn.errors import SelectionError
from tests import tiny_models
from tests.test_traces import Attends


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attends(), Attends())


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def values(trace: hookattn.Trace) -> list[dict[str, Tensor]]:
    return [{name: x for name in call.captured if (x := call.get(name)) is not None} for call in trace]


def test_a_dtype_is_what_the_trace_would_have_had(inputs: Tensor) -> None:
    """Also of what is derived: of q and k as they were, and rounded then."""
    trace = hookattn.trace(model(), inputs)
    narrow, traced = trace.to(torch.float16), hookattn.trace(model(), inputs, dtype=torch.float16)
    for one, other in zip(values(narrow), values(traced), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name
    assert narrow.selection == traced.selection and narrow.selection["dtype"] == "float16"
    assert [c.dtype for c in narrow] == [torch.float32] * 2, "that the kernel ran in"
    assert [c.certificate for c in narrow] == [c.certificate for c in trace]
    assert narrow[0].certificate.tolerance == trace[0].certificate.tolerance


def test_the_original_stays(inputs: Tensor) -> None:
    trace = hookattn.trace(model(), inputs)
    before = values(trace)
    trace.to(torch.float16)[0].q.zero_()
    for one, other in zip(before, values(trace), strict=True):
        assert all(torch.equal(one[name], other[name]) and other[name].dtype == one[name].dtype for name in one)
    assert trace.selection["dtype"] is None and trace.output is not None


def test_a_device_alone_derives_nothing(inputs: Tensor) -> None:
    trace = hookattn.trace(model(), inputs)
    moved = trace.to("cpu")
    assert isinstance(moved[0].fields["weights"], Derived) and moved[0].fields["q"] is trace[0].fields["q"]
    assert torch.equal(moved[1].weights, trace[1].weights) and moved.selection == trace.selection
    assert moved.output is None and moved is not trace and moved[0] is not trace[0]


@pytest.mark.gpu
def test_cuda_and_back(inputs: Tensor) -> None:
    trace = hookattn.trace(model().cuda(), inputs.cuda())
    host = trace.to("cpu")
    for call, other in zip(host, trace, strict=True):
        assert all(x.device.type == "cpu" for x in call.fields.values() if isinstance(x, Tensor))
        torch.testing.assert_close(call.weights, other.weights.cpu())
        assert call.weights.device.type == "cpu" and call.mask.device.type == "cpu"
        assert call.certificate == other.certificate
    again = host.to("cuda", torch.float16)
    assert again[0].q.is_cuda and again[0].q.dtype == torch.float16 and again[0].mask.dtype == torch.bool


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_in_a_file_is_read_when_it_is_asked_for(inputs: Tensor, tmp_path: Path, compact: bool) -> None:
    trace = hookattn.trace(model(), inputs)
    lazy = hookattn.load(trace.save(tmp_path / "t.safetensors", compact=compact)).to(torch.float16)
    assert not any(isinstance(x, Tensor) for c in lazy for x in c.fields.values())
    for one, other in zip(lazy, trace.to(torch.float16), strict=True):
        for name in ("q", "k", "v", "scores", "mask", "weights", "output"):
            assert torch.equal(one.get(name), other.get(name)), name  # type: ignore[arg-type]
            assert one.get(name).dtype == (torch.bool if name == "mask" else torch.float16)  # type: ignore[union-attr]
        part, whole = one.at(heads=1, queries=[0, 3], batch=1), other.at(heads=1, queries=[0, 3], batch=1)
        assert torch.equal(part.weights, whole.weights) and part.weights.shape == (1, 1, 2, 5)
        assert torch.equal(part.scores, whole.scores)
    again = hookattn.load(lazy.save(tmp_path / "u.safetensors"))
    assert torch.equal(again[1].weights, lazy[1].weights) and again.selection["dtype"] == "float16"
    assert again[1].certificate == trace[1].certificate
    assert torch.equal(pickle.loads(pickle.dumps(lazy))[0].weights, lazy[0].weights)


def test_a_selection_of_heads_and_queries(inputs: Tensor, tmp_path: Path) -> None:
    trace = hookattn.trace(model(), inputs, heads=[1], queries=[1, 4])
    lazy = hookattn.load(trace.save(tmp_path / "t.safetensors", compact=True)).to(torch.bfloat16)
    for made in (lazy, trace.to(torch.bfloat16)):
        part = made[0].at(queries=4)
        assert torch.equal(part.weights, trace[0].weights[:, :, 1:].bfloat16()) and made[0].heads == (1,)


def test_what_a_file_holds_for_nobody_to_write_to(inputs: Tensor, tmp_path: Path) -> None:
    """What was derived of a file is held for the next reader, who gets it as it is."""
    lazy = hookattn.load(hookattn.trace(model(), inputs).save(tmp_path / "t.safetensors", compact=True)).to("cpu")
    wide = lazy.to(torch.float32)
    before = wide[0].weights.clone()
    wide[0].weights.zero_()
    assert torch.equal(lazy[0].weights, before)


def test_the_keys_of_a_generation_stay_one_history(tmp_path: Path) -> None:
    gpt2 = tiny_models.gpt2()
    with hookattn.tracing(gpt2) as trace, torch.no_grad():
        gpt2.generate(tiny_models.ids()[:1], max_new_tokens=4, do_sample=False)
    assert any(isinstance(c.fields["k"], Continued) for c in trace)
    narrow = trace.to(torch.float16)
    path = trace.save(tmp_path / "t.safetensors")
    for made in (narrow, hookattn.load(path).to(torch.float16)):
        for one, other in zip(made, trace, strict=True):
            place, whole = one.fields["k"], other.fields["k"]
            assert isinstance(place, Continued) == isinstance(whole, Continued)
            assert torch.equal(one.k, other.k.half()) and torch.equal(one.v, other.v.half())
        histories = {id(c.fields["k"].history) for c in made if isinstance(c.fields["k"], Continued)}  # type: ignore[union-attr]
        assert len(histories) == len({id(c.fields["k"].history) for c in trace if isinstance(c.fields["k"], Continued)})  # type: ignore[union-attr]
        saved = hookattn.load(made.save(tmp_path / "u.safetensors"))
        assert torch.equal(saved[-1].k, trace[-1].k.half())


def test_statistics_scale_edits_and_gradients(inputs: Tensor) -> None:
    counted = hookattn.trace(model(), inputs, capture=("entropy", "top_k")).to(torch.float16)
    kinds = {name: counted[0].get(name).dtype for name in counted[0].captured}  # type: ignore[union-attr]
    assert set(kinds.values()) == {torch.float16, torch.int64}, "what counts stays a whole number"
    edited = hookattn.edited(model(), inputs, edit.zero("weights", heads=[1]))
    moved, narrow = edited.to("cpu"), edited.to(torch.float16)
    for made in (moved, narrow):
        assert [c.edits for c in made] == [c.edits for c in edited]
        torch.testing.assert_close(made[0].weights.float(), edited[0].weights, atol=1e-3, rtol=0)
        assert not made[0].weights[:, 1].any()
    with torch.enable_grad():
        trace = hookattn.trace(model(), inputs, gradients=True)
        narrow = trace.to(torch.float64)
        trace.output.sum().backward()
    assert narrow[0].grad("output").dtype == torch.float64, "one that came after that"
    torch.testing.assert_close(narrow[0].grad("output"), trace[0].grad("output").double())


def test_an_attached_trace_stays_in_its_graph(inputs: Tensor) -> None:
    net = model()
    trace = hookattn.trace(net, inputs, attached=True)
    trace.to(torch.float64)[0].weights.square().sum().backward()
    assert net[0].qkv.weight.grad is not None and net[0].qkv.weight.grad.abs().sum() > 0  # type: ignore[index, union-attr]


def test_copies_and_subclasses(inputs: Tensor) -> None:
    class Named(hookattn.Trace):
        pass

    trace = Named(**vars(hookattn.trace(model(), inputs)))
    made = trace.to(torch.float16)
    assert type(made) is Named and torch.equal(copy.deepcopy(made)[0].weights, made[0].weights)


def test_what_is_no_device_and_no_dtype(inputs: Tensor) -> None:
    trace = hookattn.trace(model(), inputs)
    for wrong in ({}, {"device": "meta"}, {"device": "nonsense"}, {"dtype": torch.int8}, {"device": torch.int64}):
        with pytest.raises(SelectionError):
            trace.to(**wrong)
    with pytest.raises(SelectionError, match="one dtype"):
        trace.to(torch.float16, torch.float32)
