"""What the taps of attention functions that dispatch to nothing share: finding them, running them, reading their masks.

Such a function takes B T H D, or N H D where N counts the tokens of several sequences laid end to end; the latter are
read as a batch, one sequence a row, padded at its end. Its causal mask and its window are aligned to the bottom right:
the last query stands at the last key of its own sequence. Other letters as in :mod:`hookattn.attention`; L is the
length of the longest sequence.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.kernel_call import KernelCall
from ..attention.ragged import FILLED_UP
from ..errors import EditError
from ..torch_internals.code_patching import Patch
from ..torch_internals.isolation import no_gradients
from .active import current, paused
from .base import ActiveTrace, Change
from .batch import running_batch

running_layer: ContextVar[nn.Module | None] = ContextVar("hookattn_layer", default=None)
"""The module whose attention runs, where an engine says it; None: the module that runs as far as is seen. In a model
that was compiled whole, no module of its own is seen running."""


class UnreadableError(Exception):
    """Arguments whose meaning is not known; the message says which. Never leaves the taps."""


Back = Callable[[Tensor, Tensor], Tensor]
"""(an argument or an output, as it is laid out; a tensor of the call) -> the former with the latter in it."""


def check_shape(x: Tensor, own: Tensor, name: str, where: str | None) -> None:
    """Whether a tensor can take the place of a call's own.

    Raises:
        EditError: it is of another shape.
    """
    if x.shape != own.shape:
        raise EditError(
            f"{where or '<model>'}: a changed {name} of shape {tuple(x.shape)} cannot take the place of the kernel's, "
            f"which is of {tuple(own.shape)}; return one of that shape."
        )


@dataclass(frozen=True)
class Reading:
    """One call as it was read, and the way back from it.

    Attributes:
        call: in the contract's layout.
        output: the way back of ``call.output``.
        ways: of q, k and v those that the kernel can be given changed, each with the argument that it is part of.
    """

    call: KernelCall
    output: Back
    ways: Mapping[str, tuple[str, Back]] = field(default_factory=dict)

    def hand_in(self, given: dict[str, Any], change: Change, where: str | None) -> bool:
        """Exchange arguments for what they shall be; whether any is changed.

        Raises:
            EditError: a tensor of another shape; ``where`` is the path that it names.
        """
        changed = False
        for name, (argument, back) in self.ways.items():
            x, own = getattr(change, name), getattr(self.call, name)
            if x is None:
                continue
            check_shape(x, own, name, where)
            given[argument], changed = back(given[argument], x.to(own.dtype)), True
        return changed


@dataclass(frozen=True)
class Kernel:
    """How one function is read.

    Attributes:
        read: (arguments by name, the output; None: it has not run yet) -> the call, and the way back.
        known: every argument that ``read`` understands, or leaves aside since it changes nothing in the math.
        dropout: the name of the dropout probability.
        place: the argument that the output is written to where it is given; a function that returns nothing writes it
            there alone.
    """

    read: Callable[[dict[str, Any], Tensor | None], Reading]
    known: frozenset[str]
    dropout: str = "dropout_p"
    place: str = "out"


def find(modules: Iterable[Any], kernels: dict[str, Kernel]) -> Iterator[Patch]:
    """A patch for each Python function of these names, one however many modules have it, made where it is defined."""
    seen: set[int] = set()
    for module in modules:
        for name, kernel in kernels.items():
            function = vars(module).get(name) if isinstance(module, ModuleType) else None
            if not isinstance(function, FunctionType) or id(function) in seen:
                continue
            seen.add(id(function))
            home, own = sys.modules.get(function.__module__), function.__name__
            if home is None or vars(home).get(own) is not function:
                home, own = module, name
            yield Patch(home, own, _Body(name, kernel))


@dataclass(frozen=True)
class _Body:
    """What runs in the function's place."""

    name: str
    kernel: Kernel

    def __call__(self, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        tracing = current()
        if tracing is None:
            return original(*args, **kwargs)
        asked = None
        if tracing.listened:
            asked, args, kwargs = self._ask(tracing, original, args, kwargs)
        with tracing.aside(), paused():  # paused: one such function may be made of another
            out = original(*args, **kwargs)
        # Who listens may want a gradient of what the call is made of; else nobody does.
        with tracing.aside(), nullcontext() if tracing.listened else no_gradients(but=tracing.attached):
            try:
                reading, given = self._read(original, args, kwargs, out)
            except UnreadableError as error:
                tracing.skip(f"{self.name}: {error}", tracing.path_of(running_layer.get()))
                return out
            reading.call.path = tracing.path_of(running_layer.get())
            instead = None
            if asked is not None:
                reading.call.edits = asked.edits
                instead = tracing.after(reading.call)
            with no_gradients():
                tracing.record(reading.call)
            if instead is None:
                return out
            return _exchanged(reading, given.get(self.kernel.place), out, instead, tracing.where())

    def _ask(
        self, tracing: ActiveTrace, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[KernelCall | None, tuple[Any, ...], dict[str, Any]]:
        """The call that a listener was asked about, None where it cannot be read; and what the kernel is to be given.

        Nothing is said of what cannot be read: :meth:`__call__` says it when the kernel has run.
        """
        with tracing.aside():
            try:
                bound = self._bound(original, args, kwargs)
                reading = self._reading(bound.arguments, None)
            except (UnreadableError, TypeError):  # a TypeError: the kernel raises it, too
                return None, args, kwargs
            reading.call.path = tracing.path_of(running_layer.get())
            change = tracing.before(reading.call, frozenset(reading.ways))
            if change is not None and reading.hand_in(bound.arguments, change, tracing.where()):
                args, kwargs = bound.args, bound.kwargs
            return reading.call, args, kwargs

    def _bound(
        self, original: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> inspect.BoundArguments:
        """The arguments by name, each of a known meaning."""
        signature = inspect.signature(original)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, parameter in signature.parameters.items():
            if name not in self.kernel.known and _set(bound.arguments[name], parameter):
                raise UnreadableError(f"the meaning of its argument {name} is not known")
        return bound

    def _read(
        self, original: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], out: Any
    ) -> tuple[Reading, dict[str, Any]]:
        kernel, bound = self.kernel, self._bound(original, args, kwargs)
        given = bound.arguments
        reading = self._reading(given, given[kernel.place] if out is None else _first(out))
        reading.call.dropout = float(given.get(kernel.dropout) or 0.0)
        if reading.call.dropout:
            # Never write over what the model got.
            whole = {kernel.dropout: 0.0} if given.get("out") is None else {kernel.dropout: 0.0, "out": None}
            again = inspect.BoundArguments(bound.signature, type(given)({**given, **whole}))
            with paused(), no_gradients():
                reading.call.undropped = self._reading(
                    again.arguments, _first(original(*again.args, **again.kwargs))
                ).call.output
        return reading, given

    def _reading(self, given: dict[str, Any], out: Tensor | None) -> Reading:
        """As the kernel's reader has it; where that stumbles, another package means something else by the same name."""
        try:
            return self.kernel.read(given, out)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UnreadableError(f"its arguments do not fit: {type(error).__name__}: {error}") from error


def _exchanged(reading: Reading, place: Tensor | None, out: Any, instead: Tensor, where: str | None) -> Any:
    """What a function returns, with another output in it; also at the place where it was told to write its output."""
    own = reading.call.output
    assert own is not None
    check_shape(instead, own, "output", where)
    first = place if out is None else _first(out)
    assert first is not None
    made = reading.output(first, instead.to(first.dtype))
    if place is not None:
        place.copy_(made.view(place.shape))
        if out is None or first is place:
            return out
    return first_exchanged(out, made)


def _set(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether an argument is there and is not its default."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return bool(value)
    if value is None or value is parameter.default:
        return False
    return not (isinstance(value, (bool, int, float, str, tuple)) and value == parameter.default)


def _first(out: Any) -> Tensor:
    """The output, where a function returns the log-sum-exp beside it."""
    x: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return x


def first_exchanged(out: Any, x: Tensor) -> Any:
    """What a function returned, with another tensor in the place of its output."""
    if not isinstance(out, (tuple, list)):
        return x
    made = getattr(type(out), "_make", type(out))  # a named tuple takes its parts one by one
    return made([x, *out[1:]])


@dataclass(frozen=True)
class Sequences:
    """Where in the tokens the sequences of a batch lie."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, ends: Tensor | None = None, used: Tensor | None = None) -> Sequences:
        """Those of B L H D, or of N H D.

        Args:
            x: B L H D; N H D with ``ends``.
            ends: B + 1 cumulative lengths, the first of them 0.
            used: B, how many tokens of each sequence take part; None: all.
        """
        if ends is None and x.dim() != 4:
            raise UnreadableError(f"{x.dim()} dimensions and no lengths of sequences")
        if ends is None:
            bounds = [i * x.shape[1] for i in range(x.shape[0] + 1)]
        elif x.dim() != 3:
            raise UnreadableError(f"{x.dim()} dimensions and lengths of packed sequences")
        else:
            bounds = ends.tolist()
        whole = tuple(b - a for a, b in pairwise(bounds))
        return cls(tuple(bounds[:-1]), whole if used is None else tuple(used.tolist()))

    def take(self, entries: Sequence[int] | None) -> Sequences:
        """Some of the sequences; None: all."""
        if entries is None:
            return self
        return Sequences(tuple(self.starts[i] for i in entries), tuple(self.lengths[i] for i in entries))

    @property
    def padded(self) -> bool:
        """Whether some sequence is shorter than the longest."""
        return len(set(self.lengths)) > 1

    def batch(self, x: Tensor) -> Tensor:
        """N H D or B L H D -> B H L D, zero behind the end of a sequence."""
        if x.dim() == 4:
            if self == Sequences.of(x):
                return x.transpose(1, 2)
            x = x.flatten(0, 1)
        longest = max(self.lengths, default=0)
        if longest == 0:
            raise UnreadableError("there is no token in any sequence")
        # A shorter sequence reads past its end into the next one; what it finds there is set to zero below.
        step = torch.arange(longest, device=x.device)
        at = torch.tensor(self.starts, device=x.device)[:, None] + step
        rows = x[at.clamp(max=x.shape[0] - 1)]
        if self.padded:
            rows = torch.where(real_positions(self.lengths, longest, x.device)[..., None, None], rows, 0.0)
        return rows.transpose(1, 2)

    def back(self, tokens: Tensor, x: Tensor, part: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The way back of :meth:`batch`: a copy of some tokens with those of a batch in their place. Tokens of no
        sequence stay, and what fills one up is left out.

        Args:
            tokens: N H D or B L H D, or what has that as a part.
            x: B H L D.
            part: makes a view of that part; None: it is all.
        """
        made, rows = tokens.clone(memory_format=torch.contiguous_format), x.transpose(1, 2)
        place = made if part is None else part(made)
        if place.dim() == 4:
            if self == Sequences.of(place):
                place.copy_(rows)
                return made
            place = place.view(-1, *place.shape[2:])
        real = real_positions(self.lengths, x.shape[2], x.device)
        step = torch.arange(x.shape[2], device=x.device)
        place[(torch.tensor(self.starts, device=x.device)[:, None] + step)[real]] = rows[real]
        return made


def real_positions(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """B L: which positions of a padded batch hold a token."""
    return torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]


def pages_of(pool: Tensor, table: Tensor, size: int, longest: int) -> Tensor:
    """The pages of each sequence, in order: B by pages by whatever a page holds.

    Args:
        pool: pages by whatever a page holds.
        table: B by the most pages that a sequence may ever have; what lies behind its last page may be anything.
        size: tokens of a page.
        longest: of the sequences as they are. A server's table has room for many times that.
    """
    used = table[:, : -(-longest // size)]
    return pool[used.long().clamp(0, pool.shape[0] - 1)]


def paged_as_batch(pool: Tensor, table: Tensor, longest: int) -> Tensor:
    """A paged cache as B L H D, each sequence's pages in order; ``pool``: pages, tokens of a page, H, D."""
    return pages_of(pool, table, pool.shape[1], longest).flatten(1, 2)


_OPERANDS = ("q", "k", "v", "kv", "qkv", "k_cache", "v_cache")
_DESCALES = ("q_descale", "k_descale", "v_descale")


def check_plain(given: dict[str, Any]) -> None:
    """Whether q, k and v are numbers as they are: what scales them back (``q_descale`` and its like, which a server
    hands in whatever its cache holds) says something of numbers of eight bits alone.

    Raises:
        UnreadableError: they are stored in eight bits, or scaled.
    """
    for name in _OPERANDS:
        x = given.get(name)
        if isinstance(x, Tensor) and (x.dtype.itemsize == 1 or not x.is_floating_point()):
            raise UnreadableError(f"its argument {name} is of {x.dtype}, and what is scaled back to is not known")
    for name in _DESCALES:
        scale = given.get(name)
        if scale is not None and not bool((torch.as_tensor(scale) == 1).all()):
            raise UnreadableError(f"its argument {name} is not 1")


def recorded(queries: Sequences) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Of a served batch: which of its sequences are recorded, None: all; and whose they are, None: nobody has said.

    Who serves may restrict a trace to some requests, so that the keys of others are not gathered, and may fill its
    batch up with sequences of no token, which are of no request.
    """
    batch = running_batch()
    if batch is None:
        return None, None
    names = batch.requests
    if len(names) > len(queries.lengths) or any(queries.lengths[len(names) :]):
        return None, None
    entries = batch.entries or tuple(range(len(names)))  # none of them: what is of no interest is cut away later
    return None if len(entries) == len(queries.lengths) else entries, tuple(names[i] for i in entries)


def lay_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, queries: Sequences, keys: Sequences, scale: Any, tap: str
) -> KernelCall:
    """A call of batched or packed tensors, masks still to come (:func:`add_masks`)."""
    if len(queries.lengths) != len(keys.lengths):
        raise UnreadableError(f"{len(queries.lengths)} sequences of queries and {len(keys.lengths)} of keys")
    call = KernelCall(
        q=queries.batch(q),
        k=keys.batch(k),
        v=keys.batch(v),
        output=None if out is None else queries.batch(out),
        tap=tap,
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        result=out,
        result_form=queries.batch,
        lengths=tuple(zip(queries.lengths, keys.lengths, strict=True)),
    )
    if q.dim() == 3:
        call.notes.append(f"{len(queries.lengths)} packed sequences, one a batch entry")
    if queries.padded or keys.padded:
        call.notes.append(FILLED_UP)
    return call


def window_of(size: Any, causal: bool) -> tuple[int, int]:
    """(left, right) of a window, −1 where it is unlimited."""
    left, right = (-1 if n is None else int(n) for n in (size if size is not None else (-1, -1)))
    return left, 0 if causal else right


def add_masks(
    call: KernelCall,
    queries: Sequences,
    keys: Sequences,
    window: tuple[int, int],
    chunk: int = 0,
    slopes: Tensor | None = None,
) -> None:
    """Say which keys are hidden, and add ALiBi: query i stands at position i + S − T of its own sequence.

    Args:
        call: gets causal, offset, window and mask, and a bias.
        queries: the lengths T.
        keys: the lengths S.
        window: (left, right) keys around the position, itself not counted, −1: no limit; right 0 is causal.
        chunk: attention stays within chunks of so many positions; 0: no chunks.
        slopes: H or B H; bias = −slope·|i + S − T − j|.
    """
    t, s, device = call.q.shape[2], call.k.shape[2], call.q.device
    left, right = window
    offsets = [b - a for a, b in zip(queries.lengths, keys.lengths, strict=True)]
    # Where all sequences with queries have one offset, the kernel's own rule says it; else only a mask can.
    alike = sorted({o for o, n in zip(offsets, queries.lengths, strict=True) if n})
    if len(alike) == 1:
        offsets = alike
    offset = torch.tensor(offsets, device=device).view(-1, 1, 1, 1)
    at = torch.arange(t, device=device).view(t, 1) + offset
    keys_at = torch.arange(s, device=device)
    masks = []
    if queries.padded:
        masks.append(real_positions(queries.lengths, t, device)[:, None, :, None])
    if keys.padded:
        masks.append(real_positions(keys.lengths, s, device)[:, None, None, :])
    if right == 0:  # with sequences that differ, the widest; the mask has the rest
        call.causal, call.offset = True, max(alike)
    if len(alike) == 1 and (right == 0 or left == right):
        call.offset = alike[0] if left >= 0 or right == 0 else 0
        call.window = left + 1 if left >= 0 else None
    else:
        if left >= 0:
            call.notes.append(
                f"the mask holds a window of {left} keys before the position"
                + (f" and {right} after it" if right > 0 else "")
            )
            masks.append(at - keys_at <= left)
        if right >= 0:
            masks.append(keys_at - at <= right)
    if chunk:
        call.notes.append(f"the mask holds chunks of {chunk} positions")
        masks.append(at.div(chunk, rounding_mode="floor") == keys_at.div(chunk, rounding_mode="floor"))
    for mask in masks:
        call.mask = mask if call.mask is None else call.mask & mask
    if slopes is not None:
        slopes = slopes.float().view(-1, slopes.shape[-1], 1, 1)
        call.bias = -slopes * (at - keys_at).abs()
