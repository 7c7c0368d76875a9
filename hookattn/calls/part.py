"""What of a trace is drawn: calls, one batch entry, heads, queries and keys, each with its label.

Letters: B batch, H query heads, G key/value heads, T queries, S keys, D query/key width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import checks
from ..attention.functional import sink_column, with_four_axes
from ..attention.kernel_call import DERIVED, FIELD_SPECS
from ..errors import FieldNotCaptured, SelectionError
from ..printable import printable
from .call import Call
from .edits import edited_entries, edits_in_words
from .extents import extents_of, per_query_head
from .labels import labels
from .parts import chosen_positions, end_of, read_once
from .query_positions import query_positions
from .trace_data import TraceData, check_trace

Positions = slice | Sequence[int] | int | None


class Where(TypedDict, total=False):
    """What every view takes to say what is drawn.

    Attributes:
        layer, stack, kind, step, path: which call, as :meth:`hookattn.Trace.select` takes them.
        batch: which batch entry; by default the first.
        heads: which heads, by their numbers in the model; by default all that were captured.
        queries, keys: which positions; by default all. Queries count the captured rows' own places in the call.
        tokens: labels of the queries, and in self-attention of the keys; by default the trace's own.
        key_tokens: labels of the keys.
    """

    layer: int | None
    stack: str | None
    kind: str | None
    step: int | None
    path: str | None
    batch: int
    heads: Sequence[int] | int | None
    queries: Positions
    keys: Positions
    tokens: Sequence[str] | None
    key_tokens: Sequence[str] | None


@dataclass(frozen=True, eq=False)
class Part:
    """One batch entry of one call, with the heads that are drawn.

    Attributes:
        call: the call, cut down to the batch entry and the heads: what is read of it is read, or derived, of these.
        heads: H, their numbers in the model.
        rows: which of its T queries are drawn.
        columns: which of its S keys are drawn.
        places: T, the key position of each query; None where queries and keys are not places in one sequence.
        queries: a label for each of its T queries.
        keys: a label for each of its S keys.
    """

    call: Call
    heads: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    places: tuple[int, ...] | None
    queries: tuple[str, ...]
    keys: tuple[str, ...]

    def field(self, name: str, query: int | None = None) -> Tensor | None:
        """A field of the call without its batch axis: on the CPU in float64, H T S, or H T D and H S D; None: none.

        Args:
            name: of the field.
            query: one of the T queries, of which alone it is read or derived: T is 1 then.

        Raises:
            FieldNotCaptured: it was not kept; names the ``capture=``.
        """
        value = self._value(name, query)
        return None if value is None else value.double()

    def tensor(self, name: str, query: int | None = None) -> Tensor:
        """As :meth:`field`, of a field that every call has."""
        found = self.field(name, query)
        assert found is not None
        return found

    def hidden(self, query: int | None = None) -> Tensor | None:
        """H T S, bool, True where the mask hides a key; None where the mask was not captured. Of a query: H 1 S."""
        mask = self._value("mask", query) if self.call.has("mask") else None
        return None if mask is None else ~mask.bool()

    def _value(self, name: str, query: int | None) -> Tensor | None:
        call, spec = self.call, FIELD_SPECS[name]
        if query is not None:
            call = call.at(queries=(call.queries or range(len(self.queries)))[query])
        value = call.get(name)
        if value is None:
            return None
        if spec.is_pairs:
            rows = len(self.queries) if query is None else 1
            value = value.expand(1, len(self.heads), rows, len(self.keys))
        elif spec.per_key_head:
            value = per_query_head(call, value, len(self.heads))
        elif spec.is_column:
            value = sink_column(value)
        return value[0].detach().cpu()

    def each_head(self) -> Iterator[Part]:
        """A part for each head, so that what is made of matrices one by one holds one of them."""
        if len(self.heads) == 1:
            yield self
            return
        for head in self.heads:
            yield replace(self, call=self.call.at(heads=head), heads=(head,))

    @property
    def row_labels(self) -> list[str]:
        """Labels of the queries that are drawn."""
        return [self.queries[i] for i in self.rows]

    @property
    def column_labels(self) -> list[str]:
        """Labels of the keys that are drawn."""
        return [self.keys[j] for j in self.columns]

    @property
    def stack(self) -> str:
        """Which stack, kind of attention and later step it is, where the trace names them; else empty."""
        site, step = self.call.site, self.call.step
        named = [] if site.stack == "main" else [site.stack]
        named += [] if site.kind == "self" else [f"{site.kind}-attention"]
        return printable(" ".join(named + ([f"step {step}"] if step else [])))

    @property
    def title(self) -> str:
        """Which call it is, as short as the trace allows."""
        site = self.call.site
        return f"{self.stack} {site.label if site.layer is None else f'layer {site.layer}'}".strip()

    @cached_property
    def first_key(self) -> int:
        """The first key that any query may attend to: what padding stands before it is no sink."""
        if not self.call.has("mask"):
            return 0
        return int(with_four_axes(self.call.mask)[0].flatten(0, 1).any(0).byte().argmax())

    def learned_sink(self, query: int) -> float | None:
        """The logit of the learned sink of the first head, beside the scores of a query; None: it has none."""
        sinks = self.field("sinks", query)
        return None if sinks is None else float(sinks[0].flatten()[0])

    @property
    def edited(self) -> str:
        """What was edited in the call, in words; empty: nothing."""
        return edits_in_words(self.call.edits)

    def set_weights(self, query: int) -> Tensor | None:
        """bool, broadcastable to H S: which weights of a query an edit has set; None: none."""
        if not self.call.edits:
            return None
        number = (self.call.queries or range(len(self.queries)))[query]
        shape = (1, len(self.heads), 1, len(self.keys))
        found = edited_entries(self.call.edits, "weights", shape, torch.device("cpu"), self.heads, (number,))
        return None if found is None else found[0, :, 0]

    @property
    def doubt(self) -> str:
        """What a certificate says against the call, and the axes that no certificate can vouch for; empty: nothing."""
        found, guessed = self.call.certificate, self.call.guessed
        said = "" if found.faithful else "not verified"
        if found.status == "unfaithful":
            said = f"unfaithful: off by {found.output_error:.1e}, allowed {found.tolerance:.1e}"
        axes = f"axes guessed: {' '.join(guessed)}" if guessed else ""
        return "; ".join(filter(None, (said, axes)))


def parts_of(
    trace: TraceData,
    *,
    layer: int | None = None,
    stack: str | None = None,
    kind: str | None = None,
    step: int | None = None,
    path: str | None = None,
    batch: int = 0,
    heads: Sequence[int] | int | None = None,
    queries: Positions = None,
    keys: Positions = None,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
) -> list[Part]:
    """A part of each call that fits; see :class:`Where`.

    Raises:
        SelectionError: nothing fits; an unknown batch entry, head or position.
        InputError: labels that are not as many as the positions, or are no text; or ``trace`` is none.
        FieldNotCaptured: nothing that was captured tells the extents.
    """
    check_trace(trace)
    if not trace.calls:
        raise SelectionError("the trace has no calls to draw.")
    batch = checks.whole("batch", batch)
    tokens, key_tokens = _label_list("tokens", tokens), _label_list("key_tokens", key_tokens)
    heads, queries, keys = read_once(heads), read_once(queries), read_once(keys)
    calls = trace.select(layer=layer, stack=stack, kind=kind, step=step, path=path).calls
    made = []
    for call in calls:
        b, h, t, s = _extents(call)
        (entry,) = chosen_positions("batch", batch, range(b), call, "batch entries")
        numbers = call.heads or tuple(range(h))
        what = "heads" if call.heads is None else "kept heads"
        chosen = numbers if heads is None else chosen_positions("heads", heads, numbers, call, what, end_of(call, "H"))
        at = _query_places(call, entry, t, s)
        names = labels(trace, call, entry, b, t, s, at, tokens, key_tokens)
        own, every = call.queries or tuple(range(t)), range(s)
        rows = own if queries is None else chosen_positions("queries", queries, own, call, "queries", end_of(call, "T"))
        columns = tuple(every) if keys is None else chosen_positions("keys", keys, every, call, "keys")
        # What is asked for whole needs no number, which a call that is nothing but a mask may not have.
        part = call.at(batch=None if b == 1 else entry, heads=None if chosen == numbers else chosen)
        made.append(Part(part, chosen, tuple(own.index(i) for i in rows), columns, at, *names))
    return made


def _label_list(name: str, given: Any) -> Sequence[str] | None:
    return None if given is None else checks.several(name, given, str, "labels, a text for each position")


def _extents(call: Call) -> tuple[int, int, int, int]:
    """B, H, T and S of a call.

    Raises:
        FieldNotCaptured: nothing that was captured tells; names the ``capture=``.
    """
    known = extents_of(call, "BHTS").known()
    if any(spec.is_pairs and spec.broadcast and call.fields.get(n) is not None for n, spec in FIELD_SPECS.items()):
        # Where a mask is all there is, the axes along which it is the same are drawn once.
        known = {**dict.fromkeys("BHTS", 1), **known}
    meets = any(call.has(name) for name in (*DERIVED, "mask", "q"))
    if not meets or not all(known.get(x) for x in "BHTS"):
        kept = tuple(call.fields)
        raise FieldNotCaptured(
            f"{call.site.label} has no picture: of {kept} nothing tells how its queries and keys meet; trace again "
            f"with capture={(*kept, 'mask', 'weights')!r}."
        )
    return known["B"], known["H"], known["T"], known["S"]


def _query_places(call: Call, batch: int, t: int, s: int) -> tuple[int, ...] | None:
    found = query_positions(call, t, s)
    return None if found is None else tuple(found[batch if len(found) > 1 else 0].tolist())
