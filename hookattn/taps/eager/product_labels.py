"""The operands, labels and factors of one product of two tensors, read off the arguments of the function that ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...attention.kernel_call import DOT
from .products import Label, ProductLabels


class ParsedProduct(NamedTuple):
    """``alpha · a · b``, plus what is added to it.

    Attributes:
        a, b: the operands.
        labels: those of their axes and of the result's.
        alpha: a factor.
        added: a tensor that is added to the product, and its factor; None: nothing is.
        score: what it makes of a pair of vectors, if that is not their dot product.
    """

    a: Tensor
    b: Tensor
    labels: ProductLabels
    alpha: float = 1.0
    added: tuple[Tensor, float] | None = None
    score: str = DOT


def parse_product(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> ParsedProduct | None:
    """The product that an operation is, before it runs; None where it is not one of two tensors."""
    if name == "einsum":
        return _parse_einsum(args)
    if name.startswith("baddbmm"):
        return _parse_baddbmm(name, args, kwargs)
    operands = {k: v for k, v in kwargs.items() if k != "out"}
    a, b = (*args, *operands.values())[:2]
    if name == "__rmatmul__":
        a, b = b, a
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    labels = matmul_labels(a.dim(), b.dim())
    if labels is not None and name == "cdist":
        *batch, _, _ = labels.b
        return ParsedProduct(a, b, ProductLabels(labels.a, [*batch, "n", "k"], labels.out), score="distance")
    return None if labels is None else ParsedProduct(a, b, labels)


def _parse_einsum(args: Sequence[Any]) -> ParsedProduct | None:
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2:
        return None
    labels = einsum_labels(args[0], operands[0].dim(), operands[1].dim())
    return None if labels is None else ParsedProduct(operands[0], operands[1], labels)


def _parse_baddbmm(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> ParsedProduct:
    beta, alpha = float(kwargs.get("beta", 1)), float(kwargs.get("alpha", 1))
    added: Any = kwargs.get("input", args[0] if args else None)
    a: Any = kwargs.get("batch1", args[1] if len(args) > 1 else None)
    b: Any = kwargs.get("batch2", args[2] if len(args) > 2 else None)
    labels = matmul_labels(3, 3)
    assert labels is not None
    if not beta:  # torch leaves out what is added, which may be memory that nobody filled
        return ParsedProduct(a, b, labels, alpha)
    return ParsedProduct(a, b, labels, alpha, (added.clone() if name.endswith("_") else added, beta))


def matmul_labels(a: int, b: int) -> ProductLabels | None:
    """Labels of ``torch.matmul`` on operands of ``a`` and ``b`` dimensions."""
    if a < 1 or b < 1:
        return None
    n = max(a, b) - 2
    batch_a, batch_b = list(range(n - max(a - 2, 0), n)), list(range(n - max(b - 2, 0), n))
    la: list[Label] = [*batch_a, "m", "k"] if a > 1 else ["k"]
    lb: list[Label] = [*batch_b, "k", "n"] if b > 1 else ["k"]
    lo: list[Label] = [*(batch_a if a >= b else batch_b)]
    return ProductLabels(la, lb, lo + (["m"] if a > 1 else []) + (["n"] if b > 1 else []))


def einsum_labels(equation: str, a: int, b: int) -> ProductLabels | None:
    """Labels of a two-operand einsum; None where it is not a plain product (repeated letters, sums inside).

    Letters are labels as they stand. The dimensions of ``...`` are −1, −2, … from the last one, so that those of both
    operands match from the right, as broadcasting has it.
    """
    equation = equation.replace(" ", "")
    made = several_labels(equation, (a, b))
    return None if made is None else ProductLabels(made[0][0], made[0][1], made[1])


class ParsedEinsum(NamedTuple):
    """An einsum of more than two tensors.

    Attributes:
        operands: the tensors.
        labels: those of each.
        out: those of the result.
    """

    operands: Sequence[Tensor]
    labels: Sequence[Sequence[Label]]
    out: Sequence[Label]


def parse_several(args: Sequence[Any]) -> ParsedEinsum | None:
    """The operands and labels of an einsum of more than two tensors; None: it is none."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not args or not isinstance(args[0], str) or len(operands) < 3:
        return None
    made = several_labels(args[0].replace(" ", ""), [x.dim() for x in operands])
    return None if made is None else ParsedEinsum(operands, *made)


def several_labels(equation: str, dims: Sequence[int]) -> tuple[list[list[Label]], list[Label]] | None:
    """The labels of the operands, of so many dimensions each, and of the result; None: they are no plain product."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(dims):
        return None

    def expand(term: str, n: int) -> list[Label]:
        if "..." not in term:
            return list(term)
        head, tail = term.split("...")
        extra = n - len(head) - len(tail)
        return [*head, *range(-extra, 0), *tail]

    operands = [expand(term, n) for term, n in zip(terms, dims, strict=True)]
    if not arrow:
        counts = left.replace(",", "").replace(".", "")
        dots = "..." if "..." in left else ""
        right = dots + "".join(sorted(x for x in set(counts) if counts.count(x) == 1))
    n_dots = max((sum(isinstance(x, int) for x in side) for side in operands), default=0)
    lo = expand(right, len(right.replace(".", "")) + n_dots)
    if any(len(set(x)) != len(x) for x in (*operands, lo)) or set(lo) - {x for side in operands for x in side}:
        return None
    return operands, lo
