"""The look-up of an attention implementation in transformers, by method and, as it was before 5.1, by item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.testing import check_clean

pytest.importorskip("transformers")

from transformers import masking_utils, modeling_utils

from tests.reference import reference_attention

KNOWN = modeling_utils.ALL_ATTENTION_FUNCTIONS


class Takes(nn.Module):
    """Attention that takes its implementation as models did before 5.1."""

    def __init__(self, implementation: str):
        super().__init__()
        self.implementation = implementation
        self.qkv = nn.Linear(16, 48)
        nn.init.normal_(self.qkv.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mask = None if self.implementation == "sdpa" else torch.ones(x.shape[1], x.shape[1]).tril().bool()[None, None]
        out: Tensor = KNOWN[self.implementation](self, q, k, v, mask, scaling=0.4, dropout=0.0, is_causal=True)[0]
        return out.flatten(2)


def unseen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
    """Attention of which no operation can be watched."""
    with torch._C.DisableTorchFunction():
        scores = (q @ k.mT * given["scaling"]).masked_fill(~mask, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2), None


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interface as it was."""
    monkeypatch.delattr(modeling_utils.AttentionInterface, "get_interface", raising=False)
    monkeypatch.setattr("hookattn.taps._found", (0, None, ()))
    monkeypatch.setitem(modeling_utils.AttentionInterface._global_mapping, "unseen", unseen)
    yield
    monkeypatch.undo()
    monkeypatch.setattr("hookattn.taps._found", (0, None, ()))


@pytest.mark.parametrize(("implementation", "tap"), [("sdpa", "sdpa"), ("unseen", "interface:unseen")])
def test_an_item_that_is_taken(before: None, implementation: str, tap: str) -> None:
    model, x = Takes(implementation), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(x)
        (call,) = trace = hookattn.trace(model, x, verify="full")
    assert torch.equal(plain, trace.output) and call.tap == tap and call.certificate.faithful
    _, weights, _ = reference_attention(call.q, call.k, call.v, scale=0.4, mask=torch.ones(5, 5).tril().bool())
    torch.testing.assert_close(call.weights.double(), weights, atol=1e-6, rtol=0)
    check_clean(model)


def test_other_mappings_and_other_threads_get_what_is_there(before: None) -> None:
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    own = masks["sdpa"], KNOWN["sdpa"]
    with pytest.raises(hookattn.NoAttentionError), hookattn.tracing(Takes("sdpa")):
        assert masks["sdpa"] is own[0] and KNOWN["sdpa"] is not own[1]
        with pytest.raises(KeyError):
            KNOWN["no such thing"]
    assert KNOWN["sdpa"] is own[1]
