"""``scale``: gates. A gate of 1 for every head is a leaf whose gradient says what the head is worth."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..errors import EditError
from .base import Edit, check_dense, field_of, values_of
from .edited_call import EditedCall
from .where import Where


class Scale(Edit):
    """See :func:`scale`."""

    name = "scale"

    def __init__(self, field: str, gates: Tensor | float, **where: Unpack[Where]):
        super().__init__(field, **where)
        self.gates = values_of("gates", gates)
        self._stack: tuple[str, str] | None = None

    def begin(self) -> None:
        self._stack = None

    def new(self, call: EditedCall) -> Tensor:
        gates = self.gates
        if isinstance(gates, Tensor) and gates.requires_grad and torch.is_inference_mode_enabled():
            raise EditError(
                f"{call.where(self)}: the gates want a gradient, and nothing has one in torch.inference_mode(); run "
                "the model outside of it."
            )
        if isinstance(gates, Tensor) and gates.dim() in (1, 2):
            check_dense(self, call, gates)
            gates = self._of_heads(call, gates)
        return call.value * self.check(call, gates)

    def _of_heads(self, call: EditedCall, gates: Tensor) -> Tensor:
        """1 H' 1 1, of gates that are L H or H."""
        letter = "G" if "G" in call.axes else "H"
        heads = (call.place.key_heads if letter == "G" else call.place.heads).of
        if gates.dim() == 2:
            layer, place = call.site.layer, (call.site.stack, call.site.kind)
            self._stack = self._stack or place
            if self._stack != place:
                raise EditError(
                    f"{call.where(self)}: gates of layers and heads are of one stack and kind, and the edit meets "
                    f"{' '.join(self._stack)} and {' '.join(place)}; say stack= or kind=."
                )
            if layer is None or layer >= gates.shape[0]:
                raise EditError(f"{call.where(self)}: there are gates of {gates.shape[0]} layers, and this is {layer}.")
            gates = gates[layer]
        chosen = call.numbers(letter) or ()
        if gates.shape[0] == heads:
            gates = gates[list(chosen)]
        elif gates.shape[0] != len(chosen):
            raise EditError(f"{call.where(self)}: there are {gates.shape[0]} gates for {heads} heads.")
        return gates.view(1, -1, 1, 1)


def scale(field: str, gates: Tensor | float, **where: Unpack[Where]) -> Edit:
    """Multiply entries of a field.

    Args:
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        gates: a number; L H (a row for each layer of one stack, a gate for each head); H; or of four axes,
            broadcastable to the selected entries. As a leaf tensor they get a gradient: that of gates of 1 on
            ``output`` is the head importance of Michel et al. 2019, "Are sixteen heads really better than one?".
        where: see :class:`~hookattn.edit.where.Where`.

    Raises:
        SelectionError, InputError: there is no such field, the selection is none, or ``gates`` are none.
        EditError: as the model runs, if the shapes do not fit.
    """
    return Scale(field_of("scale", field), gates, **where)
