"""A wrapped model is traced as the model is: equal fields, its own paths, classes and configuration."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hookattn
from hookattn import edit
from hookattn.testing import check_clean
from tests import tiny_models as tiny
from tests.distributed.wrapping import ACCELERATED, WRAPPED, ddp, fsdp2

FIELDS = ("q", "k", "v", "bias", "scores", "mask", "sinks", "weights", "output")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, which data parallelism and sharding ask for."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def inputs() -> dict[str, Tensor]:
    return {"input_ids": tiny.ids()}


def traced(model: Any, **options: Any) -> hookattn.Trace:
    with torch.no_grad():
        return hookattn.trace(model, inputs(), **options)


def assert_same_calls(got: hookattn.Trace, expected: hookattn.Trace) -> None:
    """Bit for bit, and at the same places."""
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.site == b.site
        assert (a.step, a.entry, a.tap, a.basis) == (b.step, b.entry, b.tap, b.basis)
        assert (a.certificate.status, b.certificate.status) == ("faithful", "faithful")
        for name in FIELDS:
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None), name
            assert x is None or torch.equal(x, y), name


def own(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "wrapped_by"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_trace_is_that_of_the_model(name: str, implementation: str) -> None:
    wrap, wrappers = WRAPPED[name]
    expected, model = traced(tiny.llama(implementation)), wrap(tiny.llama(implementation))
    got = traced(model)
    assert_same_calls(got, expected)
    assert got.model["wrapped_by"] == wrappers
    assert own(dict(got.model)) == dict(expected.model)
    assert "wrapped_by" not in expected.model
    check_clean(model)
    assert_same_calls(traced(model), expected)  # what was found is remembered


@pytest.mark.parametrize("name", WRAPPED)
def test_without_an_adapter(name: str) -> None:
    """The model is watched as a whole then, and sites are told by their paths."""
    from hookattn.models.registry import using

    with using():
        assert_same_calls(traced(WRAPPED[name][0](tiny.llama("eager"))), traced(tiny.llama("eager")))


@pytest.mark.parametrize("name", WRAPPED)
def test_the_plan_is_that_of_the_model(name: str) -> None:
    """Before the first forward, which is when most of what wraps a model is made ready, and after it."""
    expected = hookattn.plan(tiny.llama(), inputs())
    model = WRAPPED[name][0](tiny.llama())
    assert_same_plan(hookattn.plan(model, inputs()), expected)
    traced(model)
    assert_same_plan(hookattn.plan(model, inputs()), expected)
    check_clean(model)


def assert_same_plan(got: hookattn.MemoryPlan, expected: hookattn.MemoryPlan) -> None:
    assert [(c.site, c.shapes, c.bytes) for c in got.calls] == [(c.site, c.shapes, c.bytes) for c in expected.calls]
    assert (got.total, got.notes, got.skipped) == (expected.total, expected.notes, expected.skipped)


@pytest.mark.parametrize("name", ["DDP of compiled", "compiled layers", "FSDP2 of attention", "engine"])
def test_analyses_line_up_with_the_unwrapped_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    from hookattn.analyze import compare
    from hookattn.interop.transformer_lens import find

    plain, wrapped = traced(tiny.llama()), traced(WRAPPED[name][0](tiny.llama()))
    assert float(compare(plain, wrapped)["total_variation"].max()) == 0
    hook = "blocks.1.attn.hook_pattern"
    assert torch.equal(find(plain, hook), find(wrapped, hook))
    wrapped.save(tmp_path / "run.safetensors")
    loaded = hookattn.load(tmp_path / "run.safetensors")
    assert_same_calls(loaded, plain)
    assert (loaded.model["class"], loaded.model["wrapped_by"]) == ("LlamaForCausalLM", WRAPPED[name][1])


def test_a_path_may_be_spelled_as_the_wrapped_model_spells_it() -> None:
    model = ddp(tiny.llama("eager"))
    (path,) = (p for p, m in model.named_modules() if p.endswith("layers.1.self_attn"))
    assert path.startswith("module.")
    trace = traced(model, layout={path: "BHTD", "module.model.layers.0.*": "BHTD"})
    assert trace[path] is trace["model.layers.1.self_attn"] is trace[1]
    assert trace.select(path=path).calls == [trace[1]]
    with torch.no_grad():
        edited = hookattn.edited(model, inputs(), edit.zero("weights", path=path, heads=[1]))
    assert [bool(c.edits) for c in edited] == [False, True]
    for wrong in ("module.model.layers.7.self_attn", "mod.model.layers.1.self_attn"):
        with pytest.raises(hookattn.SelectionError, match=wrong):
            traced(model, layout={wrong: "BHTD"})
        with pytest.raises(hookattn.SelectionError, match=wrong):
            trace[wrong]


class Attends(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        for name in names:
            self.add_module(name, nn.MultiheadAttention(16, 2, batch_first=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0]
        for name in self.names:
            x = self.get_submodule(name)(x, x, x)[0]
        return x


class Named(Attends):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class WithWeights(Attends):
    def __init__(self) -> None:
        super().__init__("module")
        self.weight = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize(
    ("model", "paths"),
    [
        (Attends("model"), ["model"]),  # the name says something
        (Attends("module", "other"), ["module", "other"]),  # it holds more
        (Named("module"), ["module"]),  # it knows its arguments
        (WithWeights(), ["module"]),  # it has a part in what is computed
        (nn.Sequential(Attends("module")), ["0.module"]),  # it is not around the model
    ],
    ids=["another name", "two", "named arguments", "weights", "inside"],
)
def test_what_only_looks_like_a_wrapper_stays(model: nn.Module, paths: list[str]) -> None:
    trace = hookattn.trace(model.eval(), torch.randn(2, 5, 16))
    assert [call.site.path for call in trace] == paths
    assert "wrapped_by" not in trace.model
    assert trace[paths[0]] is trace[0]


class Abstract(Named, ABC):
    """Its metaclass has a say in what a class that is made of it looks like."""


def test_a_sharded_class_with_a_metaclass() -> None:
    from torch.distributed.fsdp import fully_shard

    expected = hookattn.trace(Abstract("first").eval(), torch.ones(2, 5, 16))
    model = fully_shard(Abstract("first").eval())
    got = hookattn.trace(model, torch.ones(2, 5, 16))
    assert_same_calls(got, expected)
    assert dict(got.model) == {**expected.model, "wrapped_by": ["FSDPModule"]}
    assert_same_plan(hookattn.plan(model, torch.ones(2, 5, 16)), hookattn.plan(Abstract("first"), torch.ones(2, 5, 16)))


def test_steps_of_a_wrapped_model_and_of_what_it_holds() -> None:
    model = tiny.llama()
    wrapped = ddp(model)
    with torch.no_grad(), hookattn.tracing(wrapped) as trace:
        wrapped(**inputs())
        model(**inputs())
        model.model(**inputs())
        model.generate(**inputs(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert [call.step for call in trace] == [i for i in range(5) for _ in range(2)]
    assert [call.entry for call in trace][::2] == ["", "", "model", "", ""]


def test_modules_that_are_shared_or_known_elsewhere_are_copied_once_for_a_plan() -> None:
    model = tiny.llama()
    model.shortcut = [model.model.layers[1]]  # no child of it
    wrapped = fsdp2(model)
    assert_same_plan(hookattn.plan(wrapped, inputs()), hookattn.plan(tiny.llama(), inputs()))


def test_what_hooks_would_have_brought_is_said_where_a_plan_misses_it() -> None:
    """Weights that a library takes apart in its own way, and puts together in hooks."""
    model = tiny.llama()
    for p in model.parameters():
        p.data = torch.empty(0)
    with pytest.raises(hookattn.ModelError, match=r"LlamaForCausalLM cannot be planned.*Engine"):
        hookattn.plan(WRAPPED["engine"][0](model), inputs())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ACCELERATED)
def test_accelerate(name: str, implementation: str) -> None:
    pytest.importorskip("accelerate")
    plain, model = tiny.llama(implementation), ACCELERATED[name](tiny.llama(implementation))
    expected, planned = traced(plain), hookattn.plan(plain, inputs())
    assert_same_plan(hookattn.plan(model, inputs()), planned)
    got = traced(model)
    assert_same_calls(got, expected)
    assert dict(got.model) == dict(expected.model)
    assert_same_plan(hookattn.plan(model, inputs()), planned)
    assert_same_calls(traced(model), expected)


def test_accelerate_in_bfloat16() -> None:
    pytest.importorskip("accelerate")
    plain, model = tiny.llama(), ACCELERATED["prepare"](tiny.llama())
    from tests.distributed.wrapping import prepared

    model = prepared(tiny.llama(), "bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = hookattn.trace(plain, inputs())
        planned = hookattn.plan(plain, inputs())
    got = traced(model)
    assert {call.dtype for call in got} == {torch.bfloat16}
    assert_same_calls(got, expected)
    assert_same_plan(hookattn.plan(model, inputs()), planned)
