"""Small and plain calls: kept with as little as will do, and derived and measured together with others of their shape.

A model of a few layers spends more time between its kernels than in them; there each step here counts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ..attention.kernel_call import FIELDS, KernelCall
from ..attention.masks import Masked, Masks
from ..calls.call import Call
from ..calls.certificate import tolerance
from ..calls.site import Site
from .later import Small, Waiting
from .selection import Selection

# Up to this many scores and elements of q, k and v a call is small.
SMALL = 1 << 18

_CONTIGUOUS = torch.contiguous_format
_PLACES = {"q": 0, "k": 1, "v": 2, "output": 3, "mask": 4}


class Shape(NamedTuple):
    """What small calls of one shape have in common.

    Attributes:
        dtype: of q, k, v and output.
        t, s: queries and keys.
        size: the most elements of q, k, v or the scores.
    """

    dtype: torch.dtype
    t: int
    s: int
    size: int


class SmallCalls:
    """Makes Calls of small kernel calls.

    Args:
        selection: what is kept of each: fields alone, whole and as they are.
        waiting: where they wait.
        masks: makes their masks.
    """

    def __init__(self, selection: Selection, waiting: Waiting, masks: Masks):
        self._fields = [(f, _PLACES.get(f, 5)) for f in FIELDS if f in selection.capture]
        self._outputs = waiting.verify != "off" or "output" in selection.capture
        self._derivable, self._masks = selection.derivable, masks
        self._waiting = waiting if waiting.wanted else None

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call | None:
        """What is kept of one call; None: it is none of these."""
        output, scale = call.output, call.scale
        if not (
            output is not None
            and type(scale) is float
            and call.bias is call.weights is call.scores is call.sinks is None
            and call.undropped is call.outer_error is None
            and call.softcap is None
            and call.softmax_dtype in (None, call.q.dtype)
            and not call.opaque
        ):
            return None
        several = call.q, call.k, call.v, output
        if (shape := shape_of(several, scale)) is None:
            return None
        masked = self._masks(call.mask, shape.t, shape.s, call.offset, call.window, call.causal, call.q.device)
        return self._fill(Call.of(call, site, step, index), several, scale, masked)

    def keep_plain(
        self,
        several: tuple[Tensor, Tensor, Tensor, Tensor],
        scale: float,
        causal: bool,
        tap: str,
        site: Site,
        step: int,
        index: int,
    ) -> Call | None:
        """The same of a kernel that was given nothing but ``several`` (q, k, v; and its output), scale and causal."""
        if (shape := shape_of(several, scale)) is None:
            return None
        masked = self._masks(None, shape.t, shape.s, 0, None, causal, several[0].device)
        return self._fill(Call(site, step, index, tap, shape.dtype, scale, None, causal), several, scale, masked)

    def _fill(self, made: Call, several: tuple[Tensor, Tensor, Tensor, Tensor], scale: float, masked: Masked) -> Call:
        q, k, v, output = several
        grad = torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        own = [x.clone(memory_format=_CONTIGUOUS) for x in (q, k, v)]
        kept = output.clone(memory_format=_CONTIGUOUS) if self._outputs else None
        if grad:
            torch._C._set_grad_enabled(True)
        values = (*own, kept, masked.mask, None)
        made.fields = {name: values[i] for name, i in self._fields}
        made.derivable = self._derivable
        if self._waiting is not None:
            if kept is not None:
                own.append(kept)
            self._waiting.add(Small(made, own, masked, scale, tolerance(made.dtype)))
        return made


def shape_of(several: tuple[Tensor, Tensor, Tensor, Tensor], scale: float) -> Shape | None:
    """What a call of q, k, v and output has in common with others; None: it is not small, or not plain."""
    q, k, v, output = several
    if not (type(q) is type(k) is type(v) is type(output) is Tensor) or not scale or _modes():
        return None
    shape = _shape(q.shape, k.shape, v.shape, output.shape, q.dtype, k.dtype, v.dtype, output.dtype)
    return None if shape is None or shape.size > SMALL else shape


_modes = torch._C._len_torch_function_stack


@functools.lru_cache(maxsize=1024)
def _shape(q: Size, k: Size, v: Size, output: Size, *dtypes: torch.dtype) -> Shape | None:
    if len(set(dtypes)) > 1 or not len(q) == len(k) == len(v) == len(output) == 4:
        return None
    (b, h, t, d), s, e = q, k[2], v[3]
    good = output == (b, h, t, e) and k[0] == b and k[3] == d and v[:3] == k[:3] and k[1] and h % k[1] == 0
    sizes = k.numel(), v.numel(), q.numel(), b * h * t * s
    if not good or not all(sizes):
        return None
    return Shape(dtypes[0], t, s, max(sizes))
