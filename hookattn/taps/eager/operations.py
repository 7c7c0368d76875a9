"""Torch's operations by name: which can be ignored, which are products, which write to an argument."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from .products import Label

# Operations that make no tensor worth following; everything that only asks.
_IGNORED = frozenset(
    "size dim numel stride is_contiguous storage_offset data_ptr item tolist __len__ __bool__ __repr__ __format__ "
    "is_floating_point is_complex is_inference nelement ndimension element_size get_device __hash__ __iter__ "
    "backward register_hook requires_grad_ retain_grad _set_grad_enabled __set__ arange zeros ones full empty tensor "
    "as_tensor zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_tensor finfo "
    "eye linspace scalar_tensor set_ __deepcopy__ __reduce_ex__ numpy __contains__ broadcast_tensors "
    "lt le gt ge eq ne __eq__ __lt__ __gt__ __le__ __ge__ __ne__ any all argmax topk".split()
)
_PROPERTIES = frozenset(("T", "mT", "H", "mH"))
PRODUCTS = frozenset(("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "baddbmm", "baddbmm_", "einsum"))
SOFTMAX = frozenset(("softmax", "_softmax"))
# What has to be looked at even where nothing is known to be part of an attention yet.
SPECIAL = PRODUCTS | SOFTMAX
_ALIASES = {
    "softmax_": "softmax",
    "_softmax": "softmax",
    "special_softmax": "softmax",
    "__matmul__": "matmul",
    "special_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp",
    "H": "T",
    "mH": "mT",
}


def name_of(func: Any) -> str:
    """One name for the function, the method and the operator; empty for what makes no tensor worth following."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return _ALIASES.get(name, name) if name in _PROPERTIES else ""
    if name in _IGNORED:
        return ""
    if name == "where" and func is Tensor.where:
        return "where_method"
    return _ALIASES.get(name, name) or "?"


def writes_to(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation writes to an argument: the first, or ``out=``."""
    if kwargs and (kwargs.get("inplace") is True or kwargs.get("out") is not None):
        return True
    return _in_place(name) or (name == "dropout" and len(args) > 3 and args[3] is True)


@cache
def _in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name.endswith("__"))
    return name.endswith("_") and not name.endswith("__")


Parsed = tuple[Tensor, Tensor, tuple[list[Label], list[Label], list[Label]], float, "tuple[Tensor, float] | None"]


def parse_product(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Parsed | None:
    if name == "einsum":
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        if not isinstance(args[0], str) or len(operands) != 2:
            return None
        einsum = einsum_labels(args[0], operands[0].dim(), operands[1].dim())
        return None if einsum is None else (operands[0], operands[1], einsum, 1.0, None)
    if name.startswith("baddbmm"):
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        added: Any = kwargs.get("input", args[0] if args else None)
        a: Any = kwargs.get("batch1", args[1] if len(args) > 1 else None)
        b: Any = kwargs.get("batch2", args[2] if len(args) > 2 else None)
        labels = matmul_labels(3, 3)
        assert labels is not None
        keep = added.clone() if name.endswith("_") and beta else added
        return a, b, labels, float(alpha), (keep, float(beta)) if beta else None
    rest = {k: v for k, v in kwargs.items() if k != "out"}
    a, b = (*args, *rest.values())[:2]
    if name == "__rmatmul__":
        a, b = b, a
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    plain = matmul_labels(a.dim(), b.dim())
    return None if plain is None else (a, b, plain, 1.0, None)


def matmul_labels(a: int, b: int) -> tuple[list[Label], list[Label], list[Label]] | None:
    """Labels of ``torch.matmul`` on operands of ``a`` and ``b`` dimensions."""
    if a < 1 or b < 1:
        return None
    n = max(a, b) - 2
    batch_a, batch_b = list(range(n - max(a - 2, 0), n)), list(range(n - max(b - 2, 0), n))
    la: list[Label] = [*batch_a, "m", "k"] if a > 1 else ["k"]
    lb: list[Label] = [*batch_b, "k", "n"] if b > 1 else ["k"]
    lo: list[Label] = [*(batch_a if a >= b else batch_b)]
    return la, lb, lo + (["m"] if a > 1 else []) + (["n"] if b > 1 else [])


def einsum_labels(equation: str, a: int, b: int) -> tuple[list[Label], list[Label], list[Label]] | None:
    """Labels of a two-operand einsum; None where it is not a plain product (repeated letters, sums inside)."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None

    def expand(term: str, n: int) -> list[Label]:
        if "..." not in term:
            return list(term)
        head, tail = term.split("...")
        extra = n - len(head) - len(tail)
        return [*head, *range(-extra, 0), *tail]

    la, lb = expand(terms[0], a), expand(terms[1], b)
    if not arrow:
        counts = left.replace(",", "").replace(".", "")
        dots = "..." if "..." in left else ""
        right = dots + "".join(sorted(x for x in set(counts) if counts.count(x) == 1))
    n_dots = max((sum(isinstance(x, int) for x in side) for side in (la, lb)), default=0)
    lo = expand(right, len(right.replace(".", "")) + n_dots)
    if any(len(set(x)) != len(x) for x in (la, lb, lo)) or set(lo) - set(la) - set(lb):
        return None
    return la, lb, lo
