"""Nothing is measured of weights that an edit has replaced: whoever measures sees those that it has set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hookattn
from hookattn import FieldNotCaptured, analyze, edit
from hookattn.analyze.call_view import View
from hookattn.analyze.tables.compare import compare
from hookattn.analyze.tables.pool import pool_words
from hookattn.errors import MeasureError
from hookattn.statistics import Entropy, Received
from tests import tiny_models as tiny

ZERO = edit.zero("weights", layer=0, heads=[1])
HALF = edit.scale("weights", 0.5, layer=0, heads=[1])
TWICE = edit.scale("weights", 2.0, layer=0, heads=[1])
BELOW = edit.scale("weights", -1.0, layer=0, heads=[1])
SCORES = edit.scale("scores", 2.0, layer=0, heads=[1])
STATISTICS = ("entropy", "lse", "received", "first_mass", "max_score")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(*edits: hookattn.edit.Edit, **options: Any) -> hookattn.Trace:
    torch.manual_seed(0)
    return hookattn.edited(tiny.gpt2(), {"input_ids": torch.randint(3, 60, (2, 7))}, *edits, **options)


def clean() -> hookattn.Trace:
    torch.manual_seed(0)
    return hookattn.trace(tiny.gpt2(), {"input_ids": torch.randint(3, 60, (2, 7))})


def entropies(w: torch.Tensor) -> torch.Tensor:
    w = w.double()
    return -torch.xlogy(w, w).sum(-1)


@pytest.mark.parametrize("made", [ZERO, SCORES], ids=["weights", "scores"])
def test_statistics_beside_the_kernel_are_of_what_edits_have_made(made: Any) -> None:
    whole, trace = run(made)[0], run(made, capture=STATISTICS)
    call, other = trace[0], trace[1]
    entropy, received = call.get("entropy"), call.get("received")
    assert entropy is not None and received is not None
    assert (entropy - entropies(whole.weights)).abs().max() < 1e-5
    assert (received - whole.weights.sum(2)).abs().max() < 1e-5
    assert {*call.fields} == {"entropy", "lse", "received", "first_mass(1)", "max_score"} and not call.beside
    assert other.get("lse") is not None and call.certificate.faithful
    if made is ZERO:
        assert call.get("lse") is None and call.get("max_score") is None
        assert "lse, max_score: not defined here, as its weights follow from no scores" in call.notes
    else:
        masked = whole.scores.masked_fill(~whole.mask, -torch.inf)
        lse = call.get("lse")
        assert lse is not None and lse.sub(masked.logsumexp(-1)).abs().max() < 1e-4


def test_what_rows_lack_goes_to_no_key() -> None:
    """Halved weights are half a distribution; the entropy of the whole has the other half as that of a sink."""
    entropy = run(HALF, capture=("entropy",))[0].get("entropy")
    own = run(HALF)
    assert entropy is not None
    assert torch.allclose(entropy, View(own[0], own).stat(Entropy()), atol=1e-5)


@pytest.mark.parametrize("made", [TWICE, BELOW], ids=["above 1", "below 0"])
def test_what_is_no_distribution_has_no_statistics(made: Any) -> None:
    trace = run(made, capture=STATISTICS)
    assert all(trace[0].get(name) is None for name in trace[0].fields)
    assert "no distribution (edited: scale(weights) head 1)" in " ".join(trace[0].notes)
    assert trace[1].get("entropy") is not None
    whole = run(made)
    view = View(whole[0], whole)
    assert view.no_distribution is not None and "edited: scale(weights) head 1" in view.no_distribution
    with pytest.raises(MeasureError, match="no distribution"):
        view.stat(Entropy())
    even = analyze.as_distribution(whole)
    assert View(even[0], even).no_distribution is None


@pytest.mark.parametrize("made", [ZERO, HALF], ids=["zero", "half"])
def test_a_view_reads_edited_weights(made: Any) -> None:
    trace = run(made)
    view = View(trace[0], trace)
    assert torch.equal(view.weights, trace[0].weights)
    assert (view.stat(Received()) - trace[0].weights.sum(2)).abs().max() < 1e-5
    unedited = clean()
    alike = View(unedited[0], unedited).stat(Entropy())
    assert (view.stat(Entropy()) - alike)[:, [0, 2, 3]].abs().max() < 1e-5


@pytest.mark.parametrize("capture", [("scores", "mask", "sinks"), ("q", "k", "bias", "mask", "sinks", "v")])
def test_and_derives_none_in_their_place(capture: tuple[str, ...]) -> None:
    trace = run(ZERO, capture=capture)
    view = View(trace[0], trace)
    for read in (lambda: view.weights, lambda: view.stat(Entropy())):
        with pytest.raises(FieldNotCaptured):
            read()
    scores = run(SCORES, capture=("scores", "mask", "sinks"))
    assert (View(scores[0], scores).weights - run(SCORES)[0].weights).abs().max() < 1e-6


def test_compare_says_which_heads_were_edited() -> None:
    table = compare(clean(), run(ZERO, edit.knockout(layer=1, heads=[2], queries=[5], keys=[1])))
    told = {(row.layer, row.head): row.edited for row in table.itertuples()}
    assert told[0, 1] == "b: zero(weights) head 1"
    assert told[1, 2] == "b: knockout(mask) head 2, query 5, key 1"
    assert not any(text for place, text in told.items() if place not in {(0, 1), (1, 2)})
    of_layer = table[table.layer == 0].set_index("head")
    assert of_layer.total_variation[1] == pytest.approx(1.0)
    assert (of_layer.loc[[0, 2, 3], ["total_variation", "max_difference", "output_difference"]] == 0).all(None)
    assert "edited" not in compare(clean(), clean()).columns


def test_compare_of_no_distribution_has_no_divergence_there() -> None:
    table = compare(run(BELOW), clean())
    of_layer = table[table.layer == 0].set_index("head")
    assert of_layer.edited[1] == "a: scale(weights) head 1" and of_layer.jensen_shannon.isna()[1]
    assert (of_layer.jensen_shannon[[0, 2, 3]] == 0).all()
    assert of_layer.max_difference[1] == pytest.approx(2.0, abs=1e-5)


def test_compare_knows_who_reads_an_edited_key_head() -> None:
    model = tiny.llama()
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    table = compare(hookattn.trace(model, inputs), hookattn.edited(model, inputs, edit.zero("v", layer=0, heads=[1])))
    told = {(row.layer, row.head): row.edited for row in table.itertuples()}
    assert [told[0, h] for h in range(4)] == ["", "", *["b: zero(v) head 1"] * 2]


def test_words_have_no_numbers_of_pieces() -> None:
    trace = run(edit.zero("weights", layer=0, heads=[1], queries=[3]), ZERO)
    pooled = pool_words(trace, [0, 0, 1, 1, 2, 2, 3])
    assert [str(x) for x in pooled[0].edits] == ["zero(weights) head 1 of some queries or keys", "zero(weights) head 1"]
