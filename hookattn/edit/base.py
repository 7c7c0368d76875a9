"""What an edit is, and the call that it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from .. import checks
from ..errors import EditError, InputError
from .edited_call import EditedCall
from .where import Selected, Where

FIELDS = ("q", "k", "v", "scores", "weights", "output")
"""What of an attention an edit may change, in the order in which one is made of the other."""


class Edit(ABC):
    """A change of one field of some attention calls.

    Attributes:
        name: the word of its function in :mod:`hookattn.edit`.
        field: what it changes.
        where: the calls, and which entries of the field.
        additive: whether it adds something to the field that does not depend on it: of scores that is a bias, which
            many kernels take as an argument.
        by_position: whether it asks where the queries are in their sequence, selected or not.
    """

    name: ClassVar[str]
    additive: ClassVar[bool] = False
    by_position: ClassVar[bool] = False

    def __init__(self, field: str, **where: Unpack[Where]):
        self.field = field
        self.where = Selected.of(self.name, field, where)

    @abstractmethod
    def new(self, call: EditedCall) -> Tensor | float:
        """The new values of the selected entries, in the shape of ``call.value`` or broadcastable to it."""

    def begin(self) -> None:  # noqa: B027 - most have nothing to forget
        """A traced block begins: what was learned of an earlier one is forgotten."""

    @property
    def note(self) -> str:
        """What else the record of an edited call shall say."""
        return ""

    def check(self, call: EditedCall, x: object) -> Tensor:
        """Values for the selected entries, on their device, in their dtype and shape.

        Raises:
            EditError: they are none, or do not fit.
        """
        shape, dtype, device = call.value_shape, call.value_dtype, call.call.device
        if not isinstance(x, Tensor):
            try:
                number = checks.amount("values", x)
            except InputError:
                raise EditError(
                    f"{call.where(self)}: expected a tensor of shape {shape}, or a number; got {checks.printed(x)}."
                ) from None
            return torch.full((1,) * len(shape), number, dtype=dtype, device=device).expand(shape)
        check_dense(self, call, x)
        x = x.to(device=device, dtype=dtype)
        if x.is_inference() and not torch.is_inference_mode_enabled():
            x = x.clone()  # such a tensor can't be in a graph
        try:
            return x if list(x.shape) == shape else x.expand(shape)
        except RuntimeError:
            raise EditError(
                f"{call.where(self)}: expected values of shape {shape} ({' '.join(call.axes)}, of the entries that are "
                f"edited) or such as broadcast to it, got {list(x.shape)}."
            ) from None

    def __repr__(self) -> str:
        return f"edit.{self.name}({', '.join(filter(None, (repr(self.field), str(self.where))))})"


def check_dense(edit: Edit, call: EditedCall, x: Tensor) -> None:
    """Whether a tensor has floating values, one for each entry.

    Raises:
        EditError: it has not.
    """
    if x.layout != torch.strided or x.is_nested or (x.is_meta and call.call.device.type != "meta"):
        kind = "no values (it is on the meta device)" if x.is_meta else f"the layout {x.layout}"
        kind = "rows of several lengths (it is nested)" if x.is_nested else kind
        raise EditError(f"{call.where(edit)}: expected a dense tensor with values, got one that has {kind}.")
    if not x.is_floating_point():
        raise EditError(f"{call.where(edit)}: expected floating values, got a tensor of {x.dtype}.")


def values_of(name: str, values: object) -> Tensor | float:
    """The values that an edit is given: a tensor, or a number of any library.

    Raises:
        InputError: neither.
    """
    return values if isinstance(values, Tensor) else checks.amount(name, values, "a tensor or a number")


def field_of(name: str, field: object, known: tuple[str, ...] = FIELDS) -> str:
    """The ``field`` of an edit.

    Raises:
        InputError: it is no text; SelectionError: there is no such field, or this edit does not change it.
    """
    checks.text("field", field, f"the name of a field: {', '.join(known)}")
    return checks.word(f"edit.{name}: field", field, known)
