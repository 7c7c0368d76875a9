"""From a kernel's arguments to what is kept of the call.

:meth:`CallRecorder.keep` is where a kernel call becomes a :class:`~hookattn.calls.call.Call`. Its tensors are copied,
so that nobody but the trace writes to them, and mostly nothing more is done: what else was asked for follows from them,
and so does the certificate. Only where that will not be so, since q, k and v are not kept, or not as they are, it is
all derived and measured at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Size, Tensor

from ..attention.kernel_call import FIELD_SPECS, KERNEL_BASIS, KernelCall, is_plain
from ..attention.masks import split_additive
from ..attention.normalizers import OF_ONE, is_softmax
from ..attention.whole import Place
from ..calls.call import Call, call_like
from ..calls.certificate import UNVERIFIED
from ..calls.deriving import derive_field
from ..calls.edits import AppliedEdit, Chosen
from ..calls.fields import DERIVED, Derived, EditedRows, Field, Later
from ..calls.key_history import KeyHistories
from ..calls.mask_rule import MaskRule
from ..calls.site import Site
from ..torch_internals import devices
from ..torch_internals.isolation import is_isolated, isolated, no_gradients
from ..torch_internals.lazy_copies import snapshots
from ..torch_internals.tensor_memo import TensorMemo
from .arriving import Arrivals
from .call_statistics import captured_statistics
from .certifying import Certifier, Extras, is_small
from .host_transfer import Transfer
from .selection import Selection, grouped, restrict
from .verification import Edited, Measurement, kept_row_indices, measure


@runtime_checkable
class EditsOfCall(Protocol):
    """What a listener has noted of a call (``KernelCall.edits``), as far as it is recorded.

    Attributes:
        applied: what was done.
        kept: the numbers of the heads and queries that the call has, where it is a piece of an attention; None: all.
    """

    applied: list[AppliedEdit]

    @property
    def kept(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]: ...

    def as_it_ran(self, call: KernelCall) -> KernelCall:
        """The call as its weights were made: with the queries, keys and masks that the model's own were replaced by."""

    @property
    def set_rows(self) -> tuple[tuple[Chosen, Chosen, Chosen], Tensor] | None:
        """The batch entries, heads and queries whose weights were set, and to what, where the others follow from what
        is recorded; None: no weights were set, or the others do not."""

    def finish(self, call: KernelCall, wants: Callable[[str], bool]) -> None:
        """Put into a call what edits have made of its fields; ``wants``: whether a field will be kept."""


_RARE = ("sinks", "scores", "weights", "applied", "undropped", "outer_error")
_ANY = torch.empty(0)
_CACHES = (False, True, True, False)
"""Of q, k, v and output, which may be the memory of a cache."""


@functools.lru_cache(maxsize=1024, typed=True)
def _plain_values(
    tap: str, dtype: torch.dtype, scale: float, causal: bool, window: int | None, derivable: tuple[str, ...]
) -> dict[str, Any]:
    """What plain calls of one kind have in common, as the attributes of a Call; there is no tensor among it."""
    call = Call(Site(""), 0, 0, tap, dtype, scale, causal=causal, window=window, derivable=derivable)
    call.basis = dict(KERNEL_BASIS)
    return dict(vars(call))


class CallRecorder:
    """Makes Calls of kernel calls.

    Args:
        selection: what is kept of each.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
        streamed: whether calls leave memory as soon as they are complete.
        copy: whether copies are made at once, and not when somebody writes.
        warns: whether unfaithful calls are warned of.
        gradients: whether the gradients of outputs are kept, if any come.
        attached: whether what is kept stays in the model's graph.
    """

    def __init__(
        self,
        selection: Selection,
        verify: str,
        streamed: bool = False,
        copy: bool = False,
        warns: bool = True,
        gradients: bool = False,
        attached: bool = False,
    ):
        self.selection, self.verify = selection, verify
        self._copy, self._attached = copy, attached
        self._arrivals = Arrivals(selection.dtype, selection.device, copy) if gradients else None
        self._fields = selection.fields
        self._certifier = Certifier(verify == "full", warns)
        self._whole = not (selection.heads or selection.queries)
        self._streamed = streamed
        # Whether a plain call is kept as it is, with all that follows from it.
        self._keeps_plain = self._whole and not streamed and selection.keeps_all
        to_host = streamed or (selection.device is not None and selection.device.type == "cpu")
        self._transfer = Transfer() if to_host else None
        self._waiting: list[Call] = []
        self._memo = TensorMemo()
        self._last_rule: MaskRule | None = None
        self._last_rule_of: tuple[int, int, bool, int, int | None, torch.device] | None = None
        # What is streamed is put into histories where it is written, once it is there.
        # One history of several steps is a memory of its own, in no graph.
        self._histories = None if streamed or attached or selection.capture.isdisjoint(("k", "v")) else KeyHistories()

    def forget(self) -> None:
        """A new forward begins: nothing is shared with the one before, but keys and values that go on."""
        self._settle_waiting()
        self._memo.forget()
        if self._histories is not None:
            self._histories.look()

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""
        with isolated(additive, but=self._attached):
            return self._memo("split", additive, lambda: split_additive(additive))  # type: ignore[no-any-return]

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return field in self.selection.capture

    def _needs(self, field: str) -> bool:
        """Whether an edited field has to be formed: for what is kept, or for the statistics that are made of it."""
        return self.wants(field) or bool(self.selection.statistics)

    def _drop_unwanted(self, call: KernelCall) -> None:
        """Let go of what edits have formed for the statistics alone."""
        if not self.wants("weights"):
            call.weights = None
            if not self.wants("scores") and not call.is_product and call.q is not None:
                call.scores = None

    def hold(self, call: KernelCall) -> bool:
        """See :class:`~hookattn.recording.session.Holder`: a plain call without a mask can be held."""
        if not self._keeps_plain or call.mask is not None or not is_plain(call):
            return False
        if is_isolated(call.v):
            self._hold_plain(call)
        else:
            with isolated(call.v):
                self._hold_plain(call)
        return True

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        """What is kept of one call.

        Raises:
            SelectionError: a selected head or query is not there.
        """
        with isolated(call.v, but=self._attached):
            if self._keeps_plain and is_plain(call):
                self._hold_plain(call)
                made = self.keep_held(call, site, step, index)
                self._note_graph(made, call, None, None)
                return made
            if call.normalizer == OF_ONE and call.sinks is None:
                call.sinks = call.v.new_zeros(1, 1, 1, 1)  # so that its weights are a softmax to whoever reads them
            was_product = call.is_product
            edits, measured, set_rows = self._edited(call)
            heads = queries = groups = None
            statistics: dict[str, Tensor | None] = {}
            _, _, t, s = call.shape
            if not self._whole:
                heads, queries = self.selection.within(call, site.label)
            if self.selection.statistics:
                statistics, notes = captured_statistics(call, self.selection.statistics, site, heads, queries, edits)
                call.notes = [*call.notes, *notes]
                if edits:
                    self._drop_unwanted(call)
            made = Call.of(call, site, step, index)
            self._note_graph(made, call, heads, queries)
            mask = self._mask_rule(call, t, s, heads, queries)
            if not self._whole:
                place = Place.of(call)
                groups = restrict(call, heads, queries)
                made.heads = None if heads is None else tuple((place.heads.first or 0) + i for i in heads)
                made.kv_heads = None if groups is None else tuple(groups)
                if queries is not None:
                    rows = range(t)[queries] if isinstance(queries, slice) else queries
                    made.queries = tuple((place.rows.first or 0) + i for i in rows)
                    made.of_queries = place.rows.of
            made.derivable = self.selection.derivable_of(call)
            made.edits, made.own_by_edits = edits, was_product and not call.is_product
            if any(edit.field == "weights" for edit in edits):  # they follow from nothing any more
                made.derivable = tuple(name for name in made.derivable if name != "weights")
            stays = self._stays(call)
            waits = not stays and self._waits(call)
            if stays or waits:
                self._hold(call)
            if made.scale is not None:
                made.scale = call.scale  # of the heads and queries that are kept, and held
            self._place_fields(made, call, mask)
            if set_rows is not None:
                unset = call_like(vars(made), site, step, index, made.fields.copy())
                unset.edits, unset.certificate = (), UNVERIFIED
                places, values = set_rows
                whole = Size(call.shape)
                made.fields["weights"] = EditedRows(unset, "weights", whole, call.dtype, places, values.detach())
            if measured is not None:
                self._certifier.tell(made, measured)
            elif self.verify != "off":
                self._certify(made, call, mask, groups, stays or waits)
            if waits:
                self._waiting.append(made)
            elif not stays:
                self._settle(made, False)
            if statistics:
                made.keys = s
                made.fields.update((n, None if x is None else self._kept(x, True)) for n, x in statistics.items())
            if self._histories is not None:
                self._histories.note(made, site.crosses or t < s)
            return made

    def _note_graph(
        self, made: Call, call: KernelCall, heads: Sequence[int] | None, queries: Sequence[int] | slice | None
    ) -> None:
        """What of the model's graph was asked for: the gradient of the output, and fields that stay in it."""
        if self._arrivals is not None:
            made.gradient = self._arrivals.awaited(call, heads, queries)
        if self._attached:
            made.attached = True
            _say_detached(made, call)

    def _edited(
        self, call: KernelCall
    ) -> tuple[tuple[AppliedEdit, ...], Measurement | None, tuple[tuple[Chosen, Chosen, Chosen], Tensor] | None]:
        """What was edited in a call, which gets the fields that edits have made; its measurement; and the weights that
        were set, where the whole matrix of weights is made when somebody reads it.

        It is measured before it gets them: as its kernel was run and what it returned, which covers all heads. Where
        the model formed weights that were exchanged, these and what the model made of them.
        """
        edits = call.edits
        if not isinstance(edits, EditsOfCall) or not edits.applied:
            call.edits = None
            return (), None, None
        measured = None
        applied = tuple(edits.applied)
        own = edits.as_it_ran(call)
        if self.verify != "off":
            _, _, t, s = own.shape
            rule = MaskRule(own.mask, t, s, own.diagonal, own.device)
            formed = () if own.weights is None else tuple(e for e in applied if e.field != "output")
            with no_gradients():
                measured = measure(own, rule, self._certifier.full, Edited.of(formed, own, *edits.kept))
        # Forming what nobody reads took more than the edit itself (3 % of a model of 12 layers at 512 tokens).
        later = self._keeps_plain and not self._attached and call.piece is None and call.weights is None
        set_rows = edits.set_rows if later and call.is_product and is_softmax(call.normalizer) else None
        edits.finish(call, self._needs if set_rows is None else lambda name: name != "weights" and self._needs(name))
        return applied, measured, set_rows

    def _hold_plain(self, call: KernelCall) -> None:
        several = call.q, call.k, call.v, call.output
        call.q, call.k, call.v, call.output = snapshots(several, _CACHES, self._copy)  # type: ignore[arg-type]

    def keep_held(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        """What :meth:`keep` makes of a plain call whose tensors are copied, where everything is kept as it is: by a
        shorter way (4 % of a toy)."""
        q, k, scale = call.q, call.k, call.scale
        assert type(scale) is float
        values = _plain_values(call.tap, q.dtype, scale, call.causal, call.window, self.selection.derivable)
        t, s = q.size(2), k.size(2)
        fields: dict[str, Field] = {
            "q": q,
            "k": k,
            "v": call.v,
            "bias": None,
            "scores": DERIVED,
            "mask": self._mask_rule(call, t, s, None, None),
            "sinks": None,
            "weights": DERIVED,
            "applied": None,
            "output": call.output,
        }
        made = call_like(values, site, step, index, fields)
        if self.verify != "off":
            self._certifier.wait(made, None)
        if self._histories is not None:
            self._histories.note(made, site.crosses or t < s)
        return made

    def deliver(self, call: Call, sink: Callable[[Call], None]) -> None:
        """Hand a kept call over to where it is stored: now, or when it has come from a GPU."""
        if self._transfer is not None and self._transfer.used:
            self._transfer.deliver(call, sink)
        else:
            sink(call)

    def drop(self) -> None:
        """Let go of what waits."""
        self._waiting.clear()
        self._memo.forget()
        if self._transfer is not None:
            self._transfer.close()

    def complete(self, calls: Sequence[Call]) -> None:
        """Derive what waits, read the certificates of what was measured at once, wait for what comes from a GPU."""
        self._settle_waiting()
        if self._histories is not None:
            self._histories.look()
        if self._transfer is not None and self._transfer.used:
            self._transfer.complete(calls)
        self._certifier.read(calls)

    # One call, from its kernel's arguments to its fields

    def _mask_rule(
        self, call: KernelCall, t: int, s: int, heads: Sequence[int] | None, queries: Sequence[int] | slice | None
    ) -> MaskRule:
        """What hides keys in a whole call, of the heads and queries that are kept: one for all calls with the same."""
        device = call.v.device
        of = t, s, call.causal, call.offset, call.window, device
        if call.mask is None and of == self._last_rule_of:
            assert self._last_rule is not None
            return self._last_rule
        diagonal = call.diagonal

        def make() -> MaskRule:
            given = call.mask
            if given is not None:
                (given,) = snapshots([given], [True], self._copy)
            whole = MaskRule(given, t, s, diagonal, device)
            if heads is None and queries is None:
                return whole
            every = slice(None)
            index = every if heads is None else torch.tensor(heads, device=device)
            rows = queries if isinstance(queries, slice) else kept_row_indices(call, queries)
            return whole.of(every, index, every if queries is None else rows)

        found: MaskRule = self._memo(("mask", t, s, diagonal, device), call.mask, make)
        if call.mask is None:
            self._last_rule, self._last_rule_of = found, of
        return found

    def _hold(self, call: KernelCall) -> None:
        """Put copies in the place of a call's tensors, since the model may write to these."""
        q, k, v, output, scale = call.q, call.k, call.v, call.output, call.scale
        plain = (
            q is not None
            and k is not None
            and call.bias is call.sinks is call.scores is call.weights is call.applied is None
        )
        if plain and output is not None and type(scale) is float and call.undropped is call.outer_error is None:
            call.q, call.k, call.v, call.output = snapshots((q, k, v, output), _CACHES, self._copy)
            return
        several: dict[str, object] = {"q": q, "k": k, "v": v, "output": output, "scale": scale}
        several |= {name: getattr(call, name) for name in _RARE}
        held = {name: x for name, x in several.items() if isinstance(x, Tensor)}
        caches = [name in ("k", "v") for name in held]
        for name, x in zip(held, snapshots(list(held.values()), caches, self._copy), strict=True):
            setattr(call, name, x)
        if (bias := call.bias) is not None:  # many layers share one
            call.bias = self._memo(("kept", "bias"), bias, lambda: snapshots([bias], [True], self._copy)[0])

    def _place_fields(self, made: Call, call: KernelCall, mask: MaskRule) -> None:
        """Say where each field of a call is, and where those are that others follow from."""
        own_scores = made.own_scores
        places: dict[str, Field] = {
            "q": call.q,
            "k": call.k,
            "v": call.v,
            "bias": call.bias,
            "scores": DERIVED if call.scores is None and not own_scores else call.scores,
            "mask": mask,
            "sinks": call.sinks,
            "weights": DERIVED if call.weights is None else call.weights,
            "applied": call.applied,
            "output": call.output,
        }
        if len(self._fields) == len(places):
            made.fields = places
            return
        made.fields = {name: places.pop(name) for name in self._fields}
        # Of a matrix that nobody asked for no more is held than has to be: scores that do not follow from q and k.
        places.pop("weights", None)
        places.pop("applied", None)
        if not own_scores:
            places.pop("scores", None)
        made.beside = places

    def _stays(self, call: KernelCall) -> bool:
        """Whether the call's tensors are kept as they are and where they are."""
        leaves = self._streamed or (self._transfer is not None and devices.on_gpu(call.v))
        return not leaves and self.selection.keeps_as_it_is(call.v.device)

    def _waits(self, call: KernelCall) -> bool:
        """Whether a call that is not kept as it is waits for the end of the forward: a small one, as several of these
        are measured in the time of one."""
        selection, q, k = self.selection, call.q, call.k
        elsewhere = (
            self._streamed
            or self._attached
            or selection.dtype is not None
            or selection.device not in (None, call.device)
        )
        if elsewhere or selection.statistics or q is None or k is None:
            return False
        return q.device.type == "cpu" and not devices.on_gpu(q) and is_small(q.shape, k.shape, call.v.shape)

    def _settle_waiting(self) -> None:
        """Measure and derive the calls that waited for the end of their forward."""
        waiting, self._waiting = self._waiting, []
        for made in waiting:
            _ = made.certificate  # together with those of the others
            with isolated(_ANY):
                self._settle(made, True)

    def _certify(self, made: Call, call: KernelCall, mask: MaskRule, groups: Sequence[int] | None, stays: bool) -> None:
        """Let a call be measured when somebody asks, or now, where what that takes is not kept anyway."""
        formed = call.weights is not None and "weights" not in made.fields
        formed |= made.own_scores and "scores" not in made.fields
        if stays and not formed:
            self._certifier.wait(made, Extras.of(call))
            return
        with no_gradients():
            self._certifier.take(made, grouped(call, groups), mask)
        if not made.derivable and not any(isinstance(x, Derived) for x in made.fields.values()):
            made.beside = {}

    def _settle(self, made: Call, held: bool) -> None:
        """Derive what follows, bring everything into its dtype and to its device, and let go of the rest.

        Args:
            made: the call.
            held: whether its tensors are the trace's own.
        """
        derived = {name: derive_field(made, name) for name, x in made.fields.items() if isinstance(x, Derived)}
        for name, place in made.fields.items():
            if name in derived:
                made.fields[name] = self._kept(derived[name], True)
            elif isinstance(place, MaskRule):
                made.fields[name] = self._memo(("settled", id(place)), None, partial(self._settled_mask, place))
            elif isinstance(place, Tensor):
                shared = FIELD_SPECS[name].shared
                kept = partial(self._kept, place, held, name in ("k", "v"))
                made.fields[name] = self._memo(("settled", name), place, kept) if shared else kept()
        made.beside = {}
        if isinstance(made.scale, Tensor) and not held:
            made.scale = made.scale.to(self.selection.device or made.scale.device, copy=True)

    def _settled_mask(self, rule: MaskRule) -> Tensor | Later:
        mask = rule()
        return self._kept(mask, mask is not rule.given)

    def _kept(self, x: Tensor, fresh: bool, cache: bool = False) -> Tensor | Later:
        """A tensor as it is stored, in the dtype and on the device that were selected.

        Args:
            fresh: whether it is the trace's own, so that nobody writes to it.
            cache: whether it may be the memory of a cache.
        """
        dtype = self.selection.dtype if x.is_floating_point() and self.selection.dtype is not None else x.dtype
        if self._transfer is not None and devices.on_gpu(x):
            return self._transfer.send(x, dtype, fresh)
        device = self.selection.device or x.device
        if dtype != x.dtype or device != x.device:
            return x.to(device=device, dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        return x if fresh else snapshots([x], [cache], self._copy)[0]


def _say_detached(made: Call, call: KernelCall) -> None:
    """Note which fields of an attached call are in no graph."""
    several = {name: getattr(call, name) for name in ("q", "k", "v", "scores", "weights", "applied", "output")}
    lost = [name for name, x in several.items() if isinstance(x, Tensor) and not x.requires_grad]
    if lost:
        made.notes = (
            *made.notes,
            f"attached=True, and not in the graph: {', '.join(lost)} (gradients were off, or nothing that they are "
            "made of requires one)",
        )
