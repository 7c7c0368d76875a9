"""Every way in which a model may write to a tensor that it has already handed to an attention kernel."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Write = Callable[[Tensor], object]


@torch.library.custom_op("hookattn_tests::halve", mutates_args=("x",))
def halve(x: Tensor) -> None:
    """A custom operation that writes by way of torch."""
    x.mul_(0.5)


@torch.library.custom_op("hookattn_tests::negate_array", mutates_args=("x",))
def negate_array(x: Tensor) -> None:
    """A custom operation that writes by way of numpy, as one around somebody's C would."""
    array = x.detach().numpy()
    array *= -1


class Doubled(torch.autograd.Function):
    """An autograd function that says that it writes to what it is given."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        x.mul_(2)
        ctx.mark_dirty(x)  # type: ignore[attr-defined]
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


def _in_a_thread(x: Tensor) -> None:
    thread = threading.Thread(target=lambda: x.data.neg_())
    thread.start()
    thread.join()


def _item(x: Tensor) -> None:
    x[..., -1:, :] = 7.0


def _chosen(x: Tensor) -> None:
    x[x > 0] = -3.0


def _added(x: Tensor) -> None:
    x[:, :1] += 2


def _new_data(x: Tensor) -> None:
    x.data = torch.ones(2, 3)


def _storage_copied(x: Tensor) -> None:
    storage = x.untyped_storage()
    storage.copy_(torch.ones(storage.nbytes(), dtype=torch.uint8).untyped_storage())


def _storage_item(x: Tensor) -> None:
    storage = x.untyped_storage()
    for i in range(0, storage.nbytes(), max(1, storage.nbytes() // 7)):
        storage[i] = 9


def _numpy(x: Tensor) -> None:
    x.detach().numpy()[...] = 5


def _shared(x: Tensor) -> None:
    x.share_memory_()
    x.add_(1)


def _smaller(x: Tensor) -> None:
    x.resize_(2, 1)
    x.fill_(4)


IN_PLACE: dict[str, Write] = {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(-0.5),
    "relu_": lambda x: x.relu_(),
    "exp_": lambda x: x.exp_(),
    "clamp_": lambda x: x.clamp_(-0.1, 0.1),
    "lerp_": lambda x: x.lerp_(torch.ones_like(x), 0.5),
    "addcmul_": lambda x: x.addcmul_(torch.ones_like(x), torch.ones_like(x)),
    "cumsum_": lambda x: x.cumsum_(-1),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(2),
    "copy_": lambda x: x.copy_(torch.ones(x.shape[-1], dtype=x.dtype)),
    "normal_": lambda x: x.normal_(),
    "uniform_": lambda x: x.uniform_(),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, -1.0),
    "masked_scatter_": lambda x: x.masked_scatter_(x > 0, torch.ones_like(x)),
    "index_copy_": lambda x: x.index_copy_(2, torch.tensor([0]), torch.ones_like(x[:, :, :1])),
    "index_fill_": lambda x: x.index_fill_(2, torch.tensor([0, 1]), 8.0),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(6.0, dtype=x.dtype)),
    "scatter_": lambda x: x.scatter_(-1, torch.zeros(x.shape[:-1], dtype=torch.long).unsqueeze(-1), 3.0),
    "item assignment": _item,
    "assignment by a mask": _chosen,
    "augmented assignment": _added,
    "dropout": lambda x: F.dropout(x, 0.5, True, inplace=True),
    "relu": lambda x: F.relu(x, inplace=True),
    "init": lambda x: nn.init.constant_(x, 4.0),
    "foreach": lambda x: torch._foreach_mul_([x, torch.ones(2)], 3.0),
    "view": lambda x: x.transpose(-1, -2)[..., ::2, :].neg_(),
    "set_": lambda x: x.set_(torch.ones(3, dtype=x.dtype)),
    "custom op": halve,
    "autograd.Function": Doubled.apply,
    "vmap": lambda x: torch.vmap(lambda row: row.mul_(2))(x),
}
"""By operations on the tensor itself."""

BEHIND: dict[str, Write] = {
    "out=": lambda x: torch.add(torch.ones_like(x), 1, out=x),
    "out= of a view": lambda x: torch.neg(torch.ones_like(x[0]), out=x[0]),
    ".data": lambda x: x.data.zero_(),
    ".data =": _new_data,
    "detach": lambda x: x.detach().fill_(3),
    "storage.fill_": lambda x: x.untyped_storage().fill_(1),
    "storage.copy_": _storage_copied,
    "storage[...] =": _storage_item,
    "storage of a type": lambda x: x.storage().fill_(2),
    "set_ of another": lambda x: torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).fill_(6),
    "address": lambda x: ctypes.memset(x.data_ptr(), 1, x.element_size()),
    "numpy": _numpy,
    "dlpack": lambda x: torch.from_dlpack(x.detach()).fill_(5),
    "custom op by way of numpy": negate_array,
    "share_memory_": _shared,
    "smaller": _smaller,
    "freed storage": lambda x: x.untyped_storage().resize_(0),
    "another thread": _in_a_thread,
}
"""By other ways to the same memory."""

WRITES = {**IN_PLACE, **BEHIND}
