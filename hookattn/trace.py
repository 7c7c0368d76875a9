"""The Trace: every attention call of one or more forwards, in execution order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor

from .attention import dot_scores, finish_scores, softmax_weights
from .certificate import UNVERIFIED, Certificate
from .errors import FieldNotCaptured, HookattnError, SelectionError
from .record import FIELDS
from .site import Site

Load = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Attention that ran and is not in the trace: where, why, in which steps."""

    path: str
    reason: str
    steps: tuple[int, ...] = (0,)


@dataclass(eq=False)
class Call:
    """One attention call. The fields of the contract are attributes; letters: B H G T S D E as in the documentation.

    Attributes:
        site: where it happened.
        step: which forward of the trace, from 0.
        index: its place among all calls of the trace.
        tap: what saw the kernel.
        dtype: the dtype the kernel ran in.
        scale: the kernel's own factor on q·kᵀ; a tensor broadcastable to B H T S where it is learned per head.
        softcap: ``c`` of ``c·tanh(s/c)``, or None.
        causal: whether the kernel itself hid later keys (the ``mask`` has it in any case).
        window: the kernel's own sliding window in keys, or None.
        dropout: probability of dropout between the weights and ``v``.
        heads: the query heads kept; None: all.
        kv_heads: for each kept head its index in ``k`` and ``v``; None: head ``h`` has ``h // (H / G)``.
        queries: the query rows kept; None: all.
        own_scores: ``scores`` are the model's own and are more than scale, soft-cap and bias of q·k (heads mixed, say).
        mixed: the model changed the weights after the softmax, beyond dropout, before they met ``v``.
        notes: what a reader has to know.
        certificate: how faithful it is.
    """

    site: Site
    step: int
    index: int
    tap: str
    dtype: torch.dtype
    scale: float | Tensor
    softcap: float | None = None
    causal: bool = False
    window: int | None = None
    dropout: float = 0.0
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    queries: tuple[int, ...] | None = None
    own_scores: bool = False
    mixed: bool = False
    notes: tuple[str, ...] = ()
    certificate: Certificate = UNVERIFIED
    derivable: tuple[str, ...] = ()
    fields: dict[str, Tensor | Load | None] = field(default_factory=dict, repr=False)

    def get(self, name: str) -> Tensor | None:
        """A field by name; None where the call has none (``bias``, ``sinks``).

        Raises:
            FieldNotCaptured: it was not kept.
        """
        if name in self.fields:
            value = self.fields[name]
            return value() if callable(value) else value
        if name in self.derivable:
            return self._derive(name)
        if name not in FIELDS:
            raise AttributeError(f"a call has no field {name!r}; there are {', '.join(FIELDS)}.")
        kept = [f for f in FIELDS if f in self.fields or f in self.derivable]
        raise FieldNotCaptured(
            f"{name!r} of {self.site.label} was not captured (captured: {', '.join(kept)}); "
            f"trace again with capture={tuple(f for f in FIELDS if f in kept or f == name)!r}."
        )

    def _tensor(self, name: str) -> Tensor:
        value = self.get(name)
        if value is None:
            raise HookattnError(f"{self.site.label} has no {name}.")
        return value

    def _derive(self, name: str) -> Tensor:
        q, k = self._tensor("q"), self._tensor("k")
        if self.kv_heads is not None:
            k = k[:, list(self.kv_heads)]
        with torch.no_grad():
            if name == "scores" or "scores" not in self.fields:
                scores = finish_scores(dot_scores(q, k, self.scale), self.softcap, self.get("bias"))
                if name == "scores":
                    return scores
            else:
                scores = self._tensor("scores")
            return softmax_weights(scores, self.get("mask"), self.get("sinks")).to(self.dtype)

    @property
    def q(self) -> Tensor:
        """B H T D: the query as it enters the dot product."""
        return self._tensor("q")

    @property
    def k(self) -> Tensor:
        """B G S D: the key, cache included, not repeated for grouped queries."""
        return self._tensor("k")

    @property
    def v(self) -> Tensor:
        """B G S E: the value."""
        return self._tensor("v")

    @property
    def bias(self) -> Tensor | None:
        """Finite additive terms, broadcastable to B H T S, or None."""
        return self.get("bias")

    @property
    def scores(self) -> Tensor:
        """B H T S: scale·q·kᵀ, soft-capped, plus bias; no mask in it."""
        return self._tensor("scores")

    @property
    def mask(self) -> Tensor:
        """bool, broadcastable to B H T S: True = may attend."""
        return self._tensor("mask")

    @property
    def sinks(self) -> Tensor | None:
        """H, or broadcastable to B H T 1: learned logits that join the softmax and are dropped; or None."""
        return self.get("sinks")

    @property
    def weights(self) -> Tensor:
        """B H T S: softmax over S where mask, before dropout."""
        return self._tensor("weights")

    @property
    def output(self) -> Tensor:
        """B H T E: what the model's own kernel returned."""
        return self._tensor("output")

    @property
    def empty_rows(self) -> Tensor:
        """bool, broadcastable to B H T: rows with nothing to attend to."""
        return ~self.mask.any(-1)

    def has(self, name: str) -> bool:
        """Whether a field was captured, or can be derived from what was."""
        return name in self.fields or name in self.derivable

    @property
    def shape(self) -> str:
        """The extents that are known, as text."""
        for name, letters in (
            ("weights", "BHTS"),
            ("scores", "BHTS"),
            ("q", "BHTD"),
            ("output", "BHTE"),
            ("k", "BGSD"),
            ("v", "BGSE"),
        ):
            value = self.fields.get(name)
            if value is not None:
                tensor = value() if callable(value) else value
                return " ".join(f"{a}{n}" for a, n in zip(letters, tensor.shape, strict=False))
        return "?"

    def __repr__(self) -> str:
        return (
            f"Call({self.index}: {self.site.label}, layer {self.site.layer}, {self.site.stack} {self.site.kind}, "
            f"step {self.step}, {self.shape}, {self.tap}, {self.certificate.status})"
        )


@dataclass(eq=False)
class Trace:
    """Calls in execution order, and what is needed to read them.

    Attributes:
        calls: the calls.
        skipped: attention that ran and could not be read, with the reason.
        tokens: one list of token strings per batch entry, or None.
        output: what the traced forward returned (of the last one; not saved).
        model: class name of the model, its configuration, and the versions of the libraries that ran it.
        notes: what holds for the whole trace.
        selection: what was asked for.
        path: the file it is in, if it is in one.
    """

    calls: list[Call] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    tokens: list[list[str]] | None = None
    output: Any = field(default=None, repr=False)
    model: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    selection: dict[str, Any] = field(default_factory=dict)
    path: str | None = None

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    @overload
    def __getitem__(self, key: int | str) -> Call: ...
    @overload
    def __getitem__(self, key: slice) -> Trace: ...
    def __getitem__(self, key: int | slice | str) -> Call | Trace:
        """A call by position or by module path, or a Trace of a slice of them.

        Raises:
            SelectionError: no such call, or a path that ran more than once.
            IndexError: a position out of range.
        """
        if isinstance(key, slice):
            return self._with(self.calls[key])
        if isinstance(key, int):
            return self.calls[key]
        found = [c for c in self.calls if c.site.path == key]
        if len(found) == 1:
            return found[0]
        if found:
            steps = sorted({c.step for c in found})
            raise SelectionError(
                f"{key!r} ran {len(found)} times, in steps {steps}; use trace.select(path={key!r}, step=…)."
            )
        raise SelectionError(f"no call at {key!r}; there are {self._known(lambda c: c.site.path)}.")

    def select(
        self,
        *,
        layer: int | Sequence[int] | None = None,
        stack: str | None = None,
        kind: str | None = None,
        step: int | Sequence[int] | None = None,
        path: str | None = None,
        tap: str | None = None,
    ) -> Trace:
        """The calls that fit all of the given; layers may be negative, from the end of each stack, and so may steps.

        Raises:
            SelectionError: nothing fits; says what there is.
        """

        def fits(wanted: int | Sequence[int] | None, n: int | None, last: int) -> bool:
            return wanted is None or n in {
                i if i >= 0 else last + 1 + i for i in ([wanted] if isinstance(wanted, int) else wanted)
            }

        last_step = max((c.step for c in self.calls), default=0)
        last: dict[tuple[str, str], int] = {}
        for c in self.calls:
            place = (c.site.stack, c.site.kind)
            last[place] = max(last.get(place, 0), c.site.layer or 0)
        kept = [
            c
            for c in self.calls
            if (stack is None or c.site.stack == stack)
            and (kind is None or c.site.kind == kind)
            and (path is None or c.site.path == path)
            and (tap is None or c.tap == tap)
            and fits(step, c.step, last_step)
            and fits(layer, c.site.layer, last[(c.site.stack, c.site.kind)])
        ]
        if not kept:
            asked = {
                k: v
                for k, v in (
                    ("layer", layer),
                    ("stack", stack),
                    ("kind", kind),
                    ("step", step),
                    ("path", path),
                    ("tap", tap),
                )
                if v is not None
            }
            raise SelectionError(
                f"no call fits {asked}; there are layers {self._known(lambda c: c.site.layer)}, stacks "
                f"{self._known(lambda c: c.site.stack)}, kinds {self._known(lambda c: c.site.kind)}, "
                f"steps {self._known(lambda c: c.step)}."
            )
        return self._with(kept)

    def _known(self, of: Callable[[Call], Any]) -> list[Any]:
        return list(dict.fromkeys(of(c) for c in self.calls))

    def _with(self, calls: Iterable[Call]) -> Trace:
        return Trace(
            list(calls), self.skipped, self.tokens, self.output, self.model, self.notes, self.selection, self.path
        )

    @property
    def attentions(self) -> tuple[Any, ...]:
        """What ``output_attentions=True`` would have returned: one B H T S tensor a layer (for several steps, a tuple
        of such tuples).

        Raises:
            SelectionError: more than one stack or kind is in the trace; select one first.
            FieldNotCaptured: the weights were not kept.
        """
        places = list(dict.fromkeys((c.site.stack, c.site.kind) for c in self.calls))
        if len(places) > 1:
            raise SelectionError(
                "attentions of which stack? The trace has "
                + ", ".join(f"select(stack={s!r}, kind={k!r})" for s, k in places)
                + "; take one of these first."
            )
        steps = list(dict.fromkeys(c.step for c in self.calls))
        made = tuple(tuple(c.weights for c in self.calls if c.step == s) for s in steps)
        return made[0] if len(made) == 1 else made

    @property
    def faithful(self) -> bool:
        """Whether every call's certificate is within tolerance."""
        return all(c.certificate.faithful for c in self.calls)

    def save(self, path: str | PathLike[str], *, compact: bool = False) -> str:
        """Write the trace to one safetensors file.

        Args:
            path: the file; an older one is replaced only when the new one is complete.
            compact: leave out scores and weights that can be derived from the other fields; they are derived on access
                (to within rounding, where the model formed them itself).

        Returns:
            The path.

        Raises:
            TraceWriteError: the file could not be written; nothing is left under its name.
        """
        from .store.document import save

        return save(self, path, compact=compact)

    def __repr__(self) -> str:
        where = f" of {self.model['class']}" if self.model.get("class") else ""
        bad = sum(c.certificate.status == "unfaithful" for c in self.calls)
        state = f", {bad} unfaithful" if bad else ""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"Trace({len(self.calls)} calls{where}{state}{skipped})"
