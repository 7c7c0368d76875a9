"""Heads that make the token they look at more likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from torch import Tensor, nn

from ...errors import MeasureError
from ...models.wrappers import inside_all
from ..frame import ranked_table, table_of
from .circuit import Circuit, checked_circuits

if TYPE_CHECKING:
    from pandas import DataFrame


def copying(circuits: Sequence[Circuit], embed: Tensor | nn.Module, unembed: Tensor | nn.Module) -> DataFrame:
    """The copying score of each head: ``Σ λ / Σ |λ|``, λ the eigenvalues of ``W_E W_V W_O W_U`` (Elhage et al. 2021).

    The matrix says how much looking at each token (rows) raises the logit of each (columns). 1: all eigenvalues are
    positive, tokens raise themselves; about 0 for a matrix that has nothing to do with copying; −1: they lower
    themselves. The eigenvalues that are not 0 are those of the E E matrix ``W_O W_U W_E W_V``, so that none of V V is
    formed. Norms on the way are left out, as they are there.

    Args:
        circuits: as :func:`hookattn.analyze.circuit` makes them; only self-attention that reads and writes the width of
            the embedding.
        embed: V C, or the module with such a ``weight``; :func:`vocabulary` finds it in many models.
        unembed: V C, as the ``weight`` of an ``nn.Linear`` from C to V.

    Returns:
        A pandas DataFrame, the highest first: ``layer``, ``stack``, ``path``, ``head``, ``value`` (NaN for a head whose
        eigenvalues are all 0).

    Raises:
        MeasureError: the matrices do not fit each other or a circuit; or W_V or W_O of a circuit is not known.
    """

    circuits = checked_circuits(circuits)
    inner, outer = _vocabulary_matrix("embed", embed), _vocabulary_matrix("unembed", unembed)
    if inner.shape != outer.shape:
        raise MeasureError(
            f"embed has shape {tuple(inner.shape)} and unembed {tuple(outer.shape)}: expected V C for both, with the "
            "same V; cut padding entries of the vocabulary off."
        )
    if not circuits:
        raise MeasureError("there are no circuits; make them with hookattn.analyze.circuit(model, inputs).")
    w_ue = einsum(outer, inner.to(outer.dtype), "v write, v read -> write read")
    # The eigenvalues of A B that are not 0 are those of B A: V by V with A = W_E W_V, E by E the other way round.
    frames = []
    for c in circuits:
        w_v, w_o = (x.to(w_ue) for x in (c.W_V, c.W_O))
        if w_v.shape[1] != w_ue.shape[1] or w_o.shape[2] != w_ue.shape[0]:
            raise MeasureError(
                f"{c.site.label} reads {w_v.shape[1]} wide and writes {w_o.shape[2]} wide, and the embedding is "
                f"{w_ue.shape[0]} wide."
            )
        products = einsum(w_o, w_ue, w_v, "h e1 write, write read, h read e2 -> h e1 e2")
        values = torch.linalg.eigvals(products.double())
        score = values.real.sum(-1) / values.abs().sum(-1)
        place = {"layer": c.site.layer, "stack": c.site.stack, "path": c.site.path, "head": range(c.heads)}
        frames.append(table_of({**place, "value": score.cpu().numpy()}))
    return ranked_table(frames, "value")


def vocabulary(model: Any) -> tuple[Tensor, Tensor]:
    """The embedding and the unembedding of a model that says which they are, each V C.

    Args:
        model: with ``get_input_embeddings()`` and ``get_output_embeddings()``, as those of transformers with a head for
            tokens.

    Raises:
        MeasureError: it does not say.
    """
    found = []
    model = inside_all(model) if isinstance(model, nn.Module) else model
    for name in ("input", "output"):
        get = getattr(model, f"get_{name}_embeddings", None)
        module = get() if callable(get) else None
        if module is None:
            raise MeasureError(
                f"{type(model).__name__} does not say what its {name} embedding is (get_{name}_embeddings); give "
                "copying(…) the modules, an nn.Embedding and the last nn.Linear."
            )
        found.append(_vocabulary_matrix(name, module))
    return found[0], found[1]


def _vocabulary_matrix(name: str, given: Any) -> Tensor:
    weight = getattr(given, "weight", given)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise MeasureError(
            f"{name}: expected a tensor V C or a module with such a weight; got {type(given).__name__}"
            + (f" of shape {tuple(weight.shape)}." if isinstance(weight, Tensor) else ".")
        )
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()
