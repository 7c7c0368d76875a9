"""Every product of activations with fixed weights that a model computes, however it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...attention.functional import compute_dtype
from ...cached import cached_property
from ...models.wrappers import Unwrapped
from ...torch_internals.dispatch_modes import TorchDispatchMode
from ...torch_internals.tensor_identity import storage_of, version_of

_ADDMM, _MM, _BMM = "aten::addmm", "aten::mm", "aten::bmm"
# What inference mode hands over whole, and other modes in its parts.
_COMPOSED = ("aten::linear", "aten::matmul", "aten::einsum")


@dataclass(eq=False)
class Product:
    """``y = x W + b``: one product of a forward.

    Attributes:
        seen: how many attention calls were over when it ran.
        x: n C, a copy of its input.
        weight: C N.
        bias: N, or None.
        name: the parameter's name in the model; empty where the weight is made of parameters (cast, normalised, …).
        replay: computes it again.
    """

    seen: int
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    name: str
    replay: Callable[[], Tensor]

    @cached_property
    def y(self) -> Tensor:
        """n N: its result, the same bits as in the forward; float32 (float64 for one in that)."""
        y = self.replay()
        return y.reshape(self.x.shape[0], -1).to(compute_dtype(y.dtype))


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the products of a forward while it is open.

    It sees what reaches the kernels, so that ``nn.Linear``, ``F.linear``, ``addmm``, ``matmul``, ``einsum`` and the
    packed projections of ``nn.MultiheadAttention`` are all the same to it.

    Args:
        model: whose parameters and buffers are the fixed weights; what is computed of these alone is fixed too.
        seen: tells how many attention calls are over.
    """

    def __init__(self, model: nn.Module, seen: Callable[[], int]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Product] = []
        self._seen = seen
        self._names = {storage_of(b): "" for b in model.buffers()}
        self._names |= {storage_of(p): name for name, p in Unwrapped(model).root.named_parameters()}
        self._derived = WeakIdKeyDictionary()
        self._last: tuple[Any, Tensor, Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in _COMPOSED:
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        out = func(*args, **(kwargs or {}))
        given = _tensors(args)
        if given and all(map(self._fixed, given)):
            for x in _tensors([out]):
                self._derived[x] = True
        if not kwargs:
            self._note(name, func, args)
        return out

    def _fixed(self, x: Tensor) -> bool:
        return x in self._derived or storage_of(x) in self._names

    def _note(self, name: str, func: Any, args: Any) -> None:
        if name == _ADDMM:
            bias, x, weight = args
        elif name in (_MM, _BMM):
            (x, weight), bias = args, None
            if name == _BMM and weight.shape[0] != 1:
                return
        else:
            return
        if not self._fixed(weight) or (bias is not None and not (self._fixed(bias) and bias.dim() == 1)):
            return
        copy = self._copy(x)
        again = tuple(copy if a is x else a for a in args)
        rows, matrix = copy.reshape(-1, copy.shape[-1]), weight.reshape(weight.shape[-2:])
        label = self._names.get(storage_of(weight), "")
        self.found.append(Product(self._seen(), rows, matrix, bias, label, lambda: func(*again)))

    def _copy(self, x: Tensor) -> Tensor:
        """A copy, once for a tensor that several products in a row read; the model may write over its own later."""
        key = (storage_of(x), x.storage_offset(), x.shape, x.stride(), version_of(x))
        if self._last is None or self._last[0] != key:
            self._last = key, x, x.detach().clone()  # the tensor itself is held, so that no other gets its memory
        return self._last[2]


def _tensors(values: Any) -> list[Tensor]:
    """Those among some values, and in the lists among them."""
    flat = (x for v in values for x in (v if isinstance(v, (list, tuple)) else (v,)))
    return [x for x in flat if isinstance(x, Tensor)]
