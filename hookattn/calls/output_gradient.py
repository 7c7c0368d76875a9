"""The gradient of a call's output: where it is once a backward has brought it, and else why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..errors import GradientError
from .fields import Index, PartOf, Place, tensor_of

NOT_ASKED_FOR = (
    "its gradient was not kept; trace with gradients=True, and run backward() before the trace is saved (a call that "
    "was put together of others, or changed, has none)"
)


@dataclass(eq=False)
class Passes:
    """The backward passes that have brought gradients to a trace.

    Attributes:
        count: how many.
    """

    count: int = 0


@dataclass(eq=False)
class OutputGradient:
    """The gradient of one call's output, B H T E; of several backward passes the sum, as that of a leaf tensor is.

    Attributes:
        place: where it is; None: none has come.
        why_none: why none can come, and how to mend it; empty: one can.
        passes: those that have come to any call of the trace.
    """

    place: Place | None = None
    why_none: str = ""
    passes: Passes = field(default_factory=Passes)

    def add(self, more: Tensor) -> None:
        """A backward has come."""
        before = tensor_of(self.place)
        self.place = more if before is None else before.to(more.device) + more

    @property
    def there(self) -> Place | None:
        """Where it is; None: there is none."""
        return self.place

    def part(self, index: tuple[Index, ...]) -> OutputGradient:
        """That of some batch entries, heads and queries, now and after further backward passes."""
        return PartOfGradient(why_none=self.why_none, passes=self.passes, whole=self, index=index)

    def tensor(self, where: str) -> Tensor:
        """B H T E.

        Args:
            where: the call, in a few words.

        Raises:
            GradientError: there is none; says why, and how to get one.
        """
        found = tensor_of(self.there)
        if found is not None:
            return found
        if self.why_none:
            raise GradientError(f"{where} has no gradient: {self.why_none}.")
        if self.passes.count:
            raise GradientError(
                f"{where} has no gradient: the backward() that ran did not reach its output, so that what it was "
                "called on does not depend on it (or on a detached copy of it alone)."
            )
        raise GradientError(
            f"{where} has no gradient yet: no backward() has come to the trace. Call backward() on a loss that depends "
            "on what the traced forward returned (trace.output), and read it after that."
        )


@dataclass(eq=False)
class PartOfGradient(OutputGradient):
    """Some batch entries, heads and queries of the gradient of a whole call.

    Attributes:
        whole: that gradient.
        index: which positions of B, H and T.
    """

    whole: OutputGradient = field(default_factory=OutputGradient)
    index: tuple[Index, ...] = ()

    @property
    def there(self) -> Place | None:
        """Where it is; None: there is none."""
        whole = self.whole.there
        return None if whole is None else PartOf(whole, self.index)


def not_asked_for() -> OutputGradient:
    """That of a call which was traced without."""
    return OutputGradient(why_none=NOT_ASKED_FOR)
