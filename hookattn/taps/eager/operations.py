"""The table of torch's operations: for each name, what following needs to know of it, a column for every question.

A row is an :class:`.operation.OperationKind`, which says what each column means. An operation without a row keeps the
axes of its first argument where the shape is the same, and makes scores and weights opaque: their values are then
taken from the model.

To add an operation, give it a row (or its name to a row that fits in every column). An operation in place has a name of
its own and needs a row of its own if anything but its entries is to be followed: what it leaves of the tensor before it
is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from ...torch_internals.operators import operator_name
from . import entry_rules, pairwise, score_rules, sum_rules, view_rules, weight_rules
from .concat_rules import concatenated_scores
from .operation import OperationKind, Rule, same_state
from .states import (
    Exponentials,
    LogWeights,
    Pairwise,
    PartialOutput,
    RowStatistic,
    ScatteredScores,
    Scores,
    ScoresSlice,
    State,
    TopScores,
    Unnormalized,
    WeightedValues,
    Weights,
)

Row = OperationKind
_EVERY_VIEW: dict[type[State], Rule] = {
    **dict.fromkeys((Scores, ScoresSlice, Exponentials, LogWeights, RowStatistic, Weights, PartialOutput), same_state),
    Pairwise: pairwise.same_pairs,
}


def _view(axes: view_rules.AxesRule) -> Row:
    """Views of the whole: every state goes through them."""
    return Row(axes=axes, operand=0, entries=entry_rules.replayed, moves_scores=True, rules=_EVERY_VIEW)


_COPY = Row(
    operand=0,
    entries=entry_rules.same_places,
    moves_scores=True,
    rules=_EVERY_VIEW | {Unnormalized: sum_rules.kept_sums, TopScores: same_state},
)
_SHUFFLED = Row(entries=entry_rules.replayed, moves_scores=True, shuffles=True)
_MUL = Row(
    entries=entry_rules.same_places_of_either,
    arithmetic="mul",
    pairs=True,
    moves_scores=True,
    rules={
        Scores: score_rules.multiplied,
        Exponentials: weight_rules.masked_exponentials,
        Weights: weight_rules.multiplied_weights,
        Unnormalized: sum_rules.scaled_sums,
        TopScores: weight_rules.scaled_largest,
    },
)
_DIV = Row(
    entries=entry_rules.same_places_of_either,
    arithmetic="div",
    pairs=True,
    moves_scores=True,
    rules={
        Scores: score_rules.divided,
        Exponentials: weight_rules.normalized,
        Unnormalized: sum_rules.scaled_sums,
        TopScores: weight_rules.scaled_largest,
    },
)
_ADD = Row(
    entries=entry_rules.same_places_of_either,
    arithmetic="add",
    pairs=True,
    moves_scores=True,
    rules={
        Scores: score_rules.added,
        RowStatistic: weight_rules.denominator,
        PartialOutput: weight_rules.summed_outputs,
        Unnormalized: sum_rules.added_sums,
    },
)
_SUB = Row(
    entries=entry_rules.same_places_of_either,
    arithmetic="sub",
    pairs=True,
    moves_scores=True,
    rules={Scores: score_rules.subtracted},
)
_FILL = Row(
    entries=entry_rules.same_places_of_either,
    moves_scores=True,
    rules={
        Scores: score_rules.mask_filled,
        Exponentials: score_rules.mask_filled,
        Weights: weight_rules.masked_weights,
    },
)
_CLAMP = Row(
    entries=entry_rules.same_places_of_either,
    moves_scores=True,
    rules={Scores: score_rules.clamped, RowStatistic: weight_rules.clamped_statistic},
)
_WHERE = Row(
    entries=entry_rules.chosen,
    moves_scores=True,
    rules={Scores: score_rules.where_filled, Weights: weight_rules.where_weights},
)
_DROPOUT = Row(
    entries=entry_rules.same_places,
    drops_out=True,
    rules={Weights: weight_rules.weights_after_dropout, Scores: score_rules.scores_after_dropout},
)
_CAT = Row(
    joins=True,
    entries=entry_rules.concatenated,
    moves_scores=True,
    rules={Scores: concatenated_scores},
)

# Rows by the names that share them. A name stands here once.
_ROWS: dict[str, Row] = {
    # ---- views of the whole
    "view reshape flatten unflatten squeeze view_as reshape_as": _view(view_rules.reshaped),
    "unsqueeze": _view(view_rules.unsqueezed),
    "ravel _unsafe_view": Row(operand=0, axes=view_rules.reshaped),
    "transpose swapaxes swapdims": _view(view_rules.transposed),
    "transpose_": Row(operand=0, axes=view_rules.transposed, entries=entry_rules.replayed),
    "t mT": _view(view_rules.transposed_matrix),
    "adjoint": Row(operand=0, axes=view_rules.transposed_matrix),
    "T": _view(view_rules.reversed_dims),
    "permute": _view(view_rules.permuted),
    "movedim moveaxis": _view(view_rules.dims_moved),
    "expand expand_as": _view(view_rules.expanded),
    "broadcast_to": Row(operand=0, axes=view_rules.expanded),
    # ---- copies and casts
    "contiguous clone detach to float half double bfloat16 type type_as alias nan_to_num nan_to_num_": _COPY,
    "copy_": Row(pours=True, entries=entry_rules.written, moves_scores=True),
    "__setitem__": Row(
        pours=True, entries=entry_rules.written, moves_scores=True, rules={Scores: score_rules.item_filled}
    ),
    # ---- a part of a tensor
    "__getitem__": Row(
        axes=view_rules.indexed,
        operand=0,
        entries=entry_rules.replayed,
        moves_scores=True,
        rules={
            Scores: same_state,
            ScoresSlice: same_state,
            Exponentials: weight_rules.whole_exponentials,
            RowStatistic: weight_rules.whole_exponentials,
            Weights: weight_rules.sliced_weights,
            Pairwise: pairwise.picked_pairs,
        },
    ),
    "narrow": Row(
        axes=view_rules.resized,
        operand=0,
        entries=entry_rules.replayed,
        moves_scores=True,
        rules={Scores: same_state, Weights: weight_rules.sliced_weights},
    ),
    "select": Row(
        axes=view_rules.dim_dropped,
        operand=0,
        entries=entry_rules.replayed,
        moves_scores=True,
        rules={Scores: same_state, Pairwise: pairwise.picked_pairs, Weights: weight_rules.sliced_weights},
    ),
    "unbind": Row(operand=0, axes=view_rules.dim_dropped, splits=True, moves_scores=True),
    "chunk split": Row(operand=0, axes=view_rules.resized, splits=True, moves_scores=True, rules={Scores: same_state}),
    "split_with_sizes tensor_split hsplit": Row(operand=0, axes=view_rules.resized, splits=True),
    "diagonal": Row(entries=entry_rules.replayed, moves_scores=True),
    "unfold": Row(operand=0, axes=view_rules.windowed, entries=entry_rules.replayed, moves_scores=True),
    "as_strided": Row(operand=0, axes=view_rules.strided, moves_scores=True),
    "masked_select take": Row(moves_scores=True),
    "view_as_complex": Row(operand=0, axes=view_rules.complex_pairs),
    "view_as_real": Row(operand=0, axes=view_rules.real_pairs),
    # ---- copies of a tensor, and several tensors in one
    "repeat": Row(operand=0, axes=view_rules.repeated, moves_scores=True),
    "tile": Row(operand=0, axes=view_rules.repeated),
    "repeat_interleave": Row(operand=0, axes=view_rules.interleaved, moves_scores=True),
    "pad": Row(
        operand=0,
        axes=view_rules.resized,
        entries=entry_rules.padded,
        moves_scores=True,
    ),
    "constant_pad_nd": Row(entries=entry_rules.padded),
    "cat concat concatenate": _CAT,
    "stack": Row(joins=True, moves_scores=True),
    "hstack vstack": Row(moves_scores=True),
    # ---- entries in other places
    "flip roll": _SHUFFLED,
    "gather take_along_dim": replace(_SHUFFLED, operand=0, axes=view_rules.gathered),
    "index_select": replace(_SHUFFLED, operand=0, axes=view_rules.resized),
    "topk": Row(operand=0, axes=view_rules.resized, moves_scores=True, rules={Scores: weight_rules.largest_scores}),
    "sort msort rot90": Row(moves_scores=True, shuffles=True),
    "cumsum": Row(
        moves_scores=True,
        shuffles=True,
        rules={Scores: score_rules.added_up, Pairwise: pairwise.added_up},
    ),
    "fliplr flipud": Row(shuffles=True),
    "scatter scatter_": Row(moves_scores=True, rules={TopScores: weight_rules.scattered_largest}),
    "index_add index_copy index_copy_ index_put index_put_": Row(moves_scores=True),
    # ---- arithmetic
    "mul mul_ multiply __mul__ __rmul__ __imul__": _MUL,
    "div div_ divide true_divide __truediv__ __itruediv__": _DIV,
    "add add_ __add__ __radd__ __iadd__": _ADD,
    "sub sub_ subtract __sub__ __isub__": _SUB,
    "neg neg_ negative __neg__": Row(rules={Scores: score_rules.negated}),
    "tanh tanh_": Row(rules={Scores: score_rules.capped}),
    "exp exp_": Row(rules={Scores: weight_rules.exponentials, LogWeights: weight_rules.exponentials}),
    # ---- masks and bounds
    "masked_fill masked_fill_": _FILL,
    "where where_method": _WHERE,
    "tril triu": Row(moves_scores=True),
    "clamp clamp_min": _CLAMP,
    "clamp_": replace(_CLAMP, moves_scores=False),
    "clamp_min_": replace(_CLAMP, moves_scores=False, rules={Scores: score_rules.clamped}),
    "clip": Row(rules={Scores: score_rules.clamped}),
    "maximum": _CLAMP,
    # ---- softmax, whole or in steps
    "softmax": Row(
        softmax=True,
        rules={
            Scores: weight_rules.weights_of_scores,
            ScoresSlice: weight_rules.scattered_softmax,
            ScatteredScores: weight_rules.scattered_softmax,
            Pairwise: weight_rules.weights_of_pairs,
            TopScores: weight_rules.weights_of_largest,
        },
    ),
    "log": Row(rules={RowStatistic: weight_rules.logarithm}),
    "logaddexp softplus": Row(rules={RowStatistic: weight_rules.extended_logsumexp}),
    "log_softmax": Row(rules={Scores: weight_rules.log_weights}),
    "max": Row(rules={Scores: weight_rules.maximum, RowStatistic: weight_rules.clamped_statistic}),
    "amax": Row(rules={Scores: weight_rules.row_maximum}),
    "logsumexp": Row(rules={Scores: weight_rules.row_logsumexp, ScatteredScores: weight_rules.row_logsumexp}),
    "sum": Row(
        pairs=True,
        rules={
            Exponentials: weight_rules.row_sum,
            Scores: weight_rules.row_total,
            Pairwise: pairwise.summed_pairs,
            WeightedValues: weight_rules.summed_values,
            Weights: weight_rules.pooled_values,
        },
    ),
    "mean": Row(rules={Pairwise: pairwise.summed_pairs}),
    "norm linalg_vector_norm": Row(rules={Pairwise: pairwise.summed_pairs}),
    # ---- dropout
    "dropout dropout_": _DROPOUT,
    "dropout1d dropout2d dropout3d": Row(drops_out=True),
    "feature_dropout alpha_dropout native_dropout": Row(rules={Weights: weight_rules.weights_after_dropout}),
    # ---- products, and other sums over an axis
    "matmul __matmul__ __rmatmul__ bmm mm baddbmm baddbmm_ einsum": Row(product=True),
    "linear": Row(operand=0, axes=view_rules.mapped, sums_axis=True, rules={Pairwise: pairwise.mapped_pairs}),
    "addmm": Row(operand=1, axes=view_rules.mapped_and_added, sums_axis=True),
    "conv1d conv2d conv3d": Row(operand=0, axes=view_rules.convolved, sums_axis=True),
    "embedding": Row(operand=0, axes=view_rules.embedded, sums_axis=True),
    "bilinear addmv addbmm addr conv_transpose1d conv_transpose2d conv_transpose3d": Row(
        axes=view_rules.unknown, sums_axis=True
    ),
    "embedding_bag tensordot inner dot mv outer kron cross multi_head_attention_forward": Row(
        axes=view_rules.unknown, sums_axis=True
    ),
    "inverse linalg_inv linalg_pinv pinverse linalg_solve linalg_solve_triangular linalg_lstsq cholesky_solve "
    "linalg_cholesky cholesky linalg_matrix_power matrix_power linalg_matrix_exp matrix_exp": Row(
        axes=view_rules.unknown, sums_axis=True
    ),
    # ---- functions of pairs of vectors
    "cdist": Row(axes=view_rules.unknown, sums_axis=True, product=True),
    "cosine_similarity pairwise_distance": Row(axes=view_rules.unknown, sums_axis=True, pairs=True),
    # ---- what makes no tensor worth following, and everything that only asks
    "size dim numel stride is_contiguous storage_offset data_ptr item tolist __len__ __bool__ __repr__ __format__ "
    "sym_size sym_stride sym_numel sym_storage_offset "
    "is_floating_point is_complex is_inference nelement ndimension element_size get_device __hash__ __iter__ "
    "backward register_hook requires_grad_ retain_grad _set_grad_enabled __set__ arange zeros ones full empty tensor "
    "as_tensor zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_tensor finfo "
    "eye linspace scalar_tensor set_ __deepcopy__ __reduce_ex__ numpy __contains__ broadcast_tensors "
    "lt le gt ge eq ne __eq__ __lt__ __gt__ __le__ __ge__ __ne__ any all argmax": Row(ignored=True),
}
OPERATIONS: dict[str, OperationKind] = {name: row for names, row in _ROWS.items() for name in names.split()}

# An einsum of one operand moves axes, and is no product.
REARRANGED = _view(view_rules.rearranged)

_PROPERTIES = frozenset(("T", "mT", "H", "mH"))
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
# Operators of torch.ops.aten that have their arguments in another order than the function.
OPERATIONS["aten::slice"] = OPERATIONS["narrow"]
OPERATIONS["aten::index"] = replace(OPERATIONS["__getitem__"], axes=view_rules.indexed_by_list)
OPERATIONS["aten::embedding"] = replace(OPERATIONS["embedding"], axes=view_rules.embedded_from, operand=1)
# Operators of torch.ops.aten whose names are no function's, or another's.
_OPERATORS = {
    "_log_softmax": "log_softmax",
    "_safe_softmax": "softmax",
    "_to_copy": "to",
    "_unsafe_view": "reshape",
    "convolution": "conv2d",
    "embedding": "aten::embedding",
    "index": "aten::index",
    "lift_fresh_copy": "clone",
    "numpy_T": "T",
    "slice": "aten::slice",
    "unsafe_chunk": "chunk",
    "unsafe_split": "split",
    "unsafe_split_with_sizes": "split_with_sizes",
}


def name_of(func: Any) -> str:
    """One name for the function, the method and the operator; empty for what makes no tensor worth following.

    An operator of ``torch.ops`` has the name of the function, if it is torch's own; another library's may mean anything
    by it, and keeps the library's name in front.
    """
    operator = operator_name(func)
    if operator is None:
        name = getattr(func, "__name__", "")
    elif operator[0] != "aten":
        return "::".join(operator)
    else:
        name = _OPERATORS.get(operator[1], operator[1])
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return _ALIASES.get(name, name) if name in _PROPERTIES else ""
    if kind_of(name).ignored:
        return ""
    if name == "where" and func is Tensor.where:  # its condition comes second, the function's first
        return "where_method"
    return _ALIASES.get(name, name) or "?"


@cache
def kind_of(name: str) -> OperationKind:
    """The row of an operation.

    One in place that has no row moves its entries as the operation of that name does that makes a new tensor.
    """
    row = OPERATIONS.get(name)
    if row is not None:
        return row
    return OperationKind(entries=kind_of(name[:-1]).entries) if _in_place(name) and name[-2:] != "__" else _NO_ROW


_NO_ROW = OperationKind()


def mixes_axis(name: str) -> bool:
    """Whether an operation sums over an axis of what it is given."""
    kind = kind_of(name)
    return kind.product or kind.sums_axis


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
