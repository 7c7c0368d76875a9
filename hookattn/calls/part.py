"""What of a trace is drawn: calls, one batch entry, heads, queries and keys, each with its label.

Letters: B batch, H query heads, G key/value heads, T queries, S keys, D query/key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from torch import Tensor

from ..attention.functional import sink_column, with_four_axes
from ..attention.kernel_call import DERIVED, FIELD_SPECS
from ..errors import FieldNotCaptured, SelectionError
from .call import Call
from .extents import extents_of, key_heads
from .fields import Field, Later
from .labels import labels
from .query_positions import query_positions
from .trace_data import TraceData

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
        call: the call, cut down: B is 1, H the heads drawn, and G is H.
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

    def field(self, name: str) -> Tensor | None:
        """A field of the call without its batch axis: on the CPU in float64, H T S, or H T D and H S D; None: none.

        Raises:
            FieldNotCaptured: it was not kept; names the ``capture=``.
        """
        value = self.call.get(name)
        if value is None:
            return None
        if FIELD_SPECS[name].is_pairs:
            value = value.expand(1, len(self.heads), len(self.queries), len(self.keys))
        return value[0].detach().cpu().double()

    def tensor(self, name: str) -> Tensor:
        """As :meth:`field`, of a field that every call has."""
        found = self.field(name)
        assert found is not None
        return found

    @property
    def hidden(self) -> Tensor | None:
        """H T S, bool, True where the mask hides a key; None where the mask was not captured."""
        return self.tensor("mask") == 0 if self.call.has("mask") else None

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
        return " ".join(named + ([f"step {step}"] if step else []))

    @property
    def title(self) -> str:
        """Which call it is, as short as the trace allows."""
        site = self.call.site
        return f"{self.stack} {site.label if site.layer is None else f'layer {site.layer}'}".strip()

    @property
    def doubt(self) -> str:
        """What a certificate says against the call; empty where it is faithful."""
        found = self.call.certificate
        if found.status == "unfaithful":
            return f"unfaithful: off by {found.output_error:.1e}, allowed {found.tolerance:.1e}"
        return "" if found.faithful else "not verified"


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
        InputError: labels that are not as many as the positions.
        FieldNotCaptured: nothing that was captured tells the extents.
    """
    if not trace.calls:
        raise SelectionError("the trace has no calls to draw.")
    calls = trace.select(layer=layer, stack=stack, kind=kind, step=step, path=path).calls
    made = []
    for call in calls:
        b, h, t, s = _extents(call)
        if not -b <= batch < b:
            raise SelectionError(f"batch={batch}: {call.site.label} has {b} batch entries.")
        numbers = call.heads or tuple(range(h))
        chosen = numbers if heads is None else tuple(_head_numbers(heads, numbers, call))
        at = _query_places(call, batch % b, t, s)
        names = labels(trace, call, batch % b, b, t, s, at, tokens, key_tokens)
        own = call.queries or tuple(range(t))
        made.append(
            Part(
                _restricted_call(call, batch % b, [numbers.index(n) for n in chosen], chosen, h),
                chosen,
                tuple(own.index(i) for i in _selected_positions("queries", queries, own, call)),
                tuple(_selected_positions("keys", keys, tuple(range(s)), call)),
                at,
                *names,
            )
        )
    return made


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


def _restricted_call(call: Call, batch: int, index: list[int], heads: tuple[int, ...], h: int) -> Call:
    """One batch entry and some heads of a call; read, and derived, when they are asked for."""

    # Closures, not tensors: a figure of one head shall not read the others, and a page reads call by call.
    def take(x: Tensor, among: Sequence[int] = index) -> Tensor:
        x = with_four_axes(x)
        x = x[batch : batch + 1] if x.shape[0] > 1 else x
        return x[:, list(among)] if x.shape[1] > 1 else x

    def read(name: str) -> Tensor:
        value = call.get(name)
        assert value is not None
        spec = FIELD_SPECS[name]
        if not spec.per_key_head:
            return take(sink_column(value) if spec.is_column else value)
        of = key_heads(call, h, value.shape[1])
        return take(value, [of[i] for i in index]).expand(-1, len(index), -1, -1)

    fields: dict[str, Field] = {
        n: Later(read, n) if call.fields[n] is not None else None for n in FIELD_SPECS if n in call.fields
    }
    scale = take(call.scale) if isinstance(call.scale, Tensor) else call.scale
    return replace(call, fields=fields, scale=scale, heads=heads, kv_heads=None)


def _head_numbers(wanted: Sequence[int] | int, numbers: tuple[int, ...], call: Call) -> list[int]:
    asked = [wanted] if isinstance(wanted, int) else list(wanted)
    whole = call.heads is None
    found = [n + len(numbers) if whole and n < 0 else n for n in asked]
    missing = [a for a, n in zip(asked, found, strict=True) if n not in numbers]
    if missing or not asked:
        raise SelectionError(
            f"heads={asked}: {call.site.label} has {'' if whole else 'kept '}heads {listed(numbers)}"
            + (f", so there is no head {missing[0]}." if missing else ", and none is selected.")
        )
    return found


def _selected_positions(name: str, wanted: Positions, there: tuple[int, ...], call: Call) -> list[int]:
    """Positions among those that are there; negative ones from the last one on."""
    if wanted is None:
        return list(there)
    end = there[-1] + 1
    asked = (
        list(range(*wanted.indices(end)))
        if isinstance(wanted, slice)
        else ([wanted] if isinstance(wanted, int) else list(wanted))
    )
    if isinstance(wanted, slice):
        asked = [i for i in asked if i in there]
    found = [i + end if i < 0 else i for i in asked]
    missing = [a for a, i in zip(asked, found, strict=True) if i not in there]
    if missing or not asked:
        raise SelectionError(
            f"{name}={wanted}: {call.site.label} has {name} {listed(there)}"
            + (f", so there is none at {missing[0]}." if missing else ", and none is selected.")
        )
    return found


def listed(values: Sequence[object]) -> str:
    """Values for a message, some left out where they are many."""
    shown = [repr(v) for v in values]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "…", shown[-1]])
