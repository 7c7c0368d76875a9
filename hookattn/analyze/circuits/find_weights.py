"""Finds the weights of heads by values, not by names: the products whose results the kernel was given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ...api import tracing
from ...attention.functional import compute_dtype
from ...calls.call import Call
from ...calls.certificate import tolerance
from ...calls.extents import extents_of
from ...recording.forward_inputs import arguments
from .circuit import Circuit, Projection
from .match_values import LEAST, Match, affine, equal, norms
from .record_products import Product, Products

# Modules are written in every possible way (one packed projection, three, a fused kernel's own layout), and their names
# say nothing certain. Values do: what a kernel is given is the result of some product, number for number.

_LINEAR = "no product with fixed weights has it as its result"
_TURNED = "no product with fixed weights has it as its result, nor the norms of its heads (a norm of q or k, say)"
_APART = (
    "the norms of its heads are there, but queries and keys at one place do not have the product of the projections'"
)
_READ = "no product with fixed weights reads the merged heads (a gate, a norm, or something else between)"


class _Source(NamedTuple):
    """The product that a kernel's argument is the result of.

    Attributes:
        product: the product.
        match: which of its columns these are.
        argument: the kernel's argument, n H·D.
    """

    product: Product
    match: Match
    argument: Tensor

    @property
    def result(self) -> Tensor:
        """n H·D: the columns of the product, with their factors; the argument before it was turned."""
        y = self.product.y[:, self.match.columns].to(self.argument)
        return y if self.match.factor is None else y * self.match.factor.to(self.argument)


@torch.no_grad()
def circuit(model: nn.Module, inputs: Any) -> list[Circuit]:
    """Run a model once, and find the weights of each of its attention calls.

    Every product of activations with fixed weights is watched, however it is written and whichever module it is in: the
    one whose columns are the kernel's ``v`` is W_V, in any order of q, k, v, heads and groups; the one that reads the
    kernel's output is W_O; q and k are found likewise, or by the norms of their heads where rotary positions lie
    between. What no values prove is left out, with the reason: nothing is taken from a module's name.

    Args:
        model: any module that :func:`hookattn.trace` traces; in eval mode, as dropout before a product hides it.
        inputs: as for :func:`hookattn.trace`. Some dozen different tokens, without a cache, without padding: what is
            equal for all of them proves nothing. The inputs of all products are held until it is done.

    Returns:
        One :class:`Circuit` for each call, in order.

    Raises:
        HookattnError: as :func:`hookattn.trace`.
    """
    args, kwargs = arguments(inputs)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, in which no product can be seen
    try:
        with (
            tracing(model, capture=("q", "k", "v", "output"), verify="off") as trace,
            Products(model, lambda: len(trace.calls)) as products,
        ):
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return [_circuit(call, i, products.found) for i, call in enumerate(trace.calls)]


def _circuit(call: Call, i: int, products: list[Product]) -> Circuit:
    """What is known of call ``i``: what its arguments come from ran before it (nearest first), what reads it after."""
    before, after = [p for p in reversed(products) if p.seen <= i], [p for p in products if p.seen > i]
    found: dict[str, Projection] = {}
    missing: dict[str, str] = {}
    turned: dict[str, _Source] = {}
    for name in "qkv":
        value = call.get(name)
        if value is None:
            missing[name] = f"its scores are no product of queries and keys, but {call.score}"
            continue
        source = _product_of_argument(value, before, i, turns=name != "v")
        if source is None:
            n = value.shape[0] * value.shape[2]
            short = f"; {n} tokens are fewer than the {LEAST} that more than equality takes" if n < LEAST else ""
            missing[name] = (_LINEAR if name == "v" else _TURNED) + short
            continue
        found[name] = _projection(source.product, source.match, *value.shape[1::2])
        if source.match.basis == "norms":
            turned[name] = source
    # Norms alone leave the order of the columns in a head open. Where q and k were both found so, their dot product at
    # one place tells whether the orders agree.
    if len(turned) == 2 and not _same_dot_products(
        turned["q"], turned["k"], call.q.shape[3], _coarser(call.q.dtype, call.dtype)
    ):
        for name in turned:
            del found[name]
            missing[name] = _APART
    output = call.get("output")
    projection = None if output is None else _output_projection(output, after, i + 1)
    if projection is None:
        missing["o"] = _READ if output is not None else "the kernel never hands out its output"
    else:
        found["o"] = projection
    return Circuit(call.site, call.index, _heads(call), call.v.shape[1], missing=missing, **found)


def _heads(call: Call) -> int:
    """How many query heads a call has."""
    told = extents_of(call, "H").h
    assert told is not None, "q or output was kept"
    return told


def _merged_heads(x: Tensor) -> Iterator[Tensor]:
    """B H T D as n m with n tokens: batch entries outermost, then innermost."""
    wide = x.detach().to(compute_dtype(x.dtype))
    yield rearrange(wide, "b h t d -> (b t) (h d)")
    if wide.shape[0] > 1 and wide.shape[2] > 1:
        yield rearrange(wide, "b h t d -> (t b) (h d)")


def _product_of_argument(value: Tensor, products: Iterable[Product], i: int, turns: bool) -> _Source | None:
    """The product whose result is a kernel's argument, B H T D."""
    heads = value.shape[1]
    targets = list(_merged_heads(value))
    n, m = targets[0].shape
    fitting = [p for p in products if p.x.shape[0] == n and p.weight.shape[1] >= m]
    near = [p for p in fitting if p.seen == i]
    # Equality proves itself, so that a product may stand anywhere before the call: keys of an encoder are projected
    # early, and a decoder's layers share them.
    for p in fitting:
        for target in targets:
            match = equal(target, p.y, p.weight)
            if match is not None:
                return _Source(p, match, target)
    # The looser fits are tried on what ran since the call before alone: in a deep model some product of another layer
    # is close to anything.
    for p in near:
        for target in targets:
            match = affine(target, p.y, p.weight, _coarser_of_product(value, p))
            if match is not None:
                return _Source(p, match, target)
    # A rotation leaves the norm of a head as it is, and little else does.
    for p in near if turns else ():
        for target in targets:
            match = norms(target, p.y, heads, _coarser_of_product(value, p))
            if match is not None:
                return _Source(p, match, target)
    return None


def _same_dot_products(query: _Source, key: _Source, d: int, dtype: torch.dtype) -> bool:
    """Whether query and key of each token have the product that they have before they are turned.

    Two rotary positions that are the same cancel out of it; two orders of the columns, say, do not.

    Args:
        query, key: where these come from.
        d: D.
        dtype: that they were computed in.
    """
    if len(query.argument) != len(key.argument):  # of two sequences: nobody is in one place with anybody
        return True
    q, q_before, k, k_before = (
        rearrange(x.double(), "n (h d) -> n h d", d=d) for own in (query, key) for x in (own.argument, own.result)
    )
    k, k_before = (repeat(x, "n g d -> n (g group) d", group=q.shape[1] // x.shape[1]) for x in (k, k_before))
    apart = ((q * k).sum(-1) - (q_before * k_before).sum(-1)).abs()
    return bool((apart <= tolerance(dtype) * q.norm(dim=-1) * k.norm(dim=-1)).all())


def _projection(p: Product, match: Match, heads: int, d: int) -> Projection:
    weight = p.weight.detach()[:, match.columns]
    bias = None if p.bias is None else p.bias.detach()[match.columns]
    if match.factor is not None:
        weight = (weight * match.factor).to(weight.dtype)
        bias = None if bias is None else (bias * match.factor).to(bias.dtype)
    if match.offset is not None:
        bias = (match.offset if bias is None else bias + match.offset).to(weight.dtype)
    bias = None if bias is None else rearrange(bias, "(h d) -> h d", h=heads, d=d)
    weight = rearrange(weight, "c (h d) -> h c d", h=heads, d=d).contiguous()
    return Projection(weight, bias, match.basis, p.name)


def _output_projection(output: Tensor, products: Iterable[Product], i: int) -> Projection | None:
    """The projection that reads a kernel's output, B H T E."""
    heads = output.shape[1]
    targets = list(_merged_heads(output))
    n, m = targets[0].shape
    near = [p for p in products if p.seen == i and p.x.shape[0] == n and p.x.shape[1] >= m]
    # From the fit that leaves nothing open to the one that leaves most.
    for fit in (_identical, equal, _affine_without_offset):
        for p in near:
            x = p.x.to(compute_dtype(p.x.dtype))
            for target in targets:
                match = fit(target, x, p.weight.t())
                if match is not None:
                    weight = p.weight.detach()[match.columns]
                    if match.factor is not None:
                        weight = (weight / match.factor.unsqueeze(1)).to(weight.dtype)
                    bias = None if p.bias is None else p.bias.detach().clone()
                    return Projection(rearrange(weight, "(h e) c -> h e c", h=heads), bias, match.basis, p.name)
    return None


def _identical(target: Tensor, source: Tensor, _: Tensor) -> Match | None:
    """The merged heads as they are: here columns that are the same are told by their order."""
    if target.shape != source.shape or not torch.equal(target, source.to(target.dtype)):
        return None
    return Match("equal", torch.arange(target.shape[1], device=source.device))


def _affine_without_offset(target: Tensor, source: Tensor, weight: Tensor) -> Match | None:
    """The merged heads but for constant factors."""
    match = affine(target, source, weight, _coarser(target.dtype, weight.dtype))
    return match if match is not None and match.offset is None else None


def _coarser_of_product(value: Tensor, p: Product) -> torch.dtype:
    return _coarser(value.dtype, p.x.dtype)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one with fewer digits."""
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)
