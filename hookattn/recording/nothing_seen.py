"""Why a trace is empty: what was seen of a forward in which no attention ran."""

from __future__ import annotations

from collections.abc import Iterable

from ..taps.eager.operations import kind_of


def nothing_seen(model: str, names: Iterable[str]) -> str:
    """What is told of a model without attention.

    Args:
        model: its class name.
        names: of the operations that ran; ``library::operator`` and ``the scripted function …`` for what is none of
            torch's functions.
    """
    known = sorted(set(names) - {""})
    hidden = [n for n in known if n.startswith("the scripted") or ("::" in n and n.split("::")[0] not in _OWN)]
    products = [n for n in known if kind_of(n).product]
    softmaxes = [n for n in known if kind_of(n).softmax]
    if not known:
        seen = "no operation of torch was seen while it ran"
    elif products and softmaxes:
        seen = (
            f"products ({', '.join(products)}) and a softmax ran, and no values were weighted by what was made of both"
        )
    elif products:
        seen = f"products ({', '.join(products)}) ran, and nothing was made of one that weights values"
    elif softmaxes:
        seen = "a softmax ran, and no values were weighted by it"
    else:
        seen = "neither a kernel of torch, nor a product of two tensors or a softmax ran"
    if hidden:
        then = (
            f"Nothing can be seen in {', '.join(hidden)}: if it attends there, call the Python function that it was "
            "made from, or torch's scaled_dot_product_attention in its place."
        )
    else:
        then = "A compiled extension that attends can't be seen; where there is one, call torch's kernels in its place."
    return f"no attention ran in {model}: {seen}. {then}"


_OWN = frozenset({"aten", "higher_order", "prim", "prims"})
