"""Models of transformers that its own plans have cut, and the whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import hookattn
from hookattn import Shard
from tests.ranks import run_ranks
from tests.sharding.test_heads import held_against

IDS = torch.arange(8).unsqueeze(0) * 3 % 50


def saved(folder: Path, family: str, heads: int = 4, groups: int = 2) -> Path:
    """A small model with random weights, in a folder of its own."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": groups},
    }
    if family == "Mixtral":
        sizes |= {"num_local_experts": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder / family)
    return folder / family


def cut(rank: int, folder: Path, eager: bool, planned: bool) -> dict[str, Any]:
    """A model that each process has a part of, held against the whole one."""
    from transformers import AutoModelForCausalLM

    kernel = "eager" if eager else "sdpa"
    with torch.no_grad():
        whole = hookattn.trace(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel), IDS)
        if planned:
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel, tp_plan="auto")
        else:
            model = _by_hand(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel))
        assert any(isinstance(x, DTensor) for x in model.parameters())
        trace = hookattn.trace(model, IDS)
        for call, of in zip(trace, whole, strict=True):
            held_against(call, of)
        one = hookattn.trace(model, IDS, heads=[3], layers=[-1])
        for call in one:
            held_against(call, whole[-1])
    return {
        "heads": [call.heads for call in trace],
        "shards": {call.shards for call in trace},
        "paths": [call.site.path for call in trace],
        "notes": {note for call in trace for note in call.notes} | set(trace.notes),
        "statuses": {call.certificate.status for call in trace},
        "one": [call.heads for call in one],
    }


def _by_hand(model: Any) -> Any:
    import torch.distributed as dist

    from tests.sharding.models import by_columns, mesh

    along = mesh(tp=dist.get_world_size())
    for layer in model.model.layers:
        by_columns(layer.self_attn, along, "q_proj", "k_proj", "v_proj", out="o_proj")
    return model


def check(said: list[dict[str, Any]], groups: int) -> None:
    n = len(said)
    for rank, one in enumerate(said):
        per = 4 // n
        assert one["heads"] == [tuple(range(rank * per, (rank + 1) * per))] * 2
        assert one["shards"] == {(Shard("H", rank * per, 4, rank * groups // n, groups, "tp", rank, n),)}
        assert one["statuses"] == {"faithful"} and not one["notes"] - {_NONE.format(rank * per)}
        assert one["one"] == ([(3,)] if rank == n - 1 else [])


_NONE = "of heads=[3] this process has none at some sites, and keeps no call of these (it has heads from {} of 4)"


def several(rank: int, ways: list[tuple[Path, bool, bool]]) -> list[dict[str, Any]]:
    """In one pair of processes, as each takes its time to import what it needs."""
    return [cut(rank, *way) for way in ways]


def test_models_that_their_plan_or_torch_has_cut(tmp_path: Path) -> None:
    folder = saved(tmp_path, "Llama")
    said = run_ranks(2, several, [(folder, False, True), (folder, True, True), (folder, False, False)])
    for of_each in zip(*said, strict=True):
        check(list(of_each), 2)


FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Phi", "Mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_families(tmp_path: Path, count: int) -> None:
    folders = [saved(tmp_path, family, groups=4) for family in FAMILIES]
    ways = [(folder, eager, True) for folder in folders for eager in (False, True)]
    for of_each in zip(*run_ranks(count, several, ways, limit=300), strict=True):
        check(list(of_each), 4)


@pytest.mark.slow
def test_a_plan_that_puts_heads_together_again(tmp_path: Path) -> None:
    """Its queries are normed over all heads, so that each process has them all."""
    for said in run_ranks(2, cut, saved(tmp_path, "Olmo2"), False, True):
        assert said["heads"] == [None, None] and said["shards"] == {()} and not said["notes"]
