"""Where queries are: padded batches, caches with an empty end, rows that were left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import analyze
from hookattn.statistics.positions import last_allowed
from tests import tiny_models
from tests.analyze.build import case

IDS = torch.tensor([[5, 6, 7, 5, 6], [0, 0, 8, 9, 8]])
MEASURES = ("previous_token", "self_token", "positional", "mean_distance", "local_mass")


def generated(capture: Any, **options: Any) -> hookattn.Trace:
    model = tiny_models.llama()
    with torch.random.fork_rng(), hookattn.tracing(model, capture=capture) as trace:
        model.generate(input_ids=IDS, attention_mask=(IDS != 0).long(), max_new_tokens=4, min_new_tokens=4,
                       do_sample=False, **options)  # fmt: skip
    return trace


def numbers(trace: hookattn.Trace) -> Tensor:
    return torch.tensor(analyze.measure(trace, MEASURES, by="example")[list(MEASURES)].to_numpy())


@pytest.mark.parametrize("capture", [("weights", "mask"), (*analyze.capture(*MEASURES), "mask")])
def test_a_padded_batch_has_the_same_numbers_with_a_static_cache(capture: Any) -> None:
    """The rows of the padding have no key at all, and are no reason to take the first rows for the last."""
    dynamic, static = generated(("weights", "mask")), generated(capture, cache_implementation="static")
    assert (static[0].keys or static[0].weights.shape[3]) > IDS.shape[1]
    torch.testing.assert_close(numbers(static), numbers(dynamic), atol=2e-6, rtol=0)


@pytest.mark.parametrize("queries", [[2], [0], [1, 2, 5]])
@pytest.mark.parametrize("build", ["bert", "modernbert"])
def test_rows_of_an_encoder_are_at_their_own_keys(build: str, queries: list[int]) -> None:
    """Its last key, or the far edge of its window, is no diagonal."""
    model = tiny_models.bert() if build == "bert" else tiny_models.build(
        "ModernBertModel", "ModernBertConfig", **tiny_models.SMALL, **tiny_models.WORDS, local_attention=4,
        global_attn_every_n_layers=3, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    ids = torch.tensor([[3, 10, 11, 12, 4, 13, 10, 4], [3, 20, 21, 4, 22, 4, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    whole, some = (
        analyze.measure(hookattn.trace(model, inputs, **kept), ["previous_token", "next_token"], by="query")
        for kept in ({}, {"queries": queries})
    )
    whole = whole[whole["query"].isin(queries)].reset_index(drop=True)
    assert some["query"].tolist() == whole["query"].tolist()
    for name in ("previous_token", "next_token"):
        torch.testing.assert_close(*(torch.tensor(x[name].to_numpy()) for x in (some, whole)), equal_nan=True,
                                   atol=1e-6, rtol=0)  # fmt: skip


def test_one_row_of_a_first_forward_may_be_anywhere() -> None:
    """A cache before it and keys behind it look the same: no number is made up."""
    made = case(causal=False, queries=(3,), pad=(0, 2))
    view = analyze.View(made.trace[0], made.trace)
    assert view.positions is None
    with pytest.raises(hookattn.errors.MeasureError, match="previous_token of call 0"):
        analyze.PreviousToken()(made.trace)


def _causal(t: int, s: int, offset: int, real: list[list[int]]) -> Tensor:
    own = torch.arange(t)[:, None] + offset >= torch.arange(s)
    return (own & torch.tensor(real).bool()[:, None]).unsqueeze(1)


@pytest.mark.parametrize(
    ("real", "t", "offset"),
    [
        ([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0]], 4, 0),  # padding on the left, an empty end
        ([[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], 4, 0),  # on the right
        ([[1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0]], 3, 3),
        ([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]], 2, 3),  # an entry of padding alone
    ],
)
def test_padding_is_in_line(real: list[list[int]], t: int, offset: int) -> None:
    found = last_allowed(_causal(t, 7, offset, real), torch.arange(t), 7)
    assert found is not None
    assert found.tolist() == [list(range(offset, offset + t))] * 2


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 3, 7, dtype=torch.bool),
        torch.tensor([[[[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]]]).bool(),
        torch.tensor([[[[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]]]).bool(),
        torch.zeros(1, 1, 2, 4, dtype=torch.bool),
    ],
)
def test_what_is_no_diagonal_is_none(mask: Tensor) -> None:
    assert last_allowed(mask, torch.arange(mask.shape[2]), mask.shape[3]) is None
