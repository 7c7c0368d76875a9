"""Parameters that two ranks share: the trace is that of the whole model, and a plan has the sizes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import edit
from tests import tiny_models as tiny
from tests.distributed.wrapping import checkpointed_layers, ddp, fsdp1, fsdp2
from tests.ranks import run_ranks


def model() -> Any:
    return tiny.llama(attention_dropout=0.0)


def inputs() -> dict[str, Tensor]:
    return {"input_ids": tiny.ids()}


def mesh(**axes: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def in_parallel(model: Any, over: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj")
        styles = {name: ColwiseParallel() for name in columns}
        styles |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, over, styles)
    return model


def in_parallel_and_sharded(model: Any) -> Any:
    both = mesh(data=1, tensor=2)
    return fsdp2(in_parallel(model, both["tensor"]), mesh=both["data"])


def composably_checkpointed(model: Any) -> Any:
    from torch.distributed._composable import checkpoint

    for layer in model.model.layers:
        checkpoint(layer)
    return model


SHARDED: dict[str, Callable[[Any], nn.Module]] = {
    "DDP": ddp,
    "FSDP1": fsdp1,
    "FSDP1, own parameters": lambda m: fsdp1(m, use_orig_params=True),
    "FSDP2": fsdp2,
    "FSDP2 of attention": lambda m: fsdp2(m, "self_attn"),
    "FSDP2, replicated": lambda m: fsdp2(m, mesh=mesh(replicas=2, shards=1)),
}
HALVED: dict[str, Callable[[Any], nn.Module]] = {
    "tensor parallel": lambda m: in_parallel(m, mesh(tensor=2)),
    "tensor parallel and FSDP2": in_parallel_and_sharded,
}
CHECKPOINTED: dict[str, Callable[[Any], nn.Module]] = {
    "FSDP2 of wrapped checkpoints": lambda m: fsdp2(checkpointed_layers(m)),
    "FSDP2 of composable checkpoints": lambda m: fsdp2(composably_checkpointed(m)),
}


def planned(plan: hookattn.MemoryPlan) -> list[Any]:
    return [plan.total, [(call.site, call.shapes) for call in plan.calls], plan.notes, plan.skipped]


def traced(trace: hookattn.Trace) -> list[Any]:
    names = ("q", "k", "v", "scores", "mask", "weights", "output")
    return [
        (call.site, call.certificate.status, {name: getattr(call, name).detach().clone() for name in names})
        for call in trace
    ]


def gradients(model: nn.Module, after: bool) -> dict[str, Tensor]:
    """Of an edited run, put together of all ranks; the backward pass is in the traced block, or after it."""
    with hookattn.editing(model.train(), edit.zero("weights", layer=1, heads=[1]), edit.scale("q", 2.0, layer=0)):
        loss = model(**inputs()).logits.square().mean()
        if not after:
            loss.backward()
    if after:
        loss.backward()
    grads = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)().clone() for name, grad in grads.items()}  # type: ignore[misc]


def every_case(rank: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    with torch.no_grad():
        for name, shard in (SHARDED | HALVED | CHECKPOINTED).items():
            sharded = shard(model())
            before = planned(hookattn.plan(sharded, inputs()))
            trace = hookattn.trace(sharded, inputs())
            said[name] = before, planned(hookattn.plan(sharded, inputs())), traced(trace), dict(trace.model)
    for name, shard in CHECKPOINTED.items():
        said[f"{name}: gradients"] = [gradients(shard(model()), after) for after in (False, True)]
    return said


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each rank says of each case: one group runs all of them."""
    return run_ranks(2, every_case, limit=180)


@pytest.mark.parametrize("name", SHARDED | CHECKPOINTED)
def test_what_is_put_together_is_as_if_it_never_was_apart(ranks: list[dict[str, Any]], name: str) -> None:
    with torch.no_grad():
        whole = hookattn.trace(model(), inputs())
        plan = planned(hookattn.plan(model(), inputs()))
    for rank in ranks:
        before, after, calls, about = rank[name]
        assert before == after == plan
        assert about.pop("wrapped_by")
        assert about == dict(whole.model)
        assert len(calls) == len(whole) > 0
        for (site, status, fields), call in zip(calls, whole, strict=True):
            assert (site, status) == (call.site, "faithful")
            for field, x in fields.items():
                assert torch.equal(x, getattr(call, field)), field


@pytest.mark.parametrize("name", HALVED)
def test_the_plan_of_one_of_two_tensor_parallel_ranks_is_of_its_heads(ranks: list[dict[str, Any]], name: str) -> None:
    whole = planned(hookattn.plan(model(), inputs()))
    for rank in ranks:
        before, after, calls, _ = rank[name]
        assert before == after
        assert before[0] == whole[0] // 2
        for (site, shapes), (own, _, fields) in zip(before[1], calls, strict=True):
            assert site == own
            assert shapes == {field: tuple(x.shape) for field, x in fields.items()}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradients_of_an_edited_run_that_is_checkpointed_and_sharded(ranks: list[dict[str, Any]], name: str) -> None:
    """What runs again in the backward pass is edited as it was the first time, also where the block has ended."""
    expected = gradients(model(), after=False)
    for rank in ranks:
        for got in rank[f"{name}: gradients"]:
            assert got.keys() == expected.keys()
            for weight, grad in got.items():
                assert float((grad - expected[weight]).abs().max()) <= 1e-6 * max(1.0, float(grad.abs().max())), weight
