"""What a tap hands over: one attention call with its kernel's real arguments, in the layout of the contract."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .masks import Diagonal
from .pieces import Cut, Piece


class FieldSpec(NamedTuple):
    """What a tensor of a call is like. All that depends on which fields there are asks this.

    Attributes:
        name: of the field.
        axes: a letter for each axis; ``1``: an axis of size 1; ``*`` at the end: maybe one more, of the field's own.
        broadcast: it may have size 1 on any axis, where all positions have the same.
        optional: a call that was captured whole may have none.
        shared: the calls of a forward often have the same one, which is then kept and stored once.
        boolean: it is bool, and else floating.
        integer: it is int64.
        derived_from: the fields that it follows from; empty: it is kept or lost.
        kept_with: the field that it is captured with, asked for or not.
    """

    name: str
    axes: str
    broadcast: bool = False
    optional: bool = False
    shared: bool = False
    boolean: bool = False
    integer: bool = False
    derived_from: tuple[str, ...] = ()
    kept_with: str = ""

    @property
    def per_head(self) -> bool:
        """Whether it has an axis of query heads."""
        return "H" in self.axes

    @property
    def per_query(self) -> bool:
        """Whether it has an axis of queries."""
        return "T" in self.axes

    @property
    def per_key_head(self) -> bool:
        """Whether it has an axis of key heads, each of which several query heads may read."""
        return "G" in self.axes

    @property
    def is_pairs(self) -> bool:
        """Whether it has a number for each pair of a query and a key."""
        return self.axes == "BHTS"

    @property
    def is_column(self) -> bool:
        """Whether it has a number for each query, like one key more; as one axis alone it has one for each head."""
        return self.axes == "BHT1"

    @property
    def is_vectors(self) -> bool:
        """Whether it is a vector for each position, and not a number for each pair of positions."""
        return self.axes[-1] in "DE"


FIELD_SPECS: dict[str, FieldSpec] = {
    spec.name: spec
    for spec in (
        FieldSpec("q", "BHTD"),
        FieldSpec("k", "BGSD"),
        FieldSpec("v", "BGSE"),
        FieldSpec("bias", "BHTS", broadcast=True, optional=True, shared=True),
        FieldSpec("scores", "BHTS", derived_from=("q", "k", "bias")),
        FieldSpec("mask", "BHTS", broadcast=True, shared=True, boolean=True),
        FieldSpec("sinks", "BHT1", broadcast=True, optional=True, shared=True),
        FieldSpec("weights", "BHTS", derived_from=("scores", "mask", "sinks")),
        # Weights that were changed before they met the values are two matrices, and whoever asks for one sees both.
        FieldSpec("applied", "BHTS", optional=True, kept_with="weights"),
        FieldSpec("output", "BHTE"),
    )
}
"""The fields of a call, in the order in which they are listed, captured and written."""

# What else a kernel call has that is cut down with its fields when heads or queries are selected.
_BESIDE = (
    FieldSpec("undropped", "BHTE"),
    FieldSpec("scale", "BHTS", broadcast=True),
)
OUTPUT_GRADIENT = FieldSpec("output_grad", "BHTE")
"""The gradient of ``output``. No field of a forward: it comes with a backward, if one is asked for."""
TENSOR_SPECS: dict[str, FieldSpec] = {**FIELD_SPECS, **{spec.name: spec for spec in _BESIDE}}

FIELDS: tuple[str, ...] = tuple(FIELD_SPECS)
DERIVED: tuple[str, ...] = tuple(name for name, spec in FIELD_SPECS.items() if spec.derived_from)
"""What follows from other fields, each from those before it."""
STORED: tuple[str, ...] = tuple(n for n, spec in FIELD_SPECS.items() if not spec.derived_from and not spec.kept_with)
"""What is kept or lost by itself; a compact file of a softmax over q·k holds no more."""
_NEEDED = {name for spec in FIELD_SPECS.values() for name in spec.derived_from}
SOURCES: tuple[str, ...] = tuple(name for name in STORED if name in _NEEDED)
"""What has to be kept for all of :data:`DERIVED` to follow."""


DOT = "dot"
"""The score that is q·k."""


def asked_for(fields: Container[str]) -> tuple[str, ...]:
    """Of some fields those that have to be asked for, in the order of all: others come with them."""
    return tuple(f for f, spec in FIELD_SPECS.items() if f in fields and spec.kept_with not in fields)


BASES = ("kernel", "adapter", "followed", "guessed")
"""How it can be known which axis of a call is which, from what is surest: see ``basis`` of :class:`KernelCall`."""
KERNEL_BASIS: Mapping[str, str] = MappingProxyType(dict.fromkeys("BHTSG", "kernel"))
"""The basis of a call whose kernel documents the place of every axis."""


@dataclass(slots=True)
class KernelCall:
    """One attention call as its tap saw it; nothing in it is selected, copied or derived yet.

    A call whose scores are no product of queries and keys has ``q``, ``k`` and ``scale`` None, which :meth:`of_weights`
    makes. Their types do not say so, for the taps of all other kernels; what reads any call asks :attr:`shape`,
    :attr:`dtype`, :attr:`device` and :attr:`product` in their place.

    Attributes:
        q: B H T D, as it enters the dot product; None where there is none.
        k: B G S D, never repeated for grouped queries; None where there is none.
        v: B G S E; None where a listener is asked about weights, before they meet any.
        output: B H T E, what the model's own kernel returned; None where it has not run.
        scale: the kernel's own factor; a tensor (broadcastable to B H T S) where it is learned per head. None where the
            scores are no dot product.
        tap: the name of the tap.
        bias: finite additive terms, broadcastable to B H T S.
        mask: bool, broadcastable to B H T S, True = may attend.
        causal: whether the kernel itself hid later keys, beside ``mask``; for a tap to say, read as :attr:`diagonal`.
        offset: where the causal diagonal starts (see :func:`hookattn.attention.causal_mask`); likewise.
        window: the kernel's own sliding window in keys; likewise.
        softcap: ``c`` of ``c·tanh(s/c)``.
        sinks: H, or broadcastable to B H T 1.
        scores: the model's own finite scores, B H T S, where it formed them.
        weights: the model's own weights before dropout, B H T S, where it formed them. Always there where q or k is
            not, and where nobody knows how the normalizer makes them.
        applied: what the model really multiplied with ``v`` where that is not ``weights`` (dropout, head mixing): B H T
            S.
        dropout: probability of dropout between softmax and ``v``.
        undropped: what the same kernel returns with dropout off, where the weights are not formed.
        mixed: the model changed the weights after the softmax, beyond dropout (heads mixed, renormalised).
        softmax_dtype: the dtype the softmax ran in, where it is known and may differ from that of ``q``.
        opaque: ``scores`` are the model's own and are more than scale, soft-cap and bias of q·k.
        score: what the scores are: ``dot`` (q·k), or what was seen instead (``additive``, ``distance``, …).
        normalizer: what made weights of the scores: ``softmax``, or what was seen instead (``sigmoid``, ``none``, …);
            :mod:`hookattn.attention.normalizers` has those that can be computed again.
        basis: for each of B, H, T, S and G how it is known which axis that is: ``kernel`` (its documented place),
            ``adapter``, ``followed`` (by where the axis comes from), or ``guessed`` (by convention).
        outer_error: where the kernel never hands out ``output``: the measured distance of something further out.
        module: the module that the kernel itself was told it runs in.
        path: the module around all that the call is made of, where its parts ran in several; None: the running one.
        within: the child of the running module that the call belongs to, where a fused layer hides it.
        kind: ``self``, ``cross`` or ``joint``, where the axes of q and k tell it; None: they don't.
        piece: which part of one attention it is, where the model cut its queries out of a larger tensor.
        cuts: of B, H, G and T those that several processes each have a part of, and which this one has; no tap fills it
            in, as what processes have of a model is not told by its kernels.
        notes: what a reader has to know.
        edits: what a listener has noted of what it changed here. A tap hands it on, from the call that it asked about
            to those that it makes of the same attention later, and does nothing else with it.
        requests: for each batch entry the name of the request that it is of; None: nobody has said.
        lengths: for each batch entry how many of its queries and how many of its keys are its own, where entries are
            filled up at their end; None: nobody has said.
        result: the very tensor that the kernel returned and the model goes on with, whose gradient is that of
            ``output``; a view or a copy of it that a tap made has none. Not to be kept. None: the kernel hands out no
            such tensor, or nobody asks for gradients.
        result_form: brings a tensor laid out like ``result`` to B H T E; None: it is so.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor | None
    scale: float | Tensor
    tap: str
    bias: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    offset: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    scores: Tensor | None = None
    weights: Tensor | None = None
    applied: Tensor | None = None
    dropout: float = 0.0
    undropped: Tensor | None = None
    opaque: bool = False
    mixed: bool = False
    score: str = "dot"
    normalizer: str = "softmax"
    basis: Mapping[str, str] = field(default_factory=lambda: KERNEL_BASIS)
    softmax_dtype: torch.dtype | None = None
    outer_error: Tensor | None = None
    module: nn.Module | None = None
    path: str | None = None
    within: str = ""
    kind: str | None = None
    piece: Piece | None = None
    cuts: Mapping[str, Cut] | None = None
    notes: list[str] = field(default_factory=list)
    edits: object = None
    requests: tuple[str, ...] | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    result: Tensor | None = None
    result_form: Callable[[Tensor], Tensor] | None = None

    @property
    def diagonal(self) -> Diagonal:
        """What the kernel hides by itself, beside ``mask``."""
        return Diagonal(self.causal, self.offset, self.window)

    @classmethod
    def of_weights(
        cls,
        weights: Tensor,
        v: Tensor,
        output: Tensor | None,
        tap: str,
        *,
        score: str,
        normalizer: str,
        scores: Tensor | None = None,
        q: Tensor | None = None,
        k: Tensor | None = None,
    ) -> KernelCall:
        """A call whose scores are no dot product; the arguments are the attributes.

        Args:
            weights: B H T S, the model's own.
            v: B G S E.
            output: B H T E.
            tap, score, normalizer: words.
            scores: B H T S, finite, where the model formed them.
            q, k: B H T D and B G S D, where they are scored otherwise than by their product (a distance, say).
        """
        made = cls(q, k, v, output, None, tap, score=score, normalizer=normalizer)  # type: ignore[arg-type]
        made.weights, made.scores = weights, scores
        return made

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, T and S."""
        if self.q is not None and self.k is not None:
            b, h, t, _ = self.q.shape
            return b, h, t, self.k.shape[2]
        assert self.weights is not None, "a call without q or k has the weights that the model formed"
        b, h, t, s = self.weights.shape
        return b, h, t, s

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the kernel ran in."""
        return self._some.dtype

    @property
    def device(self) -> torch.device:
        """Where it ran."""
        return self._some.device

    @property
    def _some(self) -> Tensor:
        """A tensor that it has: it may have no queries, or no values yet."""
        some = next((x for x in (self.q, self.v, self.weights) if x is not None), None)
        assert some is not None
        return some

    @property
    def is_product(self) -> bool:
        """Whether the scores are scale·q·kᵀ, soft-capped, plus bias, and nothing else."""
        return not self.opaque and self.score == DOT and self.q is not None and self.k is not None


def is_plain(call: KernelCall) -> bool:
    """Whether a call is a softmax over scale·q·kᵀ with a mask at most, whose weights nobody formed, changed or dropped
    out: most calls of most models are, and are kept by a shorter way."""
    return (
        call.bias is call.sinks is call.scores is call.weights is call.applied is None
        and call.undropped is call.outer_error is None
        and call.softcap is None
        and call.softmax_dtype is None
        and call.piece is call.edits is call.requests is None
        and call.cuts is None
        and call.basis is KERNEL_BASIS
        and call.output is not None
        and type(call.scale) is float
        and call.score == DOT
        and call.normalizer == "softmax"
        and call.q is not None
        and call.k is not None
        and not (call.dropout or call.notes or call.opaque or call.mixed)
    )
