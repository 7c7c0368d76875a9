"""The hook names of transformer-lens, both ways, without it."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import nn

import hookattn
from hookattn.errors import FieldNotCaptured, SelectionError
from hookattn.interop.transformer_lens import Hook, activation, find, hooks, to_transformer_lens
from tests.field.common import drawn, seeded

NAMES = {
    "blocks.0.attn.hook_q": Hook(0, "q"),
    "blocks.11.attn.hook_rot_k": Hook(11, "k", rotated=True),
    "blocks.3.attn.hook_attn_scores": Hook(3, "scores"),
    "encoder_blocks.2.attn.hook_pattern": Hook(2, "weights", "encoder"),
    "decoder_blocks.2.self_attn.hook_z": Hook(2, "output", "decoder"),
    "decoder_blocks.0.cross_attn.hook_v": Hook(0, "v", "decoder", "cross"),
}


def two_layers() -> nn.Module:
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    return drawn(nn.TransformerDecoder(layer, 2))


def trace(**selection: Any) -> hookattn.Trace:
    return hookattn.trace(two_layers(), (seeded(2, 5, 16), seeded(2, 7, 16, seed=1)), **selection)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_and_written(name: str) -> None:
    assert Hook.of(name) == NAMES[name]
    assert Hook.of(name).name == name


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.mlp.hook_post", "blocks.0.attn.hook_result", "blocks.x.attn.hook_q", "attn.hook_q"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SelectionError, match="names no activation"):
        Hook.of(name)


def test_layouts_are_those_of_transformer_lens() -> None:
    calls = trace(queries=slice(1, None)).select(kind="cross")
    shapes = {f: tuple(activation(calls[0], f).shape) for f in ("q", "k", "v", "scores", "weights", "output")}
    assert shapes == {
        "q": (2, 4, 4, 4),
        "k": (2, 7, 4, 4),
        "v": (2, 7, 4, 4),
        "scores": (2, 4, 4, 7),
        "weights": (2, 4, 4, 7),
        "output": (2, 4, 4, 4),
    }


def test_scores_are_minus_infinity_where_masked() -> None:
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    made = hookattn.trace(
        two_layers(), {"tgt": seeded(2, 5, 16), "memory": seeded(2, 7, 16, seed=1), "tgt_mask": causal}
    )
    scores = activation(made.select(kind="self", layer=0)[0], "scores")
    assert torch.equal(scores == -torch.inf, causal.expand_as(scores))


def test_what_the_trace_does_not_tell_has_to_be_said() -> None:
    with pytest.raises(SelectionError, match="rotary"):
        list(hooks(trace().select(kind="cross")))
    assert len(list(hooks(trace(capture=("v", "weights")).select(kind="cross")))) == 4


def test_two_steps_are_not_one_cache() -> None:
    model = two_layers()
    with hookattn.tracing(model) as made:
        for _ in range(2):
            model(seeded(2, 5, 16), seeded(2, 7, 16, seed=1))
    with pytest.raises(SelectionError, match=r"select\(step"):
        list(hooks(made.select(kind="cross"), rotary=False))
    assert len(list(hooks(made.select(kind="cross", step=1), rotary=False))) == 12


def test_a_stack_without_a_name_is_refused() -> None:
    made = trace()
    for call in made:
        object.__setattr__(call.site, "stack", "vision" if call.site.kind == "cross" else "text")
    with pytest.raises(SelectionError, match=r"no name for .*select\(stack"):
        list(hooks(made, rotary=False))


def test_finding_needs_one_call_and_its_field() -> None:
    made = trace(capture=("weights",)).select(kind="cross")
    with pytest.raises(SelectionError, match="0 calls are"):
        find(made, "decoder_blocks.7.cross_attn.hook_pattern")
    assert torch.equal(find(made, "decoder_blocks.1.cross_attn.hook_pattern"), made[1].weights)
    with pytest.raises(FieldNotCaptured, match="capture="):
        find(made, "decoder_blocks.1.cross_attn.hook_z")


def test_its_absence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "transformer_lens":
            raise ModuleNotFoundError(f"No module named {name!r}", name="transformer_lens")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError) as caught:
        to_transformer_lens(trace(), rotary=False)
    assert "hookattn[transformer-lens]" in "".join(caught.value.__notes__)
