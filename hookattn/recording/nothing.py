"""A recorder that keeps nothing: for a forward that is run for what the model returns alone, with edits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..attention.masks import split_additive
from ..calls.call import Call
from ..calls.site import Site
from ..torch_internals.isolation import isolated
from ..torch_internals.tensor_memo import TensorMemo
from .session import Recorder, Sink


class Nothing(Recorder):
    """See :class:`~hookattn.recording.session.Recorder`. What is edited is edited as ever; no call is made of it."""

    def __init__(self) -> None:
        self._memo = TensorMemo()

    def wants(self, field: str) -> bool:
        """No field was asked for."""
        return False

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share: edits read them."""
        with isolated(additive):
            return self._memo("split", additive, lambda: split_additive(additive))  # type: ignore[no-any-return]

    def forget(self) -> None:
        """A new forward begins."""
        self._memo.forget()

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> None:
        """Nothing."""

    def deliver(self, call: Call, sink: Sink) -> None:
        """There is none."""

    def complete(self, calls: Sequence[Call]) -> None:
        """Nothing waits."""

    def drop(self) -> None:
        """Let go of the mask that was split."""
        self._memo.forget()
