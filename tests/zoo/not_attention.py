"""What is no softmax over q k^T: never forced into the shape of a call, never passed over in silence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import draw, heads
from tests.zoo.base import B, E, H, T


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


NOT_ATTENTION: list[type[nn.Module]] = [LinearAttention, EfficientAttention]


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
