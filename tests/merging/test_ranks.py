"""Ranks of a group trace a model that is cut along a mesh, and what they have written merges into the whole's trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests import tiny_models
from tests.merging.cuts import same_tensor
from tests.ranks import run_ranks


def llama(implementation: str, groups: int) -> Any:
    """With smaller weights than the other tests: sums over ranks round otherwise, and large scores make that larger."""
    model = tiny_models.llama(implementation, num_key_value_heads=groups)
    with torch.no_grad():
        for layer in model.model.layers:
            for x in layer.parameters():
                x.mul_(0.5)
    return model


def write(rank: int, count: int, implementation: str, groups: int, folder: str, options: dict[str, Any]) -> Any:
    """Trace a Llama whose heads are cut, the key heads where there are enough of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("tp",))
    model = llama(implementation, groups)
    for layer in model.model.layers:
        attention = layer.self_attn
        plan: dict[str, Any] = {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
        if groups >= count:
            plan |= {"k_proj": ColwiseParallel(), "v_proj": ColwiseParallel()}
        else:  # each rank makes all key heads, and reads the one of its own heads
            attention.num_key_value_groups = 1
            own = rank * groups // count
            for name in ("k_proj", "v_proj"):
                made = getattr(attention, name)
                d = made.weight.shape[0] // groups
                made.weight = torch.nn.Parameter(made.weight.detach()[own * d : (own + 1) * d])
            shard = hookattn.Shard("H", rank * 4 // count, 4, own, groups, "tp", rank, count)
            options = {**options, "shard": {"*.self_attn": shard}}
            attention.num_key_value_groups = 4 // count
        parallelize_module(attention, mesh, plan)
    with torch.no_grad():
        trace = hookattn.trace(model, {"input_ids": tiny_models.ids()}, to=f"{folder}/run.safetensors", **options)
    return trace.path, [call.heads for call in trace]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("count", "groups"), [(2, 2), (2, 4), (4, 2), (4, 1), (2, 1)])
def test_tensor_parallel(implementation: str, count: int, groups: int, tmp_path: Path) -> None:
    said = run_ranks(count, write, count, implementation, groups, str(tmp_path), {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"run.rank{i:02d}-of-{count:02d}.safetensors" for i in range(count)]
    whole = hookattn.merge([path for path, _ in said[::-1]])
    with torch.no_grad():
        expected = hookattn.trace(llama(implementation, groups), {"input_ids": tiny_models.ids()})
    assert len(whole) == len(expected) == 2
    saved = hookattn.load(whole.save(tmp_path / "run.safetensors"))
    for found in (whole, saved):
        for one, other in zip(found, expected, strict=True):
            assert one.site == other.site and one.heads is None and one.shards == () and one.kv_heads == other.kv_heads
            assert one.certificate.status == other.certificate.status == "faithful"
            assert (one.derivable, one.basis, [*one.fields]) == (other.derivable, other.basis, [*other.fields])
            for name in ("q", "k", "v", "scores", "weights", "output", "mask"):
                same_tensor(one.get(name), other.get(name))  # type: ignore[arg-type]
    with pytest.raises(hookattn.MergeError, match=f"rank 1 of {count} is missing: run.rank01-of-{count:02d}"):
        hookattn.merge([path for i, (path, _) in enumerate(said) if i != 1])


def test_a_selected_head_is_where_it_is(tmp_path: Path) -> None:
    said = run_ranks(2, write, 2, "sdpa", 2, str(tmp_path), {"heads": [3]})
    whole = hookattn.merge([path for path, _ in said])
    with torch.no_grad():
        expected = hookattn.trace(llama("sdpa", 2), {"input_ids": tiny_models.ids()}, heads=[3])
    for one, other in zip(whole, expected, strict=True):
        assert one.heads == other.heads == (3,)
        for name in ("q", "k", "v", "weights", "output"):
            same_tensor(one.get(name), other.get(name))  # type: ignore[arg-type]
