"""A trace that has no room says so at its first large call, and what would fit; one that has is left alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.errors import TraceTooLargeError, TraceTooLargeWarning
from hookattn.planning import plan
from hookattn.planning import room as room_module
from hookattn.recording import room_check
from hookattn.testing import check_clean
from hookattn.testing.case import same, tensors
from hookattn.testing.clean import state_of
from tests import tiny_models as tiny
from tests.routed import Routed
from tests.zoo import CASES

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("error::hookattn.errors.TraceTooLargeWarning")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how many bytes are free, and makes every call a large one."""
    monkeypatch.setattr(room_check, "LARGE", 0)

    def give(memory: int, disk: int = 1 << 60) -> None:
        for module in (room_module, plan):
            monkeypatch.setattr(module, "free_memory", lambda device: memory)
            monkeypatch.setattr(module, "free_disk", lambda path: disk)

    return give


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was planned while a forward ran."""
    made: list[Any] = []
    calls_on_shapes = plan.calls_on_shapes

    def counted(*given: Any) -> Any:
        made.append(calls_on_shapes(*given))
        return made[-1]

    for module in (plan, room_module):  # both know it by name
        monkeypatch.setattr(module, "calls_on_shapes", counted)
    return made


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("generic", [False, True])
def test_to_the_byte(room: Any, planned: list[Any], how: str, generic: bool) -> None:
    model, ran = tiny.gpt2(how, n_layer=4), []
    for block in model.transformer.h:
        block.mlp.register_forward_hook(lambda *_: ran.append(1))
    with hookattn.models.registry.using() if generic else warnings.catch_warnings():
        total = hookattn.plan(model, tiny.ids(64)).total
        before, seen = state_of(model), len(planned)
        room(total)
        assert len(hookattn.trace(model, tiny.ids(64))) == 4
        ran.clear()
        room(total - 1)
        with pytest.raises(TraceTooLargeError) as caught:
            hookattn.trace(model, tiny.ids(64))
        assert len(planned) > seen
    message = str(caught.value)
    assert "the trace does not fit: " in message and "of its 4 calls, transformer.h.0.attn alone takes" in message
    # Of a fused kernel nothing of the size T·S is held, so that a file and another dtype, which take it, help little.
    formed = ('to="run.safetensors"', "capture=('q', 'k'", "dtype=torch.float16") if how == "eager" else ()
    for way in (*formed, "queries=slice(-1, None)"):
        assert way in message
    assert not ran  # the first layer was not over
    assert state_of(model) == before
    check_clean(model)


def test_what_is_said_to_fit_fits(room: Any) -> None:
    model, lean = tiny.gpt2("eager", n_layer=4), ("q", "k", "v", "bias", "mask", "sinks", "output")
    room(hookattn.plan(model, tiny.ids(64), capture=lean).total)
    with pytest.raises(TraceTooLargeError, match=r"capture=\('q', 'k', 'v', 'bias', 'mask', 'sinks', 'output'\) \(sco"):
        hookattn.trace(model, tiny.ids(64))
    assert len(hookattn.trace(model, tiny.ids(64), capture=lean)) == 4
    assert len(hookattn.trace(model, tiny.ids(64), queries=slice(-1, None))) == 4


def test_a_file(room: Any, tmp_path: Path) -> None:
    model, path = tiny.gpt2(n_layer=6), tmp_path / "t.safetensors"
    told = hookattn.plan(model, tiny.ids(64), to=path)
    largest = max(call.total for call in told.calls)
    room(largest, told.total)
    assert len(hookattn.trace(model, tiny.ids(64), to=path)) == 6
    path.unlink()
    for memory, disk in ((largest, told.total - 1), (largest - 1, told.total)):
        room(memory, disk)
        with pytest.raises(TraceTooLargeError, match="free disk"):
            hookattn.trace(model, tiny.ids(64), to=path)
        assert os.listdir(tmp_path) == []
        check_clean(model)


def test_layers_that_differ_are_not_taken_for_alike(room: Any, planned: list[Any]) -> None:
    """All of T5's attention is of one class; most of it is far smaller than the encoder's."""
    model, inputs = tiny.t5(), {"input_ids": tiny.ids(64), "decoder_input_ids": tiny.ids(2)}
    told = hookattn.plan(model, inputs)
    assert told.total < len(told.calls) * told.calls[0].total
    planned.clear()
    room(told.total)
    with hookattn.tracing(model) as trace:
        for _ in range(3):
            model(**inputs)
    assert len(trace) == 3 * len(told.calls) and len(planned) == 1  # and remembered


def test_a_generation_that_outgrows_the_memory(room: Any) -> None:
    model, path = tiny.gpt2(n_layer=4), "transformer.h.0.attn"
    room(1 << 40)
    with pytest.raises(TraceTooLargeError, match=path), hookattn.tracing(model) as trace:
        model(tiny.ids(16))
        assert len(trace) == 4
        room(1000)
        model(tiny.ids(16))
    check_clean(model)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama, tiny.bert, tiny.t5])
def test_a_plan_in_the_middle_of_a_forward_changes_nothing(room: Any, planned: list[Any], make: Any) -> None:
    # Padding, so that layers have a mask in common: what one call takes tells too much for all.
    padding = (torch.arange(24) > 2).long().expand(2, 24)
    model, inputs = make().train(), {"input_ids": tiny.ids(24), "attention_mask": padding}
    if make is tiny.t5:
        inputs["decoder_input_ids"] = tiny.ids(24)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    total = hookattn.plan(model, inputs).total
    planned.clear()
    torch.manual_seed(3)
    plain = list(tensors(model(**inputs)))
    after = torch.get_rng_state()
    room(total)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hookattn.UnfaithfulWarning)
        trace = hookattn.trace(model, inputs)
    assert planned and all(same(a, b) for a, b in zip(plain, tensors(trace.output), strict=True))
    assert torch.equal(after, torch.get_rng_state())
    check_clean(model)


def test_what_cannot_be_planned_is_warned_of(room: Any) -> None:
    model, x = Routed().eval(), torch.randn(1, 8, 16)
    room(100)
    with pytest.warns(TraceTooLargeWarning, match=r"maybe the trace does not fit: .* of 100 B of free memory; .*mha"):
        assert len(hookattn.trace(model, x)) == 1
    plain = tiny.gpt2()
    with pytest.warns(TraceTooLargeWarning), hookattn.tracing(plain) as trace:
        plain.forward(tiny.ids())  # nobody knows with what
    assert len(trace) == 2


def test_small_calls_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "free_memory", lambda device: pytest.fail("asked"))
    assert len(hookattn.trace(tiny.gpt2(), tiny.ids(64))) == 2


OPTIONS: list[dict[str, Any]] = [{}, {"capture": ("q", "entropy", "top_k", "received", "first_mass", "mean_distance")}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_bound_is_one(monkeypatch: pytest.MonkeyPatch, case: Any, options: dict[str, Any]) -> None:
    """In float64, which is the widest, no call keeps more than is allowed for it."""
    most: dict[int, int] = {}
    monkeypatch.setattr(room_check, "LARGE", 0)

    def check(self: room_module.RoomGuard, forward: Any, call: Any, site: Any) -> None:
        most[len(most)] = self.upper_bound(call)  # asked once for each call, in their order

    monkeypatch.setattr(room_module.RoomGuard, "check", check)
    inputs = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.inputs()]
    trace = hookattn.trace(case.model().double(), tuple(inputs), verify="off", **options)
    assert len(most) == len(trace) > 0
    for i, call in enumerate(trace):
        assert sum(x.nbytes for n in call.fields if (x := call.get(n)) is not None) <= most[i]
