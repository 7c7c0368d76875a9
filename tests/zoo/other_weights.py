"""Attention that is no softmax of q·k: other normalizers, and scores that no product of two tensors makes.

Each module says in ``SAID`` what it computed last, in the layout of the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import heads, merge

B, T, H, D = 2, 5, 2, 8
E = H * D


SAID: dict[str, Any] = {}
"""What the module that ran last computed, by field; a function where it formed no such tensor."""


def say(**fields: Tensor) -> None:
    SAID.clear()
    SAID.update(fields)


class Attends(nn.Module):
    """Self-attention of two heads with a function of q, k and v, which gives the output and says what it made."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(E, 3 * E), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        say(q=q, k=k, v=v)
        out = self.attend(SAID, q, k, v)
        SAID.setdefault("output", out)
        return merge(out)


OTHER_WEIGHTS: dict[str, Callable[[], nn.Module]] = {}
NORMALIZER: dict[str, str] = {}
SCORE: dict[str, str] = {}


def other(name: str, normalizer: str = "softmax", score: str = "dot") -> Callable[[Any], Any]:
    """Add a function to the list, or a class of a module."""

    def add(made: Any) -> Any:
        OTHER_WEIGHTS[name] = made if isinstance(made, type) else lambda: Attends(made)
        NORMALIZER[name], SCORE[name] = normalizer, score
        return made

    return add


def dots(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * D**-0.5


def sums(said: dict[str, Any], weights: Tensor, v: Tensor) -> Tensor:
    said["weights"] = weights
    return weights @ v


# ------------------------------------------------------------------------------------------------ normalizers of q·k


@other("sigmoid", "sigmoid")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, torch.sigmoid(dots(q, k) - 1.6), v)


@other("sigmoid_masked", "sigmoid")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    said["mask"] = ~hidden
    return sums(said, dots(q, k).masked_fill(hidden, -torch.inf).sigmoid(), v)


@other("sigmoid_einsum_dropout_eval", "sigmoid")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    said["weights"] = torch.sigmoid(torch.einsum("bhtd,bhsd->bhts", q, k) / 3)
    return torch.einsum("bhts,bhse->bhte", F.dropout(said["weights"], 0.5, False), v)


@other("gated_by_logsumexp")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sink that multiplies the output: the softmax that ran, and what it made of the values, know nothing of it."""
    z = dots(q, k)
    gate = (z.logsumexp(-1) - torch.linspace(-1.0, 1.0, H)[:, None]).sigmoid()
    said["output"] = sums(said, z.softmax(-1), v)
    return said["output"] * gate[..., None]


@other("relu", "relu")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, F.relu(dots(q, k)), v)


@other("relu_squared_over_n", "scaled relu^2")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, torch.relu(dots(q, k)) ** 2 / T, v)


@other("relu_squared_method", "relu^2")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, dots(q, k).clamp(min=0).square(), v)


@other("relu_masked_after", "relu")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    said["mask"] = torch.ones(T, T, dtype=torch.bool).tril()
    return sums(said, F.relu(dots(q, k)) * said["mask"], v)


@other("relu_over_its_sum", "relu, over their sum")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = F.relu(dots(q, k)) + 1e-6
    return sums(said, w / w.sum(-1, keepdim=True), v)


@other("gelu", "gelu")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, F.gelu(dots(q, k)), v)


@other("softplus", "softplus")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, F.softplus(dots(q, k)), v)


@other("laplace", "sub")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, 0.5 * (1 + torch.erf((dots(q, k) - 0.7) / 0.4)), v)


NORMALIZER["laplace"] = "erf"


@other("none", "none")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, dots(q, k) / T, v)


@other("retention", "none")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    age = (torch.arange(T)[:, None] - torch.arange(T)[None, :]).clamp(min=0)
    return sums(said, dots(q, k) * (0.9**age * torch.ones(T, T).tril()), v)


@other("sparsemax", "sparsemax")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    u = z.sort(-1, descending=True)[0]
    c = u.cumsum(-1) - 1
    r = torch.arange(1, T + 1, dtype=z.dtype)
    n = (u * r > c).sum(-1, keepdim=True)
    return sums(said, (z - c.gather(-1, n - 1) / n).clamp(min=0), v)


@other("entmax_bisection", "relu^2, over their sum")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k) * 0.5
    top = z.max(dim=-1, keepdim=True)[0]
    low, step = top - 1, torch.ones_like(top)
    for _ in range(60):
        step = step / 2
        middle = low + step
        p = F.relu(z - middle) ** 2
        low = torch.where(p.sum(-1, keepdim=True) >= 1, middle, low)
    return sums(said, p / p.sum(-1, keepdim=True), v)


@other("gumbel_by_hand")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    noise = -torch.log(-torch.log(torch.linspace(0.1, 0.9, T * T, dtype=z.dtype).view(T, T)))
    return sums(said, ((z + noise) / 0.7).softmax(-1), v)


@other("gumbel", "gumbel_softmax")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch.manual_seed(0)
    return sums(said, F.gumbel_softmax(dots(q, k), tau=0.7, dim=-1), v)


def off_by_one(z: Tensor) -> Tensor:
    e = z.exp()
    return e / (1 + e.sum(-1, keepdim=True))


@other("off_by_one_plain", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, off_by_one(dots(q, k)), v)


@other("off_by_one_maximum", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    top = z.max(-1, keepdim=True).values
    e = torch.exp(z - top)
    return sums(said, e / (e.sum(-1, keepdim=True) + torch.exp(-top)), v)


@other("off_by_one_column", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    return sums(said, torch.cat([z, z.new_zeros(B, H, T, 1)], -1).softmax(-1)[..., :-1], v)


@other("off_by_one_column_first", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    return sums(said, torch.cat([torch.zeros_like(z[..., :1]), z], -1).softmax(-1)[..., 1:], v)


@other("off_by_one_pad", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, F.pad(dots(q, k), (0, 1)).softmax(-1)[..., :-1], v)


@other("off_by_one_pad_first", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, F.pad(dots(q, k), (1, 0), value=0.0).softmax(-1)[..., 1:], v)


@other("off_by_one_zero_key", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    lse = torch.logsumexp(F.pad(z, (0, 1)), -1, keepdim=True)
    return sums(said, (z - lse).exp(), v)


@other("off_by_one_logaddexp", "softmax1")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    lse = torch.logsumexp(z, -1, keepdim=True)
    return sums(said, (z - torch.logaddexp(lse, torch.zeros_like(lse))).exp(), v)


@other("top_k_scattered")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    top, index = z.topk(3, -1)
    said["mask"] = torch.zeros_like(z).scatter(-1, index, 1.0) > 0
    return sums(said, torch.zeros_like(z).scatter(-1, index, top.softmax(-1)), v)


@other("top_k_scattered_in_place")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    top, index = torch.topk(z, k=3, dim=-1)
    said["mask"] = torch.zeros_like(z).scatter(-1, index, 1.0) > 0
    w = torch.zeros_like(z)
    w.scatter_(-1, index, F.softmax(top, dim=-1))
    return sums(said, w, v)


@other("top_k_scores_scattered")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    top, index = z.topk(3, -1)
    said["mask"] = torch.zeros_like(z).scatter(-1, index, 1.0) > 0
    return sums(said, torch.full_like(z, -torch.inf).scatter(-1, index, top).softmax(-1), v)


@other("top_k_threshold")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    low = z.topk(3, -1).values[..., -1:]
    said["mask"] = z >= low
    return sums(said, z.masked_fill(z < low, -torch.inf).softmax(-1), v)


@other("divided_after_the_values")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    e = (z - z.amax(-1, keepdim=True)).exp()
    said["weights"] = lambda: z.softmax(-1)
    return (e @ v) / e.sum(-1, keepdim=True)


@other("divided_after_the_values_masked")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    said["mask"] = torch.ones(T, T, dtype=torch.bool).tril()
    e = torch.exp(z - z.max(-1, keepdim=True)[0])
    said["weights"] = lambda: z.softmax(-1)
    return torch.einsum("bhts,bhse->bhte", e, v) * e.sum(-1)[..., None].reciprocal()


@other("online")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    top = torch.full((B, H, T, 1), -1e9, dtype=q.dtype)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for i in range(0, T, 2):
        z = dots(q, k[:, :, i : i + 2])
        new = torch.maximum(top, z.amax(-1, keepdim=True))
        p, keep = (z - new).exp(), (top - new).exp()
        total = total * keep + p.sum(-1, keepdim=True)
        out = out * keep + p @ v[:, :, i : i + 2]
        top = new
    said["weights"] = lambda: dots(q, k).softmax(-1)
    return out / total


@other("blocks_by_log_sum_exp")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    outs, sums_ = [], []
    for i in range(0, T, 2):
        z = dots(q, k[:, :, i : i + 2])
        sums_.append(z.logsumexp(-1, keepdim=True))
        outs.append(z.softmax(-1) @ v[:, :, i : i + 2])
    total = torch.stack(sums_).logsumexp(0)
    said["weights"] = lambda: dots(q, k).softmax(-1)
    out = torch.zeros_like(q)
    for one, lse in zip(outs, sums_, strict=True):
        out = out + one * (lse - total).exp()
    return out


@other("negative_scale")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, (-(q @ k.mT) * 0.3).softmax(-1), v)


@other("maximum_minus_scores")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = dots(q, k)
    return sums(said, (z.amax(-1, keepdim=True).expand_as(z) - z).softmax(-1), v)


@other("softmax_over_queries", "softmax over queries")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = dots(q, k).softmax(-2)
    return sums(said, w / w.sum(-1, keepdim=True), v)


@other("softmax_over_queries_alone", "softmax over queries")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, dots(q, k).softmax(-2), v)


# ------------------------------------------------------------------------------------------- q·k otherwise written


@other("sum_of_products")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = ((q[:, :, :, None] * k[:, :, None]).sum(-1) * 0.35).softmax(-1)
    said["weights"] = w
    return (w[..., None] * v[:, :, None]).sum(-2)


@other("sum_of_weighted_values_keepdim")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = dots(q, k).softmax(-1)
    said["weights"] = w
    return (v.unsqueeze(2) * w.unsqueeze(-1)).sum(dim=3, keepdim=True).squeeze(3)


@other("sigmoid_weighted_values", "sigmoid")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = dots(q, k).sigmoid()
    said["weights"] = w
    return (w[..., None] * v[:, :, None]).sum(3)


@other("bilinear_einsum", score="bilinear")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m = torch.linspace(-1, 1, H * D * D, dtype=q.dtype).view(H, D, D)
    return sums(said, (torch.einsum("bhtd,hde,bhse->bhts", q, m, k) * 0.35).softmax(-1), v)


@other("distance_by_hand", score="distance")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, (-(q[:, :, :, None] - k[:, :, None]).square().sum(-1)).softmax(-1), v)


@other("distance_cdist", score="distance")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, (-torch.cdist(q, k)).softmax(-1), v)


@other("cosine", score="cosine")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(said, (F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) / 0.2).softmax(-1), v)


@other("cosine_normalized")
def _(said: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    said.update(q=q, k=k)
    return sums(said, (q @ k.mT / 0.2).softmax(-1), v)


# --------------------------------------------------------------------------------------------- networks that score


@other("bahdanau", score="additive")
class Bahdanau(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, D), nn.Linear(E, D), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.v(torch.tanh(self.q(x)[:, :, None] + self.k(x)[:, None])).squeeze(-1)
        w = scores.softmax(-1)
        out = w @ x
        say(weights=w[:, None], scores=scores[:, None], v=x[:, None], output=out[:, None])
        return out


@other("bahdanau_last_query", score="additive")
class BahdanauStep(Bahdanau):
    """One query at a time, as a decoder asks."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.v(torch.tanh(self.q(x[:, -1]).unsqueeze(1) + self.k(x))).squeeze(-1)
        w = scores.softmax(dim=1)
        out = torch.bmm(w.unsqueeze(1), x)
        say(weights=w[:, None, None], scores=scores[:, None, None], v=x[:, None], output=out[:, None])
        return out


SCORE["bahdanau_last_query"] = "other"


@other("gat", score="additive")
class GraphAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(E, E, bias=False), nn.Linear(E, 1), nn.Linear(E, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.w(x)
        e = F.leaky_relu(self.a(h) + self.b(h).transpose(1, 2), 0.2)
        near = torch.ones(T, T, dtype=torch.bool).tril()
        e = torch.where(near, e, torch.full_like(e, -9e15))
        w = F.softmax(e, dim=-1)
        out = torch.matmul(w, h)
        say(weights=w[:, None], mask=near, v=h[:, None], output=out[:, None])
        return out


@other("pooling_linear", score="other")
class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(E, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.score(x).softmax(1)
        out = (w * x).sum(1)
        say(weights=w.mT[:, None], v=x[:, None], output=out[:, None, None])
        return x + out[:, None]


@other("pooling_query_vector")
class QueryVector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.query = nn.Linear(E, E), nn.Parameter(torch.randn(E))

    def forward(self, x: Tensor) -> Tensor:
        x = self.map(x)
        w = (x @ self.query).softmax(-1)
        out = (w[..., None] * x).sum(1, keepdim=True)
        say(weights=w[:, None, None], k=x[:, None], v=x[:, None], output=out[:, None])
        SAID["q"] = self.query.expand(B, 1, 1, E)
        return x + out


@other("pooling_hops", score="other")
class Hops(nn.Module):
    """Several learned queries over one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(E, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.b(torch.tanh(self.a(x))).softmax(1).transpose(1, 2)
        out = torch.bmm(w, x)
        say(weights=w[:, None], v=x[:, None], output=out[:, None])
        return out


@other("global_context", score="other")
class GlobalContext(nn.Module):
    """A convolution scores the positions of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(E, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.mT[..., None].expand(-1, -1, -1, 3)
        flat = image.flatten(2)
        w = self.score(image).flatten(2).softmax(-1)
        out = torch.matmul(flat, w.transpose(1, 2))
        say(weights=w[:, None], v=flat.mT[:, None], output=out.mT[:, None])
        return x + out.mT


@other("synthesizer", score="other")
class Synthesizer(nn.Module):
    """The scores are a projection of the token alone: there is no key."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, T))
        self.value = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        w, v = self.scores(x).softmax(dim=-1), self.value(x)
        out = w @ v
        say(weights=w[:, None], v=v[:, None], output=out[:, None])
        return out
