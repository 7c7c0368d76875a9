"""What a trace holds: every attention call of one or more forwards, in execution order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Self, TypeVar, overload

from .. import checks
from ..errors import NoSuchCallError, SelectionError
from ..printable import printable
from .call import Call, Skipped
from .extents import extents_of
from .layer_counts import LayerCounts
from .parts import CallPart, read_once
from .site import without_wrappers
from .still import still_html

Label = TypeVar("Label", str, int)


@dataclass(eq=False)
class TraceData:
    """The data of a :class:`hookattn.Trace`, whose docstring says what the attributes are, and what reads it in memory.

    What is taken of it (a slice, a selection) is of the class that it was taken of.
    """

    calls: list[Call] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    tokens: list[list[str]] | None = None
    output: Any = field(default=None, repr=False)
    model: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    selection: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    stack_tokens: dict[str, list[list[str]]] = field(default_factory=dict)
    segments: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    @overload
    def __getitem__(self, key: int | str) -> Call: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: int | slice | str) -> Call | Self:
        """A call by position or by module path, or a trace of a slice of them.

        Raises:
            SelectionError: no such call, or a path that ran more than once. For a position out of range it is a
                NoSuchCallError, which is an IndexError, too.
        """
        if isinstance(key, slice):
            return self._with(self.calls[checks.int_slice("trace[…]", key)])
        if not isinstance(key, str):
            at = checks.index("trace[…]", key, "a position, a slice of them, or the path of a module")
            if not -len(self.calls) <= at < len(self.calls):
                raise NoSuchCallError(f"trace[{at}]: the trace has {len(self.calls)} calls, counted from 0.")
            return self.calls[at]
        path = self._own_path(key)
        found = [c for c in self.calls if c.site.path == path]
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
        heads: int | Sequence[int] | slice | None = None,
        queries: int | Sequence[int] | slice | None = None,
        batch: int | Sequence[int] | slice | None = None,
    ) -> Self:
        """The calls that fit all of the given, and of these some heads, queries or batch entries.

        Args:
            layer, step: one or several; negative ones count from the end, layers from that of each stack.
            stack, kind, path, tap: as ``call.site`` and ``call.tap`` have them.
            heads, queries, batch: parts of each call, as :meth:`hookattn.Call.at` takes them. Tokens are then those of
                the batch entries that are left.

        Raises:
            SelectionError: nothing fits, which says what there is; or ``layer`` or ``step`` is no int; or a call has no
                such head, query or batch entry.
            InputError: one of the others is no text.
            FieldNotCaptured: nothing that was captured tells how many heads, queries or batch entries a call has.
        """
        layers = None if layer is None else checks.several_ints("layer", layer)
        steps = None if step is None else checks.several_ints("step", step)
        for name, value in (("stack", stack), ("kind", kind), ("path", path), ("tap", tap)):
            if value is not None:
                checks.text(name, value)
        wanted = None if path is None else self._own_path(path)
        last_step = max((c.step for c in self.calls), default=0)
        counts = LayerCounts(c.site for c in self.calls)
        kept = [
            c
            for c in self.calls
            if (stack is None or c.site.stack == stack)
            and (kind is None or c.site.kind == kind)
            and (path is None or c.site.path == wanted)
            and (tap is None or c.tap == tap)
            and (steps is None or c.step in {i if i >= 0 else last_step + 1 + i for i in steps})
            and (layers is None or counts.naming(layers, c.site))
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
        if heads is None and queries is None and batch is None:
            return self._with(kept)
        return self._parts(kept, read_once(heads), read_once(queries), read_once(batch))

    def _parts(self, kept: Sequence[Call], heads: Any, queries: Any, batch: Any) -> Self:
        """A trace of parts of some calls, with the tokens of the batch entries that are left."""
        made = self._with([call.at(heads=heads, queries=queries, batch=batch) for call in kept])
        if batch is None:
            return made
        sizes = {extents_of(call, "B").b for call in kept}
        entries = CallPart.of(kept[0], None, None, batch)

        def own(lists: list[list[Label]] | None) -> list[list[Label]] | None:
            # Lists that are not one for each entry are of all entries.
            return lists if lists is None or {len(lists)} != sizes else list(entries.of_batch(tuple(lists)) or ())

        made.stack_tokens = {stack: own(lists) or [] for stack, lists in self.stack_tokens.items()}
        made.tokens, made.segments = own(self.tokens), own(self.segments)
        return made

    def _own_path(self, path: str) -> str:
        """A path as calls have it, of one that may be spelled as a wrapped model spells it."""
        return path if any(c.site.path == path for c in self.calls) else without_wrappers(path)

    def _known(self, of: Callable[[Call], Any]) -> list[Any]:
        return list(dict.fromkeys(of(c) for c in self.calls))

    def _with(self, calls: Iterable[Call]) -> Self:
        return replace(self, calls=list(calls))

    @property
    def attentions(self) -> tuple[Any, ...]:
        """What ``output_attentions=True`` would have returned: one B H T S tensor a layer (for several steps, a tuple
        of such tuples), in the order in which the calls ran.

        They are the weights that are in the trace: of the layers, heads and queries that were selected, none for what
        is in ``skipped``, before dropout, and 0 for a query that may attend to nothing. A model may return something
        else under that name, as one tensor a stage.

        Raises:
            SelectionError: more than one stack or kind is in the trace: select one first; or there are no calls; or a
                layer is in several pieces (query chunks, say) that do not make one tensor.
            FieldNotCaptured: the weights were not kept.
        """
        if not self.calls:
            few = ", ".join(f"{s.path or '<model>'} ({s.reason})" for s in self.skipped[:2])
            raise SelectionError("no attentions: the trace has no calls" + (f"; skipped: {few}." if few else "."))
        places = list(dict.fromkeys((c.site.stack, c.site.kind) for c in self.calls))
        if len(places) > 1:
            raise SelectionError(
                "attentions of which stack? The trace has "
                + ", ".join(f"select(stack={s!r}, kind={k!r})" for s, k in places)
                + "; take one of these first."
            )
        of: dict[tuple[int, str, int | None], Call] = {}
        for call in self.calls:
            first = of.setdefault((call.step, call.site.path, call.site.layer), call)
            if (first.heads, first.queries) != (call.heads, call.queries):
                raise SelectionError(
                    f"{call.site.label} (layer {call.site.layer}) is in several pieces in step {call.step}, which "
                    "do not make one tensor; call.notes say which they are."
                )
        steps = list(dict.fromkeys(c.step for c in self.calls))
        made = tuple(tuple(c.weights for c in self.calls if c.step == s) for s in steps)
        return made[0] if len(made) == 1 else made

    def certify(self) -> Self:
        """Measure the certificate of every call now, those that nobody has asked for as well.

        Returns:
            The trace itself.
        """
        for call in self.calls:
            _ = call.certificate
        return self

    @property
    def faithful(self) -> bool:
        """Whether every call's certificate is within tolerance."""
        return all(c.certificate.faithful for c in self.calls)

    def _repr_html_(self) -> str:
        """What a notebook shows: the calls in a table, each with small pictures of its heads."""
        return still_html(self, "trace")

    def __repr__(self) -> str:
        where = f" of {printable(str(self.model['class']))}" if self.model.get("class") else ""
        bad = sum(c.certificate.status == "unfaithful" for c in self.calls)
        state = f", {bad} unfaithful" if bad else ""
        guessed = sum(bool(c.guessed) for c in self.calls)
        state += f", axes guessed in {guessed}" if guessed else ""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{type(self).__name__}({len(self.calls)} calls{where}{state}{skipped})"


def check_trace(trace: object, name: str = "trace") -> None:
    """Refuse what is no trace, where a file can't be opened: what has to have one in memory.

    Raises:
        InputError: it is something else; of a path says how to open it.
    """
    if not isinstance(trace, TraceData):
        opened = isinstance(trace, (str, PathLike))
        raise checks.wrong(name, trace, "a Trace" + (" (hookattn.load(path) opens a file)" if opened else ""))
