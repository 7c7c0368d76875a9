"""What is no softmax over q k^T: never forced into the shape of a call, never passed over in silence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import causal, draw, heads
from tests.zoo.base import B, D, E, H, T


class LinearAttention(nn.Module):
    """elu(q) + 1 against elu(k) + 1, keys and values summed first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhsd,bhse->bhde", k, v)
        z = 1 / (torch.einsum("bhtd,bhd->bht", q, k.sum(dim=2)) + 1e-6)
        return self.proj(torch.einsum("bhtd,bhde,bht->bhte", q, kv, z).transpose(1, 2).flatten(2))


class EfficientAttention(nn.Module):
    """A softmax on q over features and one on k over positions: neither is over scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        q, k = F.softmax(q, dim=-1), F.softmax(k, dim=-2)
        context = k.transpose(-2, -1) @ v
        return self.proj((q @ context).transpose(1, 2).flatten(2))


class BahdanauAttention(nn.Module):
    """Additive: the scores are a small network's, not a product of q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.Wa, self.Ua, self.Va = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.Va(torch.tanh(self.Wa(x).unsqueeze(2) + self.Ua(x).unsqueeze(1))).squeeze(-1)
        weights = F.softmax(scores, dim=-1)
        return torch.bmm(weights, x)


class GraphAttentionLayer(nn.Module):
    """GAT: a leaky sum of two projections, masked by the adjacency, softmax, times features."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.a1, self.a2 = nn.Linear(E, E, bias=False), nn.Linear(E, 1), nn.Linear(E, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.W(x)
        e = F.leaky_relu(self.a1(h) + self.a2(h).transpose(1, 2), 0.2)
        e = torch.where(causal(T), e, torch.full_like(e, -9e15))
        return F.elu(torch.matmul(F.softmax(e, dim=-1), h))


class DenseSynthesizerAttention(nn.Module):
    """The scores are a projection of the token alone: there is no key."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, T))
        self.value = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).softmax(dim=-1) @ self.value(x)


class SigmoidAttention(nn.Module):
    """q k^T, but a sigmoid where the softmax would be."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        weights = torch.sigmoid(q @ k.transpose(-2, -1) * D**-0.5 - 1.6)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ReluSquaredAttention(nn.Module):
    """q k^T through a squared ReLU, divided by the length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        weights = F.relu(torch.einsum("bhtd,bhsd->bhts", q, k) / D**0.5) ** 2 / T
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class SlotAttention(nn.Module):
    """The softmax is over the slots (the queries), and the rows are renormalised over the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(draw(3, E, seed=21))
        self.to_q, self.to_k, self.to_v = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(self.slots.expand(x.shape[0], -1, -1))
        k, v = self.to_k(x), self.to_v(x)
        dots = torch.einsum("bid,bjd->bij", q, k) * E**-0.5
        attn = dots.softmax(dim=1) + 1e-8
        attn = attn / attn.sum(dim=-1, keepdim=True)
        return torch.einsum("bjd,bij->bid", v, attn)


class RetentionAttention(nn.Module):
    """q k^T times a decay, no normalisation at all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        age = (torch.arange(T)[:, None] - torch.arange(T)[None, :]).clamp(min=0)
        decay = (0.9**age) * causal(T)
        return self.proj(((q @ k.mT * decay) @ v).transpose(1, 2).flatten(2))


NOT_ATTENTION: list[type[nn.Module]] = [
    LinearAttention,
    EfficientAttention,
    BahdanauAttention,
    GraphAttentionLayer,
    DenseSynthesizerAttention,
    SigmoidAttention,
    ReluSquaredAttention,
    SlotAttention,
    RetentionAttention,
]


class MixtureOfExperts(nn.Module):
    """A softmax router: a softmax, a product, and no attention anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(E, 3)
        self.experts = nn.Parameter(draw(3, E, E, seed=22, std=0.3))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.softmax(self.router(x), dim=-1)
        return torch.einsum("bte,ebtd->btd", gate, torch.einsum("btc,ecd->ebtd", x, self.experts))


class ClassifierHead(nn.Module):
    """Class probabilities, and the mean embedding they predict."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(E, 11, bias=False)
        self.embed = nn.Embedding(11, E)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.lm_head(x), dim=-1) @ self.embed.weight


class SqueezeExcite(nn.Module):
    """Channel gates from a softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(E, 4), nn.Linear(4, E)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.softmax(self.fc2(F.relu(self.fc1(x.mean(dim=1, keepdim=True)))), dim=-1)


NO_CALL: list[type[nn.Module]] = [MixtureOfExperts, ClassifierHead, SqueezeExcite]

SHAPE = (B, T, E)
