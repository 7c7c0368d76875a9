"""Masks with fewer axes than the scores, given to the fused kernel, of which some heads and queries are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from tests.reference import draw

B, H, T, S, D = 2, 3, 4, 5, 8


class Masked(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)


KINDS = {
    "bool": lambda x: x > -0.5,
    "float": lambda x: x,
    "both in one": lambda x: x.masked_fill(x > 0.8, -torch.inf),
}


@pytest.mark.parametrize("options", [{}, {"heads": [2, 0]}, {"queries": [3, 1]}, {"heads": 1, "queries": [2]}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(T, S), (1, S), (T, 1), (H, T, S), (1, T, S), (H, 1, S), (B, 1, T, S)], ids=str)
def test_a_mask_of_any_rank_has_four_axes_in_the_record(
    shape: tuple[int, ...], kind: str, options: dict[str, Any]
) -> None:
    q, k, v = draw(B, H, T, D, seed=1), draw(B, H, S, D, seed=2), draw(B, H, S, D, seed=3)
    mask = KINDS[kind](draw(*shape, seed=4))
    call = hookattn.trace(Masked(), (q, k, v, mask), verify="full", **options)[0]
    scores = q.double() @ k.double().mT * D**-0.5
    whole = mask.expand(B, H, T, S)
    scores = scores.masked_fill(~whole, -torch.inf) if kind == "bool" else scores + whole
    given = options.get("heads", list(range(H)))
    heads, rows = [given] if isinstance(given, int) else given, options.get("queries", list(range(T)))
    expected = scores.softmax(-1).nan_to_num()[:, heads][:, :, rows]
    torch.testing.assert_close(call.weights.double(), expected, rtol=0, atol=1e-6)
    assert call.mask.dim() == 4 and (call.bias is None or call.bias.dim() == 4)
    seen = whole if kind == "bool" else whole > -torch.inf
    assert torch.equal(call.mask.expand(expected.shape), seen[:, heads][:, :, rows])
    assert call.certificate.faithful
