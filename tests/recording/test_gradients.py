"""``call.grad`` against autograd through explicit float64 math, and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as torch_dropout
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn import edit
from hookattn.errors import FieldNotCaptured, GradientError, InputError
from tests.reference import causal, draw

F64 = torch.float64
NAMES = ("output", "weights", "scores", "q", "k", "v")
B, H, G, T, S, D, E = 2, 4, 2, 5, 6, 3, 7


def operands(h: int = H, g: int = H, t: int = T, s: int = S, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, h, t, D), (B, g, s, D), (B, g, s, E))
    q, k, v = (draw(*shape, seed=i, dtype=F64).to(dtype).requires_grad_() for i, shape in enumerate(shapes, 1))
    return q, k, v


@dataclass
class Explicit:
    """Attention in float64, an operation a line; what it leaves are the tensors that gradients are asked of."""

    scale: Any = 0.6
    bias: Tensor | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    normalizer: Callable[[Tensor], Tensor] | None = None
    keep: Tensor | None = None
    made: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        scores = self.scale * (q @ k.repeat_interleave(groups, 1).mT)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias
        hidden = torch.zeros_like(scores, dtype=torch.bool) if self.mask is None else ~self.mask.expand_as(scores)
        if self.normalizer is not None:
            weights = self.normalizer(scores).masked_fill(hidden, 0.0)
        else:
            powers = (scores - scores.detach().amax(-1, keepdim=True)).exp().masked_fill(hidden, 0.0)
            total = powers.sum(-1, keepdim=True)
            if self.sinks is not None:
                total = total + (self.sinks.view(1, -1, 1, 1) - scores.detach().amax(-1, keepdim=True)).exp()
            weights = powers / total
        applied = weights if self.keep is None else weights * self.keep
        output = applied @ v.repeat_interleave(groups, 1)
        self.made = {"q": q, "k": k, "v": v, "scores": scores, "weights": weights, "applied": applied, "output": output}
        return output

    def gradients(self, q: Tensor, k: Tensor, v: Tensor, of_output: Tensor) -> dict[str, Tensor]:
        q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
        output = self(q, k, v)
        names = [name for name in self.made if name != "output"]
        found = torch.autograd.grad((output * of_output).sum(), [self.made[name] for name in names])
        return {**dict(zip(names, found, strict=True)), "output": of_output}


class Kernel(nn.Module):
    """A model that is one attention."""

    def __init__(self, run: Callable[..., Tensor]):
        super().__init__()
        self.run = run

    def forward(self, *given: Tensor) -> Tensor:
        return self.run(*given)


def differences(call: Any, expected: dict[str, Tensor], names: Any = NAMES) -> dict[str, float]:
    """Of each gradient the largest difference, as a part of its largest entry."""
    found = {}
    for name in names:
        made = call.grad(name)
        assert made.shape == expected[name].shape, name
        assert not made.requires_grad
        found[name] = float((made.double() - expected[name]).abs().max() / expected[name].abs().max())
    return found


def check(run: Callable[..., Tensor], explicit: Explicit, given: tuple[Tensor, Tensor, Tensor], **options: Any) -> Any:
    """One kernel, called on q, k and v as they are recorded, against explicit math; returns the call."""
    of_output = draw(B, given[0].shape[1], given[0].shape[2], given[2].shape[3], seed=9, dtype=F64)
    trace = hookattn.trace(Kernel(run), given, gradients=True, **options)
    (trace.output * of_output.to(trace.output.dtype)).sum().backward()
    (call,) = trace
    assert call.certificate.faithful
    found = differences(call, explicit.gradients(*given, of_output))
    assert max(found.values()) < 1e-10, found
    for name, x in zip("qkv", given, strict=True):  # and the kernel's own backward says the same
        torch.testing.assert_close(call.grad(name), x.grad, rtol=1e-10, atol=1e-12)
    return call


MASK = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(3)) > 0.4
MASK[..., 0] = True
MASK[1, :, 2] = False  # a query with nothing to attend to
BIAS = draw(1, H, T, S, seed=4, dtype=F64)


@pytest.mark.parametrize(
    ("options", "explicit"),
    [
        ({}, Explicit(D**-0.5)),
        ({"scale": 0.6}, Explicit()),
        ({"is_causal": True}, Explicit(D**-0.5, mask=causal(T, S))),
        ({"attn_mask": MASK}, Explicit(D**-0.5, mask=MASK)),
        ({"attn_mask": BIAS}, Explicit(D**-0.5, bias=BIAS)),
        ({"attn_mask": BIAS.masked_fill(~MASK, -math.inf)}, Explicit(D**-0.5, bias=BIAS, mask=MASK)),
    ],
    ids=["plain", "scaled", "causal", "bool mask", "bias", "bias and mask"],
)
def test_sdpa(options: dict[str, Any], explicit: Explicit) -> None:
    check(lambda q, k, v: sdpa(q, k, v, **options), explicit, operands())


def test_grouped_heads() -> None:
    check(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), Explicit(D**-0.5), operands(g=G))


def test_a_model_that_writes_to_its_output_and_goes_on_with_a_view() -> None:
    """The gradient is that of what the kernel returned, whatever the model makes of it in place."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sdpa(q, k, v)
        return out.transpose(1, 2).mul_(2).transpose(1, 2)

    given = operands()
    trace = hookattn.trace(Kernel(run), given, gradients=True)
    trace.output.sum().backward()
    expected = Explicit(D**-0.5).gradients(*given, torch.full((B, H, T, E), 2.0, dtype=F64))
    assert max(differences(trace[0], expected).values()) < 1e-10


def test_heads_that_are_folded_into_the_batch() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.einsum("bhtd->bthd", q).flatten(2)  # so that heads have a history
        q = mixed.unflatten(2, (H, D)).transpose(1, 2)
        return sdpa(*(x.reshape(B * H, *x.shape[2:]) for x in (q, k, v)))

    given = operands()
    trace = hookattn.trace(Kernel(run), given, gradients=True)
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    (trace.output * of_output.flatten(0, 1)).sum().backward()
    (call,) = trace
    expected = Explicit(D**-0.5).gradients(*given, of_output)
    found = {n: call.grad(n).reshape(expected[n].shape) for n in NAMES}
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("what", ["plain", "softcap", "bias", "grouped"])
def test_flex(what: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    bias = draw(H, T, S, seed=4, dtype=F64)
    mods: dict[str, Any] = {
        "softcap": lambda score, b, h, i, j: 2.0 * torch.tanh(score / 2.0),
        "bias": lambda score, b, h, i, j: score + bias[h, i, j],
    }
    explicit = Explicit(0.6, bias=bias[None] if what == "bias" else None, softcap=2.0 if what == "softcap" else None)
    grouped = what == "grouped"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, score_mod=mods.get(what), scale=0.6, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out

    # Without a graph of its own on a CPU: its gradient comes by way of what its output is part of.
    given = operands(g=G if grouped else H)
    with torch.no_grad():
        plain = [x.detach() for x in given]
    trace = hookattn.trace(Kernel(run), tuple(x.requires_grad_(False) for x in plain), gradients=True)
    with pytest.raises(GradientError, match="has no graph"):
        trace[0].grad("weights")
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    trace[0].gradient.why_none = ""
    trace[0].gradient.add(of_output)
    assert max(differences(trace[0], explicit.gradients(*given, of_output)).values()) < 1e-10


# ------------------------------------------------------------------------------------------- written out by hand


def by_hand(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    scores = q @ k.mT * 0.6
    if (cap := given.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (bias := given.get("bias")) is not None:
        scores = scores + bias
    if (mask := given.get("mask")) is not None:
        scores = scores.masked_fill(~mask, given.get("fill", -1e9))
    if (sinks := given.get("sinks")) is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(B, -1, T, 1)], -1)
    weights = scores.softmax(-1)[..., :S]
    return weights @ v


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"softcap": 2.0},
        {"bias": BIAS},
        {"mask": causal(T, S)},
        {"mask": causal(T, S), "bias": BIAS, "softcap": 2.0},
        {"sinks": draw(H, seed=7, dtype=F64)},
        {"sinks": draw(H, seed=7, dtype=F64), "mask": causal(T, S)},
    ],
    ids=["plain", "softcap", "bias", "causal", "all", "sinks", "sinks, causal"],
)
def test_by_hand(given: dict[str, Any]) -> None:
    check(lambda q, k, v: by_hand(q, k, v, **given), Explicit(**given), operands())


def through(layout: str, x: Tensor) -> Tensor:
    """B H T D in another layout."""
    return torch.einsum(f"bhtd->{layout}", x).contiguous()


LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]] = {
    "einsum of B T H D": lambda q, k, v: (
        torch.einsum("bhts,bshe->bthe", (torch.einsum("bthd,bshd->bhts", q, k) * 0.6).softmax(-1), v),
        lambda x: x.transpose(1, 2),
    ),
    "keys first": lambda q, k, v: (
        torch.einsum("bsht,bshe->bthe", (torch.einsum("bshd,bthd->bsht", k, q) * 0.6).softmax(1), v),
        lambda x: x.transpose(1, 2),
    ),
    "exponentials, divided at the end": lambda q, k, v: (
        (lambda e: (e @ v.transpose(1, 2)) / e.sum(-1, keepdim=True))(
            (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 0.6).exp()
        ),
        lambda x: x,
    ),
    "a sum of two halves of the keys": lambda q, k, v: (
        (
            lambda w: w[..., :3] @ v[:, :3].transpose(1, 2) + w[..., 3:] @ v[:, 3:].transpose(1, 2)
        )((q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 0.6).softmax(-1)),
        lambda x: x,
    ),
    "folded, baddbmm": lambda q, k, v: (
        torch.bmm(
            torch.baddbmm(
                torch.zeros(1, dtype=F64),
                q.transpose(1, 2).reshape(B * H, T, D),
                k.transpose(1, 2).reshape(B * H, S, D).mT,
                beta=0,
                alpha=0.6,
            ).softmax(-1),
            v.transpose(1, 2).reshape(B * H, S, E),
        ),
        lambda x: x.view(B, H, T, E),
    ),
}  # fmt: skip


class Projected(nn.Module):
    """Heads that were split from a width, so that it is known which axis is which; ``again``: several times."""

    def __init__(self, run: Callable[..., Any], again: int = 1):
        super().__init__()
        self.run, self.again = run, again
        self.maps = nn.ModuleList(nn.Linear(8, H * n, dtype=F64) for n in (D, D, E))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = []
        for _ in range(self.again):
            q, k, v = (m(z).unflatten(-1, (H, -1)) for m, z in zip(self.maps, (x, y, y), strict=True))
            out, form = self.run(q, k, v)
            made.append(form(out))
        return torch.stack(made).sum(0)


@pytest.mark.parametrize("again", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, again: int) -> None:
    """Followed, and recognised when the same runs again."""
    torch.manual_seed(0)
    model = Projected(LAYOUTS[layout], again)
    x, y = draw(B, T, 8, seed=1, dtype=F64), draw(B, S, 8, seed=2, dtype=F64)
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    trace = hookattn.trace(model, (x, y), gradients=True)
    (trace.output * of_output).sum().backward()
    given = [m(z).unflatten(-1, (H, -1)).transpose(1, 2) for m, z in zip(model.maps, (x, y, y), strict=True)]
    expected = Explicit().gradients(*given, of_output)
    assert len(trace) == again
    for call in trace:
        assert max(differences(call, expected).values()) < 1e-10


NORMALIZERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + (-x).exp())),
    "relu": (torch.relu, lambda x: x.clamp_min(0)),
    "relu^2": (lambda x: torch.relu(x).square(), lambda x: x.clamp_min(0) ** 2),
    "softplus": (nn.functional.softplus, lambda x: (1 + x.exp()).log()),
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_other_normalizers(name: str) -> None:
    theirs, ours = NORMALIZERS[name]
    torch.manual_seed(0)
    model = Projected(
        lambda q, k, v: (theirs(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 0.6) @ v.transpose(1, 2), lambda x: x)
    )
    x, y = draw(B, T, 8, seed=1, dtype=F64), draw(B, S, 8, seed=2, dtype=F64)
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    trace = hookattn.trace(model, (x, y), gradients=True)
    (trace.output * of_output).sum().backward()
    given = [m(z).unflatten(-1, (H, -1)).transpose(1, 2) for m, z in zip(model.maps, (x, y, y), strict=True)]
    assert trace[0].normalizer == name
    assert max(differences(trace[0], Explicit(normalizer=ours).gradients(*given, of_output)).values()) < 1e-10


def test_a_normalizer_that_nobody_knows() -> None:
    torch.manual_seed(0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.erf(q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).abs() @ v.transpose(1, 2), lambda x: x

    trace = hookattn.trace(
        Projected(run), (draw(B, T, 8, seed=1, dtype=F64), draw(B, S, 8, seed=2, dtype=F64)), gradients=True
    )
    trace.output.sum().backward()
    assert trace[0].grad("weights").shape == (B, H, T, S)
    with pytest.raises(GradientError, match=r"normalizer|more than q·k"):
        trace[0].grad("scores")


# --------------------------------------------------------------------------------------------------- dropout


def test_dropout_that_the_model_forms() -> None:
    """The gradient of the weights is that of the weights before dropout, which is known by what it left."""
    torch.manual_seed(0)
    model = Projected(
        lambda q, k, v: (
            torch_dropout((q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 0.6).softmax(-1), 0.4) @ v.transpose(1, 2),
            lambda x: x,
        )
    )
    x, y = draw(B, T, 8, seed=1, dtype=F64), draw(B, S, 8, seed=2, dtype=F64)
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    trace = hookattn.trace(model, (x, y), gradients=True)
    (trace.output * of_output).sum().backward()
    (call,) = trace
    given = [m(z).unflatten(-1, (H, -1)).transpose(1, 2) for m, z in zip(model.maps, (x, y, y), strict=True)]
    keep = (call.applied != 0).double() / 0.6
    assert 0 < float((keep == 0).double().mean()) < 1
    expected = Explicit(keep=keep).gradients(*given, of_output)
    assert max(differences(call, expected, (*NAMES, "applied")).values()) < 1e-10


def test_dropout_inside_a_kernel_is_told() -> None:
    given = operands()
    trace = hookattn.trace(Kernel(lambda q, k, v: sdpa(q, k, v, dropout_p=0.3)), given, gradients=True)
    trace.output.sum().backward()
    (call,) = trace
    assert bool((call.grad("output") == 1).all())
    of_applied = torch.ones(B, H, T, E, dtype=F64) @ given[2].mT
    torch.testing.assert_close(call.grad("applied"), of_applied.detach())
    for name in ("weights", "scores", "q", "k", "v"):
        with pytest.raises(GradientError, match=r"dropped weights out.*eval mode"):
            call.grad(name)


def test_weights_that_the_model_changed() -> None:
    """Heads that are mixed after the softmax: what met the values has a gradient, what was mixed has none."""
    torch.manual_seed(0)
    mix = draw(H, H, seed=5, dtype=F64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 0.6).softmax(-1)
        return torch.einsum("hg,bgts->bhts", mix, weights) @ v.transpose(1, 2), lambda x: x

    model = Projected(run)
    x, y = draw(B, T, 8, seed=1, dtype=F64), draw(B, S, 8, seed=2, dtype=F64)
    trace = hookattn.trace(model, (x, y), gradients=True)
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    (trace.output * of_output).sum().backward()
    (call,) = trace
    assert call.mixed
    torch.testing.assert_close(call.grad("applied"), of_output @ call.v.mT)
    torch.testing.assert_close(call.grad("v"), call.applied.mT @ of_output)
    for name in ("weights", "scores", "q", "k"):
        with pytest.raises(GradientError, match=r"changed its weights.*grad\('applied'\)"):
            call.grad(name)


# ------------------------------------------------------------------------------------- modules of torch, transforms


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(12, H, batch_first=True, dtype=F64).train()
    x = draw(B, T, 12, seed=1, dtype=F64)
    trace = hookattn.trace(model, {"query": x, "key": x, "value": x, "need_weights": need_weights}, gradients=True)
    trace.output[0].square().sum().backward()
    (call,) = trace
    expected = Explicit(call.scale).gradients(call.q, call.k, call.v, call.grad("output"))
    assert max(differences(call, expected).values()) < 1e-10
    # The projection before it says what its gradient is, too.
    of_q = call.grad("q").transpose(1, 2).flatten(2).flatten(0, 1)
    of_q = of_q * 3**-0.5 / call.scale  # where it scales its queries itself they are recorded so
    torch.testing.assert_close(model.in_proj_weight.grad[:12], of_q.T @ x.flatten(0, 1), rtol=1e-9, atol=1e-10)


def test_finite_differences() -> None:
    """Of what the scores and the weights are, moved one by one, in the kernel's own forward."""
    q, k, v = (x.detach() for x in operands())
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    given = tuple(x.clone().requires_grad_() for x in (q, k, v))
    trace = hookattn.trace(Kernel(lambda q, k, v: sdpa(q, k, v, is_causal=True)), given, gradients=True)
    (trace.output * of_output).sum().backward()
    (call,) = trace
    step = 1e-5
    for at in [(0, 0, 0, 0), (1, 2, 4, 1), (0, 3, 3, 2), (1, 1, 2, 0)]:
        moved = torch.zeros(B, H, T, S, dtype=F64)
        moved[at] = step
        mask = torch.zeros(T, S, dtype=F64).masked_fill(~causal(T, S), -math.inf)

        def loss(more: Tensor, mask: Tensor = mask) -> float:
            return float((sdpa(q, k, v, attn_mask=mask + more) * of_output).sum())

        slope = (loss(moved) - loss(-moved)) / (2 * step)
        assert abs(slope - float(call.grad("scores")[at])) < 1e-7
        change = float((moved @ v * of_output).sum()) / step
        assert abs(change - float(call.grad("weights")[at])) < 1e-9
    for name, x in zip("qkv", (q, k, v), strict=True):
        for at in [(0, 0, 0, 0), (1, 2, 3, 2)]:
            values = []
            for sign in (1, -1):
                y = x.clone()
                y[at] += sign * step
                use = {**dict(zip("qkv", (q, k, v), strict=True)), name: y}
                values.append(float((sdpa(use["q"], use["k"], use["v"], is_causal=True) * of_output).sum()))
            assert abs((values[0] - values[1]) / (2 * step) - float(call.grad(name)[at])) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    given = operands(dtype=dtype)
    trace = hookattn.trace(Kernel(by_half), given, gradients=True)
    trace.output.sum().backward()
    (call,) = trace
    assert call.grad("output").dtype == dtype
    expected = Explicit(D**-0.5).gradients(*given, torch.ones(B, H, T, E, dtype=F64))
    for name in NAMES[1:]:
        made = call.grad(name)
        assert made.dtype == torch.float32
        assert float((made - expected[name]).abs().max()) < 0.05 * float(expected[name].abs().max())


def by_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


# ------------------------------------------------------------------------------------------ selections, accumulation


def test_selections_cut_the_gradient_as_they_cut_the_output() -> None:
    given = operands()
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    expected = Explicit(D**-0.5).gradients(*given, of_output)
    trace = hookattn.trace(Kernel(by_half), given, gradients=True, heads=[3, 1], queries=[4, 0])
    (trace.output * of_output).sum().backward()
    (call,) = trace
    assert call.grad("output").shape == call.output.shape
    for name in ("output", "weights", "scores", "q"):
        torch.testing.assert_close(call.grad(name), expected[name][:, [3, 1]][:, :, [4, 0]], rtol=1e-10, atol=1e-12)
    for name in ("k", "v"):
        with pytest.raises(GradientError, match=r"sum over all queries.*without heads="):
            call.grad(name)
    whole = hookattn.trace(Kernel(by_half), given, gradients=True)
    part = whole[0].at(heads=2, queries=slice(1, 3), batch=1)  # taken before there is any
    (whole.output * of_output).sum().backward()
    for name in ("output", "weights", "scores", "q"):
        torch.testing.assert_close(part.grad(name), expected[name][1:, 2:3, 1:3], rtol=1e-10, atol=1e-12)
    one = whole[0].at(batch=0)
    torch.testing.assert_close(one.grad("v"), expected["v"][:1], rtol=1e-10, atol=1e-12)
    assert torch.equal(whole.select(step=0)[0].grad("q"), whole[0].grad("q"))


def test_query_slices_and_dtypes() -> None:
    given = operands()
    trace = hookattn.trace(
        Kernel(by_half), given, gradients=True, queries=slice(-2, None), dtype=torch.float32, device="cpu"
    )
    trace.output.square().sum().backward()
    (call,) = trace
    assert call.grad("output").dtype == torch.float32
    torch.testing.assert_close(call.grad("output"), 2 * call.output)


def test_several_backward_passes_add_up() -> None:
    given = operands()
    trace = hookattn.trace(Kernel(by_half), given, gradients=True)
    part = trace[0].at(heads=0)
    trace.output.sum().backward(retain_graph=True)
    once = trace[0].grad("q")
    trace.output.sum().backward()
    torch.testing.assert_close(trace[0].grad("q"), 2 * once)
    torch.testing.assert_close(part.grad("q"), 2 * once[:, :1])


def test_a_backward_that_raises_leaves_what_there_was() -> None:
    """The hook of the output has run by the time that torch finds that the graph is gone."""
    trace = hookattn.trace(Kernel(by_half), operands(), gradients=True)
    loss = trace.output.sum()
    loss.backward()
    before = trace[0].grad("output").clone()
    for _ in range(6):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert torch.equal(trace[0].grad("output"), before)


def test_gradients_of_autograd_grad_count_too() -> None:
    given = operands()
    trace = hookattn.trace(Kernel(by_half), given, gradients=True)
    (of_q,) = torch.autograd.grad(trace.output.sum(), given[0])
    torch.testing.assert_close(trace[0].grad("q"), of_q)


def test_backward_inside_the_block_and_after_it() -> None:
    given = operands()
    model = Kernel(by_half)
    with hookattn.tracing(model, gradients=True) as trace:
        model(*given).sum().backward()
        later = model(*given).square().sum()
    later.backward()
    assert bool((trace[0].grad("output") == 1).all())
    torch.testing.assert_close(trace[1].grad("output"), 2 * trace[1].output)


def test_pieces_that_are_put_together() -> None:
    """Queries in chunks: one call, with one gradient; a chunk that the loss does not depend on has none of it."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        parts = [(part @ k.mT * 0.6).softmax(-1) @ v for part in q.split(3, 2)]
        return torch.cat(parts, 2), lambda x: x

    torch.manual_seed(0)
    model = Projected(run)
    x, y = draw(B, T, 8, seed=1, dtype=F64), draw(B, S, 8, seed=2, dtype=F64)
    of_output = draw(B, H, T, E, seed=9, dtype=F64)
    given = [m(z).unflatten(-1, (H, -1)).transpose(1, 2) for m, z in zip(model.maps, (x, y, y), strict=True)]
    for rows in (slice(None), slice(0, 2)):
        trace = hookattn.trace(model, (x, y), gradients=True)
        (trace.output * of_output)[:, :, rows].sum().backward()
        (call,) = trace
        wanted = torch.zeros_like(of_output)
        wanted[:, :, rows] = of_output[:, :, rows]
        assert max(differences(call, Explicit().gradients(*given, wanted)).values()) < 1e-10


# ------------------------------------------------------------------------------------------------ where there is none


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Projected(plain_in_bthd), Projected(plain_in_bthd)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x, x), self.second(x, x)


def plain_in_bthd(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v))), lambda x: x


def test_what_has_no_gradient_says_why() -> None:
    x = draw(B, T, 8, seed=1, dtype=F64)
    model = Two()
    plain = hookattn.trace(model, (x,))
    with pytest.raises(GradientError, match=r"first.*trace with gradients=True"):
        plain["first"].grad("weights")
    trace = hookattn.trace(model, (x,), gradients=True)
    with pytest.raises(GradientError, match=r"first has no gradient yet.*Call backward"):
        trace["first"].grad("weights")
    trace.output[0].sum().backward()
    assert trace["first"].grad("weights").shape == (B, H, T, T)
    with pytest.raises(GradientError, match=r"second has no gradient.*did not reach its output"):
        trace["second"].grad("weights")
    with pytest.raises(InputError, match=r"name='keys'.*weights, applied, scores, q, k, v, output"):
        trace["first"].grad("keys")
    with pytest.raises(InputError, match="gradients"):
        hookattn.trace(model, (x,), gradients="yes")  # type: ignore[arg-type]


def test_a_forward_without_a_graph() -> None:
    x, model = draw(B, T, 8, seed=1, dtype=F64), Two()
    with torch.no_grad():
        trace = hookattn.trace(model, (x,), gradients=True)
    with pytest.raises(GradientError, match=r"no_grad.*requires_grad_"):
        trace[0].grad("weights")
    with torch.inference_mode():
        trace = hookattn.trace(model, (x,), gradients=True)
    with pytest.raises(GradientError, match=r"inference_mode.*outside"):
        trace[0].grad("weights")
    trace = hookattn.trace(model.requires_grad_(False), (x,), gradients=True)
    with pytest.raises(GradientError, match="nothing that it is made of requires one"):
        trace[0].grad("weights")


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = Projected(plain_in_bthd), reentrant

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.inner, x, x, use_reentrant=self.reentrant)
        assert isinstance(out, Tensor)
        return out


def test_checkpoints() -> None:
    torch.manual_seed(0)
    x = draw(B, T, 8, seed=1, dtype=F64).requires_grad_()
    model = Checkpointed(True)
    trace = hookattn.trace(model, (x,), gradients=True)
    trace.output.sum().backward()
    with pytest.raises(GradientError, match="use_reentrant=False"):
        trace[0].grad("weights")
    model.reentrant = False
    with hookattn.tracing(model, gradients=True) as trace:
        model(x).square().sum().backward()
    (call,) = trace
    given = [m(x).unflatten(-1, (H, -1)).transpose(1, 2) for m in model.inner.maps]
    assert max(differences(call, Explicit(D**-0.5).gradients(*given, 2 * call.output)).values()) < 1e-10


def test_a_transform_of_functions() -> None:
    given = operands()
    model = Kernel(by_half)
    with hookattn.tracing(model, gradients=True) as trace:
        torch.vmap(lambda q, k, v: model(q[None], k[None], v[None]))(*given)
    with pytest.raises(GradientError, match=r"torch\.func"):
        trace[0].grad("weights")


def test_a_field_that_was_not_kept() -> None:
    trace = hookattn.trace(Kernel(by_half), operands(), capture=("weights",), gradients=True)
    trace.output.sum().backward()
    assert trace[0].grad("output").shape == (B, H, T, E)
    with pytest.raises(FieldNotCaptured, match="'v'"):
        trace[0].grad("weights")


def test_tracing_changes_no_bit() -> None:
    """Outputs and the gradients of all parameters are what they are without a trace."""
    torch.manual_seed(0)
    model, x = Two(), draw(B, T, 8, seed=1, dtype=F64)

    def run(**options: Any) -> list[Tensor]:
        model.zero_grad()
        out = model(x) if not options else hookattn.trace(model, (x,), **options).output
        (out[0].square().sum() + out[1].sum()).backward()
        return [*out, *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = run()
    for options in ({"gradients": True}, {"attached": True}, {"gradients": True, "attached": True}):
        assert all(torch.equal(a, b) for a, b in zip(plain, run(**options), strict=True))


def test_a_graph_that_outlives_its_trace_keeps_no_gradient() -> None:
    trace = hookattn.trace(Kernel(by_half), operands(), gradients=True)
    out, gradient = trace.output, trace[0].gradient
    assert gradient is not None
    import gc
    import weakref

    gone = weakref.ref(gradient)
    del trace, gradient
    gc.collect()
    assert gone() is None
    out.sum().backward()


# ------------------------------------------------------------------------------------------------------------- edits


def test_edited_calls_have_the_gradient_of_what_the_model_goes_on_with() -> None:
    """The kernel's own output of an edited head is dropped, and would have a gradient of 0."""
    model, x = Two(), draw(B, T, 8, seed=1, dtype=F64)
    plain = hookattn.trace(model, (x,), gradients=True)
    sum(y.square().sum() for y in plain.output).backward()
    trace = hookattn.edited(model, (x,), edit.scale("weights", 2.0, path="first", heads=[1]), gradients=True)
    sum(y.square().sum() for y in trace.output).backward()
    call, before = trace["first"], plain["first"]
    of_output = 2 * call.output
    torch.testing.assert_close(call.grad("output"), of_output)
    torch.testing.assert_close(call.grad("weights"), of_output @ call.v.mT)
    torch.testing.assert_close(call.grad("v"), call.weights.mT @ of_output)
    torch.testing.assert_close(call.grad("weights")[:, 1], 2 * before.grad("weights")[:, 1])
    for name in ("scores", "q", "k"):
        with pytest.raises(GradientError, match=r"not all of its weights .*scale\(weights\) head 1"):
            call.grad(name)
    other, same = (c.at(heads=0) for c in (call, before))
    torch.testing.assert_close(other.grad("q"), same.grad("q"))
    assert torch.equal(trace["second"].grad("q"), plain["second"].grad("q"))
    trace = hookattn.edited(model, (x,), edit.zero("output", path="first", heads=[1]), gradients=True)
    sum(y.sum() for y in trace.output).backward()
    assert bool((trace["first"].grad("output") == 1).all())
    with pytest.raises(GradientError, match=r"not all of its output .*zero\(output\)"):
        trace["first"].grad("weights")


def test_a_knocked_out_edge_has_no_gradient_of_its_score() -> None:
    model, x = Two(), draw(B, T, 8, seed=1, dtype=F64)
    trace = hookattn.edited(model, (x,), edit.knockout(path="first", queries=[3], keys=[1]), gradients=True)
    sum(y.square().sum() for y in trace.output).backward()
    call = trace["first"]
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[3, 1] = False
    expected = Explicit(D**-0.5, mask=mask).gradients(call.q, call.k, call.v, call.grad("output"))
    assert max(differences(call, expected).values()) < 1e-10
    assert not call.grad("scores")[:, :, 3, 1].any()
