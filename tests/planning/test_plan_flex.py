"""Plans of flex_attention, which takes no tensors without values: nothing of it runs, and score_mods are understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

import hookattn
from tests import tiny_models as tiny
from tests.planning.test_plan import check
from tests.taps import test_flex as flex

LEARNED = torch.linspace(-1, 1, 4)


def distorted(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * score


def far_apart(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.where(q_idx - kv_idx < 30, score, -float("inf"))


class Attends(nn.Module):
    """Grouped heads, if asked for; what else the kernel returns is used."""

    def __init__(self, groups: int = 4, learned: bool = False, **given: Any) -> None:
        super().__init__()
        self.groups, self.given = groups, given
        self.qkv = nn.Linear(32, 32 + 16 * groups)
        self.bias = nn.Parameter(LEARNED.clone()) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([32, 8 * self.groups, 8 * self.groups], -1)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v))
        given = self.given
        if self.bias is not None:
            bias = self.bias
            given = {**given, "score_mod": lambda score, b, h, q_idx, kv_idx: score + bias[h] * (q_idx - kv_idx)}
        out: Any = flex_attention(q, k, v, enable_gqa=self.groups < 4, **given)
        if isinstance(out, tuple):
            lse = out[1] if isinstance(out[1], Tensor) else out[1].lse
            out = out[0] * lse.sigmoid()[..., None].to(out[0].dtype)
        return out.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


CASES: dict[str, Callable[[], nn.Module]] = {
    "plain": Attends,
    "grouped": lambda: Attends(2),
    "its log-sum-exp": lambda: Attends(return_lse=True),
    "more of it": lambda: Attends(return_aux=AuxRequest(lse=True)),
    "a bias": lambda: Attends(score_mod=flex.add_alibi),
    "a bias for all heads": lambda: Attends(score_mod=flex.add_distance),
    "a learned bias": lambda: Attends(learned=True),
    "a soft-cap": lambda: Attends(score_mod=flex.softcap_then_alibi),
    "a mask in the score": lambda: Attends(score_mod=flex.causal_in_the_score),
    "a window in the score": lambda: Attends(score_mod=far_apart),
    "nothing": lambda: Attends(score_mod=flex.unchanged),
    "neither bias nor soft-cap": lambda: Attends(score_mod=distorted),
    "blocks": lambda: Attends(block_mask=flex.blocks(flex.causal_mod, 40, 40)),
    "blocks and a score_mod": lambda: Attends(
        2, score_mod=flex.add_alibi, block_mask=flex.blocks(flex.window_mod, 40, 40)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_trace(name: str) -> None:
    model, x = CASES[name](), torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        check(model, x)
        check(model, x, capture=("q", "entropy", "received"))


def test_none_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention_hop", never)
    with torch.no_grad():
        assert len(hookattn.plan(Attends(score_mod=flex.add_alibi), torch.zeros(1, 5000, 32)).calls) == 1
        model = tiny.llama("flex_attention")
        (told, sdpa) = (hookattn.plan(m, tiny.ids(9)) for m in (model, tiny.llama()))
    assert [call.site.path for call in told.calls] == [call.site.path for call in sdpa.calls]
    assert told.total >= sdpa.total  # its mask is there for each batch entry
