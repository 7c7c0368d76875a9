"""What a tap is, and the running trace as the taps see it: what it can be asked, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..attention.kernel_call import KernelCall
from ..torch_internals.code_patching import Patch


@dataclass(frozen=True, slots=True)
class Change:
    """What a kernel shall be given in place of its own arguments; None: as the model gave it.

    Attributes:
        q: B H T D.
        k: B G S D.
        v: B G S E.
        bias: finite additive terms, broadcastable to B H T S.
        mask: bool, broadcastable to B H T S, True = may attend. What the kernel hides by itself (``causal``, ``offset``
            and ``window`` of the call) stays hidden beside it.
        heads: the query heads that ``bias`` and ``mask`` are for; None: all. A kernel may be another one with a mask,
            and round otherwise: so it is run as it was given, and once more for these heads alone, whose rows then take
            the place of those of the first run. Likewise ``queries``.
        queries: the query rows of these heads, of which the same holds; None: all.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    heads: tuple[int, ...] | None = None
    queries: tuple[int, ...] | None = None


class SecondRun(Protocol):
    """A part of a model that is run again in a backward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part: for the first time, if nobody has said that it ran, else again."""

    def ran(self) -> None:
        """Say that the part has just run for the first time, by itself."""


class ActiveTrace(Protocol):
    """The running trace of a thread, as :func:`~hookattn.taps.active.current` returns it to a tap.

    Attributes:
        glanced: the implementation of the transformers interface that runs without the function mode: its module, q, k
            and v; None: there is none. Of that tap alone, and kept here since it has to end with the trace.
    """

    glanced: tuple[nn.Module, Tensor, Tensor, Tensor] | None

    @property
    def thread(self) -> int:
        """The identity of the thread that it runs in; 0 once it has ended."""

    @property
    def heard(self) -> int:
        """How many kernels have reported themselves so far: unchanged around a kernel, no tap saw that kernel."""

    @property
    def compiling(self) -> bool:
        """Whether compiled code shall run compiled: the kernel that runs now is read from outside."""

    @property
    def shapes_only(self) -> bool:
        """Whether tensors have shapes and no values: a trace is being planned."""

    @property
    def listened(self) -> bool:
        """Whether somebody wants to be asked :meth:`before` a kernel runs and told :meth:`after` it.

        A tap looks at this first, so that a trace nobody listens to pays for one attribute and nothing else.
        """

    @property
    def gradients(self) -> bool:
        """Whether gradients are asked for, so that ``result`` and ``result_form`` of a call are to be there.

        Where they take no time of their own a tap gives them without looking at this.
        """

    @property
    def attached(self) -> bool:
        """Whether what is recorded stays in the model's graph: then a tap leaves gradients on as it makes a call."""

    # What is running

    def where(self) -> str | None:
        """The path of the module that is running now; None outside the model."""

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""

    def watching(self) -> bool:
        """Whether the function mode is open, so that it sees the operations that run now."""

    def layout_for(self, path: str) -> str | None:
        """The letters that the caller said the axes of q have, as it enters the dot product, in the module at a path:
        ``"BTHD"``, say; None: nothing was said, and the axes are to be found out."""

    # How a kernel is run

    def again(self, function: Callable[..., Any]) -> SecondRun:
        """A part of the model, each later run of which is given the changes of its first: for what a backward pass runs
        a second time. To be asked only where :attr:`listened`."""

    def aside(self) -> AbstractContextManager[None]:
        """Without the function mode: for kernels that must not see it."""

    def kernel(self, sealed: bool) -> AbstractContextManager[Callable[[], bool]]:
        """Around one kernel; gives a function that tells whether a tap saw it.

        Args:
            sealed: without the function mode and with compiled code compiled; else with the mode open.
        """

    def follow(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operation that dispatches to no function mode as if it had: its result is followed."""

    def followed(self, values: Any) -> bool:
        """Whether a tensor among these is part of an attention, as far as is known."""

    def same(self, x: Tensor, like: Tensor) -> None:
        """Say that a tensor is what another is, whose values it has: all that is known of that one holds of it."""

    def seed(self, x: Tensor, roles: str) -> None:
        """Say what the axes of a tensor are, one letter of B H T S D each."""

    # What a kernel is given and gives

    def before(self, call: KernelCall, changeable: frozenset[str]) -> Change | None:
        """Ask whether a kernel that is about to run shall get other arguments; None: those it has.

        To be asked only where :attr:`listened`, once for each kernel, and to be followed by :meth:`after` and then
        :meth:`record` or :meth:`skip`. A kernel that reports itself without having asked is said to the listener, so
        that no change is lost in silence. Of the taps, these ask, and what they say can be changed is:

        - sdpa, where it is given B H T D: all. MultiheadAttention and the layers of torch run in their Python form
          where somebody listens, so that sdpa asks in them; code of ``torch.jit`` runs as the Python function that it
          was made from, if that gives the same bits, and code of ``torch.compile`` uncompiled.
        - flex_attention: q, k and v, as its bias and its mask are functions.
        - flash-attn, varlen_attn and xformers: q, k and v, in whatever layout; q alone where keys are in a cache or in
          its pages, which are the model's; nothing where the kernel rotates q itself. All take another output.
        - An implementation of the interface whose kernel no tap sees: q, k and v, and a mask of four axes. It asks when
          it has run once, as it is not known before.

        These do not, and are told of :meth:`after` alone: kernels with heads folded into the batch or into the rows of
        a query, and those that sdpa chooses from by their own names. These are told of nothing: nested tensors, code of
        ``torch.jit`` that cannot run as Python, operators of other libraries, and what runs inside ``torch.vmap`` or
        ``functionalize``. Attention that is written out by hand has no kernel, and asks as it forms its weights
        (:meth:`formed`); of it v can be changed, in the forms that :mod:`hookattn.taps.eager.exchange` lists.

        Args:
            call: the kernel's arguments; its output is None. k and v have the heads that the kernel is given.
            changeable: the fields of :class:`Change` that the tap can hand to this kernel.

        Raises:
            ModelError: a field was changed that is not among these.
        """

    def formed(self, call: KernelCall) -> Tensor | None:
        """Say that a model has formed weights, and done nothing with them yet; the answer is what shall take their
        place, B H T S, or None.

        For attention that is written out by hand, of whose operations none can be given other queries or masks: all
        that is changed before the weights is in the answer. The values are asked about :meth:`before` they are met.

        Args:
            call: has its weights, and its scores, or q, k and what else makes them; ``v`` and ``output`` are None.
        """

    def after(self, call: KernelCall) -> Tensor | None:
        """Say what a kernel returned; the answer is what the model shall get instead, B H T E, or None.

        A fused kernel forms no weights. Whoever changes weights changes what they make: of the heads in question, by
        explicit math on this call, whose tensors are in the model's graph still.

        Args:
            call: what the kernel was really given; ``output`` is its own, which is what will be recorded.
        """

    # What a tap saw

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """:func:`hookattn.attention.split_additive`, once for a tensor that many layers share."""

    def record(self, call: KernelCall) -> None:
        """Take one call."""

    def skip(self, reason: str, path: str | None = None, changed: bool = False) -> None:
        """Attention ran that cannot be read.

        Args:
            reason: why not.
            path: the module; None: the one that is running now.
            changed: whether a listener has changed what it is made of: all that it wanted to change is.
        """

    def note(self, text: str) -> None:
        """What holds for the whole trace; said once."""


@dataclass(frozen=True)
class Tap:
    """One attention kernel.

    Attributes:
        name: as it appears in ``call.tap``.
        kernels: torch function name -> handler ``(watch, func, args, kwargs) -> result``, called inside the mode.
        patches: the functions that don't dispatch to function modes; made only when a trace starts, since some live
            in optional packages that may be imported later.
        mode_patches: of these functions, the ones whose bodies do nothing unless the function mode is open.
        covers: of some modules, by identity, those in which this tap alone sees every attention call, so that the mode
            can stay closed in them.
    """

    name: str
    kernels: dict[str, Callable[..., Any]] | None = None
    patches: Callable[[], Iterable[Patch]] | None = None
    mode_patches: Callable[[], Iterable[Patch]] | None = None
    covers: Callable[[Iterable[Any]], set[int]] | None = None
