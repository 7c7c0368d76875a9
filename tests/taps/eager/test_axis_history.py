"""What is known of axes: folded heads cut apart, heads nobody split in sight, extents of 0, scales that are learned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, einsum, nn

from hookattn.taps.eager import axis_history
from hookattn.taps.eager.axis_history import Atom, fresh, sizes
from tests.reference import check_call, draw, heads, merge, trace_checked
from tests.zoo.base import B, D, E, H, T


class Sliced(nn.Module):
    """Heads folded into the batch, and taken ``step`` at a time."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.qkv, self.step = nn.Linear(E, 3 * E), step

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (heads(t, H).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        out = torch.zeros_like(q)
        for i in range(0, len(q), self.step):
            some = slice(i, i + self.step)
            out[some] = (q[some] @ k[some].mT * 0.5).softmax(-1) @ v[some]
        return out


@pytest.mark.parametrize("step", [1, 2, 3, H, 2 * H])
def test_slices_of_folded_heads_are_heads(step: int) -> None:
    import hookattn

    torch.manual_seed(0)
    model, x = Sliced(step).eval(), draw(4, T, E, std=1.5)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = (t.view(4, H, T, D) for t in model.parts(x))
    assert len(trace) == 1 and not trace.skipped
    check_call(trace[0], q=q, k=k, v=v, scale=0.5)


def test_heads_of_a_multi_query_product_that_were_split_elsewhere() -> None:
    import hookattn

    class Kernel(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (einsum("bhid,bjd->bhij", q, k) * 0.5).softmax(-1)
            return einsum("bhij,bjd->bhid", weights, v)

    for t in (3, 1):
        q, k, v = draw(B, H, t, D), draw(B, 5, D, seed=1), draw(B, 5, D, seed=2)
        trace = trace_checked(hookattn.trace, Kernel(), (q, k, v), verify="full", guesses=True)
        check_call(trace[0], q=q, k=k[:, None], v=v[:, None], scale=0.5)
        assert trace[0].basis["H"] == "guessed" and trace[0].basis["S"] == "followed"


@pytest.mark.parametrize("how", ["chunked", "permuted"])
def test_an_empty_batch(how: str) -> None:
    """Views of nothing tell nothing of their axes, and a call without batch entries is a call."""
    import hookattn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(E, 3 * E)

        def parts(self, x: Tensor) -> tuple[Tensor, ...]:
            b = len(x)
            if how == "permuted":
                q, k, v = self.qkv(x).view(b, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
            else:
                q, k, v = (t.reshape(b, T, H, D).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return q, k, v

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            scores = q @ k.mT / math.sqrt(D)
            out = scores.masked_fill(~torch.ones(T, T).bool().tril(), -math.inf).softmax(-1) @ v
            return out.transpose(1, 2).reshape(len(x), T, E)

    model, x = Model().eval(), draw(2, T, E)[:0]
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full", guesses=True)
        q, k, v = model.parts(x)
    assert len(trace) == 1 and not trace.skipped
    assert trace[0].weights.shape == (0, H, T, T)
    check_call(trace[0], q=q, k=k, v=v, scale=D**-0.5, mask=torch.ones(T, T).bool().tril())


def test_reshape_of_nothing() -> None:
    layout = fresh((0, 6, 4))
    assert sizes(axis_history.reshape(layout, (0, 24), None)) == (0, 24)
    assert sizes(axis_history.reshape(fresh((0,)), (2, 0, 3), None)) == (2, 0, 3)
    assert sizes(axis_history.reshape(((Atom(2), Atom(0)),), (0, 5), None)) == (0, 5)


@pytest.mark.parametrize("cap_first", [True, False])
@pytest.mark.parametrize("shape", [(1,), (H, 1, 1)])
def test_soft_cap_after_a_learned_scale(shape: tuple[int, ...], cap_first: bool) -> None:
    """The scale is a parameter, one or one for each head; then c·tanh(s/c)."""
    import hookattn

    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.scale = nn.Linear(E, 3 * E), nn.Parameter(draw(*shape, seed=7).abs() + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
            scores = q @ k.mT * self.scale.view(-1, 1, 1)
            scores = 3.0 * torch.tanh(scores / 3.0) if cap_first else torch.tanh(scores / 3.0) * 3.0
            return merge(scores.softmax(-1) @ v)

    torch.manual_seed(8)
    model, x = Capped().eval(), draw(B, T, E, std=1.5)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = (heads(t, H) for t in model.qkv(x).chunk(3, -1))
        scale = model.scale.view(1, -1, 1, 1)
    call = trace[0]
    check_call(call, q=q, k=k, v=v, scale=scale, softcap=3.0)
    assert call.softcap == pytest.approx(3.0)
    given = call.scale if isinstance(call.scale, Tensor) else torch.tensor(call.scale)
    assert torch.allclose(given.expand(1, H, 1, 1), scale.expand(1, H, 1, 1))


def test_zeros_that_a_sequence_is_padded_with_have_no_axes_of_their_own() -> None:
    """Blocks of a sequence with zeros laid before it, heads split already: the axes are those of the sequence."""
    import hookattn

    b, t, h, d = 3, 6, 4, 8

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(h * d, 3 * h * d)

        def blocks(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            made = (y.unflatten(-1, (h, d)) for y in self.qkv(x).chunk(3, -1))
            padded = (torch.cat([y.new_zeros(b, 2, h, d), y], 1) for y in made)
            return tuple(y.unflatten(1, (2, 4)).permute(0, 3, 1, 2, 4) for y in padded)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.blocks(x)
            w = (q @ k.mT).softmax(-1).permute(0, 2, 1, 3, 4).reshape(-1, 4, 4)
            return torch.bmm(w, v.permute(0, 2, 1, 3, 4).reshape(-1, 4, d))

    torch.manual_seed(1)
    model, x = Blocks(), torch.randn(b, t, h * d)
    with torch.no_grad():
        (call,) = hookattn.trace(model, x)
        q, _, _ = model.blocks(x)
    assert torch.equal(call.q, q.transpose(1, 2).flatten(0, 1))
    assert call.basis["H"] == "followed"
