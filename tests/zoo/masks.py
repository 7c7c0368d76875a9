"""Every way to forbid: fills, assignments, views, additions, out of place and in place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import causal, draw, heads
from tests.zoo.base import CROSS, SELF, B, D, E, Entry, Expected, H, S, T, zoo


class Projections(Entry):
    """Self-attention whose subclasses only say how the scores are masked."""

    out = "o_proj"

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(E, E) for _ in range(4))

    def allowed(self) -> Tensor:
        return causal(T)

    def masked(self, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).view(B, T, H, D).transpose(1, 2)
        k = self.k_proj(x).view(B, T, H, D).transpose(1, 2)
        v = self.v_proj(x).view(B, T, H, D).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(D)
        scores = self.masked(scores)
        weights = F.softmax(scores, dim=-1)
        return self.o_proj(torch.matmul(weights, v).transpose(1, 2).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(proj(x), H) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return Expected(q, k, v, scale=D**-0.5, mask=self.allowed())


@zoo("mask_masked_fill_in_place")
class MaskedFillInPlace(Projections):
    def masked(self, scores: Tensor) -> Tensor:
        scores.masked_fill_(~causal(T), float("-inf"))
        return scores


@zoo("mask_torch_where")
class Where(Projections):
    def masked(self, scores: Tensor) -> Tensor:
        return torch.where(causal(T), scores, -1e9)


@zoo("mask_item_assignment")
class ItemAssignment(Projections):
    def allowed(self) -> Tensor:
        mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
        mask[0, ..., :2] = False
        return mask

    def masked(self, scores: Tensor) -> Tensor:
        scores[0, :, :, :2] = torch.finfo(scores.dtype).min
        return scores


@zoo("mask_bool_index_assignment")
class BoolIndexAssignment(Projections):
    def masked(self, scores: Tensor) -> Tensor:
        scores[(~causal(T)).expand_as(scores)] = -float("inf")
        return scores


@zoo("mask_added_triu_of_minus_inf")
class AddedTriu(Projections):
    def masked(self, scores: Tensor) -> Tensor:
        return scores + torch.full((T, T), float("-inf")).triu(1).to(scores.dtype)


@zoo("mask_add_in_place")
class AddInPlace(Projections):
    """A cross-shaped mask, different for every head, taken from 0/1 to 0/-10000 and added in place."""

    def allowed(self) -> Tensor:
        mask = draw(B, H, T, T, seed=5) > -0.3
        return mask | torch.eye(T, dtype=torch.bool)

    def masked(self, scores: Tensor) -> Tensor:
        extended = (1.0 - self.allowed().to(scores.dtype)) * -10000.0
        scores.add_(extended)
        return scores


@zoo("mask_iadd_operator")
class IAdd(Projections):
    def allowed(self) -> Tensor:
        mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
        mask[1, ..., 3:] = False
        return mask

    def masked(self, scores: Tensor) -> Tensor:
        additive = torch.zeros(B, 1, 1, T, dtype=scores.dtype)
        scores += additive.masked_fill(~self.allowed(), torch.finfo(scores.dtype).min)
        return scores


@zoo("mask_through_view_in_place")
class ThroughView(Projections):
    """The fill happens on a view of other shape; the softmax reads the original."""

    def masked(self, scores: Tensor) -> Tensor:
        flat = scores.view(B * H, T, T)
        flat.masked_fill_(~causal(T), float("-inf"))
        return scores


@zoo("mask_diagonal_view_fill")
class OwnTokenMasked(Projections):
    """Locality self-attention: a token does not attend to itself; the diagonal view is filled."""

    def allowed(self) -> Tensor:
        return ~torch.eye(T, dtype=torch.bool)

    def masked(self, scores: Tensor) -> Tensor:
        scores.diagonal(dim1=-2, dim2=-1).fill_(-1e9)
        return scores


@zoo("mask_slice_assignment_rows")
class SliceAssignment(Projections):
    """Row by row in a Python loop."""

    def masked(self, scores: Tensor) -> Tensor:
        for i in range(scores.size(-2)):
            scores[..., i, i + 1 :] = -math.inf
        return scores


@zoo("mask_twice")
class Twice(Projections):
    """A window out of place, then the padding in place: both count."""

    def allowed(self) -> Tensor:
        window = causal(T) & ~causal(T, T, offset=-3)
        keep = torch.ones(B, 1, 1, T, dtype=torch.bool)
        keep[1, ..., 0] = False
        keep = keep | torch.eye(T, dtype=torch.bool)
        return window & keep

    def masked(self, scores: Tensor) -> Tensor:
        window = causal(T) & ~causal(T, T, offset=-3)
        scores = scores.masked_fill(window.logical_not(), -1e30)
        keep = torch.ones(B, 1, 1, T, dtype=torch.bool)
        keep[1, ..., 0] = False
        scores.masked_fill_(~(keep | torch.eye(T, dtype=torch.bool)), -1e30)
        return scores


@zoo("mask_before_scale", SELF)
class BeforeScale(Entry):
    """The product is masked with -1e9 first and divided afterwards."""

    out = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = [t.view(B, T, H, D).permute(0, 2, 1, 3) for t in self.w(x).split(E, -1)]
        product = q @ k.mT
        product = product.masked_fill(torch.tril(torch.ones(T, T)) == 0, -1e9)
        return self.fc((torch.softmax(product / D**0.5, -1) @ v).permute(0, 2, 1, 3).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.w(x).chunk(3, dim=-1))
        return Expected(q, k, v, scale=D**-0.5, mask=causal(T))


@zoo("mask_swapped_where_cross", CROSS)
class SwappedWhere(Entry):
    """torch.where with the fill as the first branch, on scores of a cross-attention with key padding."""

    out = "proj"

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(E, E, bias=False) for _ in range(4))
        self.register_buffer("pad", torch.arange(S).expand(B, S) >= torch.tensor([[S], [S - 3]]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = heads(self.q(x), H), heads(self.k(y), H), heads(self.v(y), H)
        s = torch.matmul(q, k.transpose(-2, -1)) * q.size(-1) ** -0.5
        s = torch.where(self.pad[:, None, None], torch.tensor(-torch.inf, dtype=s.dtype), s)
        return self.proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def expected(self, x: Tensor, y: Tensor) -> Expected:
        q, k, v = heads(self.q(x), H), heads(self.k(y), H), heads(self.v(y), H)
        return Expected(q, k, v, scale=D**-0.5, mask=~self.pad[:, None, None])
