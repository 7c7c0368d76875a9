"""Where queries are: padded batches, caches with an empty end, rows that were left out."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import Call, Site, Trace, analyze
from hookattn.attention.positions import last_allowed
from hookattn.calls.part import parts_of
from hookattn.calls.query_positions import query_positions
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


def test_one_row_of_a_first_forward_may_be_anywhere_in_an_older_file() -> None:
    """A cache before it and keys behind it look the same where T is not known: no number is made up."""
    made = case(causal=False, queries=(3,), pad=(0, 2))
    assert [c.of_queries for c in made.trace] == [9, 9]
    known = analyze.View(made.trace[0], made.trace).positions
    assert known is not None and known.tolist() == [[3]]
    for call in made.trace:
        call.of_queries = None
    view = analyze.View(made.trace[0], made.trace)
    assert view.positions is None and parts_of(made.trace)[0].places is None
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


LAYOUTS = {"square": (6, 6, 0), "cache": (4, 10, 6), "static": (5, 12, 0), "static, later": (3, 12, 5)}
"""T, S, and the key position of the first query."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selected_rows_are_where_they_are_in_the_whole_call(layout: str, pad: str, causal: bool) -> None:
    """Whatever rows, in whatever order; padding hides the own keys of some."""
    t, s, first = LAYOUTS[layout]
    if pad == "right" and first:
        pytest.skip("what is padded on the right has no queries behind it")
    real = [[1] * s, [int(not (j < 2 if pad == "left" else t - 2 <= j < t)) for j in range(s)]]
    mask = _causal(t, s, first, real if pad != "none" else [real[0]] * 2)
    for rows in (*product(range(t)), *product(range(t), repeat=2)):
        given = {"queries": rows, "of_queries": t, "causal": causal, "fields": {"mask": mask[:, :, list(rows)]}}
        found = query_positions(Call(Site("attn"), 0, 0, "test", torch.float32, 1.0, **given), len(rows), s)
        assert found is not None
        assert found.expand(2, -1).tolist() == [[first + i for i in rows]] * 2, rows


@pytest.mark.parametrize("layout", ["square", "cache"])
def test_selected_rows_that_look_ahead(layout: str) -> None:
    """The last key that such a row may attend to is the last of all, which is no diagonal; nor is there one unseen."""
    t, s, first = LAYOUTS[layout]
    for i in range(t):
        for kept in ({"mask": torch.ones(2, 1, 1, s, dtype=torch.bool)}, {}):
            call = Call(Site("attn"), 1, 0, "test", torch.float32, 1.0, queries=(i,), of_queries=t, fields={**kept})
            found = query_positions(call, 1, s)
            assert found is not None
            assert found.expand(2, -1).tolist() == [[first + i]] * 2


def test_more_queries_than_keys() -> None:
    call = Call(Site("attn"), 0, 0, "test", torch.float32, 1.0, queries=(1,), of_queries=5)
    assert query_positions(call, 1, 3) is None


def forwards(name: str, **options: Any) -> Trace:
    """A trace of a model whose kernels are given masks, or are causal, or look ahead, with or without a cache."""
    kind, _, way = name.partition(", ")
    model, mask = getattr(tiny_models, kind)(), (IDS != 0).long()
    given: dict[str, Any] = {"input_ids": IDS, "attention_mask": mask.flip(1) if way == "right" else mask}
    with torch.random.fork_rng(), torch.no_grad(), hookattn.tracing(model, **options) as trace:
        if kind == "bert" or way == "right":
            model(**given)
        elif kind == "t5":
            model(**given, decoder_input_ids=IDS[:, :3])
        else:
            more = {"cache_implementation": "static"} if way == "static" else {}
            model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False, **more)
    return trace


MODELS = ["llama, left", "llama, static", "gpt2, left", "gpt2, right", "bert, right", "t5, left"]


@pytest.mark.parametrize("queries", [-1, 0, [-1, 0]])
@pytest.mark.parametrize("name", MODELS)
def test_selected_rows_of_models(name: str, queries: Any, tmp_path: Path) -> None:
    """Analyzers and pictures have one rule, and a file keeps what it needs."""
    whole, some = forwards(name), forwards(name, queries=queries)
    some = hookattn.load(some.save(tmp_path / "f", compact=True))
    assert len(whole) == len(some) and any(c.of_queries == IDS.shape[1] for c in some)
    for all_of, call in zip(whole, some, strict=True):
        rows = list(call.queries or ())
        assert call.of_queries == all_of.q.shape[2] and len(rows) == call.q.shape[2]
        expected = analyze.View(all_of, whole).positions
        found = analyze.View(call, some).positions
        if call.site.crosses:
            assert expected is None and found is None
            continue
        assert expected is not None and found is not None
        assert found.expand(2, -1).tolist() == expected.expand(2, -1)[:, rows].tolist(), call
        for batch in (0, 1):
            part = parts_of(Trace([call]), batch=batch)[0]
            assert part.places == tuple(found.expand(2, -1)[batch].tolist())


def test_rows_of_forwards_of_one_length_are_not_in_a_cache() -> None:
    """As many queries as keys: there is no empty end, whatever else ran with as many keys."""
    model = tiny_models.bert()
    with hookattn.tracing(model, capture=analyze.capture("previous_token"), queries=[1]) as trace:
        model(IDS)
        model(IDS)
    assert [c.keys for c in trace] == [5] * len(trace) and len(trace) > 2
    assert [analyze.View(c, trace).lost for c in trace] == [None] * len(trace)
    for call in trace:
        call.of_queries = None
    assert all("only the mask tells" in (analyze.View(c, trace).lost or "") for c in trace)
