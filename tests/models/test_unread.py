"""What is listed as skipped because nothing in it was seen attending, and on whose word it was a site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import Adapter
from hookattn.models.registry import using


class SelfAttention(nn.Module):
    """Has the name of an attention, and computes none."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Mixer(nn.Module):
    """Has no such name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Claims(Adapter):
    """Says that a mixer is a site."""

    name = "claims"
    attention = {"Mixer": "self"}
    covers = (__name__,)


def reasons(model: nn.Module) -> list[tuple[str, str]]:
    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(model, torch.ones(1, 3, 4))
    assert len(trace) == 0
    return [(skipped.path, skipped.reason) for skipped in trace.skipped]


def test_a_module_that_is_named_attention_is_listed_by_its_class() -> None:
    assert reasons(nn.Sequential(SelfAttention())) == [
        ("0", "SelfAttention ran, and no softmax over q·k was seen in it")
    ]


def test_a_module_that_an_adapter_calls_attention_is_listed_with_the_adapter() -> None:
    with using(Claims()):
        ((path, reason),) = reasons(nn.Sequential(Mixer()))
    assert path == "0"
    assert reason.startswith("Mixer ran, and no softmax over q·k was seen in it (it is a site by the word of ")
    assert "the adapter 'claims'" in reason


class AttentionBackbone(nn.Sequential):
    """Named after what it feeds."""


class AttentionPositionEmbedding(Mixer):
    """Likewise."""


def test_what_stands_beside_attention_is_not_listed() -> None:
    model = nn.Sequential(AttentionBackbone(nn.Conv1d(3, 3, 1)), AttentionPositionEmbedding(), SelfAttention())
    assert [path for path, _ in reasons(model)] == ["2"]
