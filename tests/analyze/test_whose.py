"""Whose tokens, labels and padding they are: of an encoder and its decoder, of a generation, of padded batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hookattn
from hookattn import analyze
from hookattn.analyze.chance import Chance
from hookattn.errors import MeasureError
from tests import tiny_models
from tests.analyze.build import given, uniform

IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [5, 6, 2, 0, 0, 0]])
REAL = (IDS != 0).long()
TOKENS = [["▁a", "▁b", "▁a", "▁b", "▁c", "</s>"], ["▁a", "▁a", "</s>", "<pad>", "<pad>", "<pad>"]]


def t5(length: int) -> hookattn.Trace:
    decoder = torch.tensor([[0, 4, 5, 6, 7, 8], [0, 7, 8, 9, 3, 3]])[:, :length]
    inputs = {"input_ids": IDS, "attention_mask": REAL, "decoder_input_ids": decoder}
    return hookattn.trace(tiny_models.t5(), inputs, tokens=TOKENS)


@pytest.mark.parametrize("length", [4, 6])
def test_tokens_and_padding_of_an_encoder_are_not_its_decoder_s(length: int) -> None:
    """Whether the decoder has as many keys by chance, or fewer."""
    trace = t5(length)
    with pytest.raises(MeasureError, match="tokens are the encoder's"):
        analyze.SameWord()(trace)
    with pytest.raises(MeasureError, match=rf"SelfAttention.*expected B S = 2 {length} of the decoder alone"):
        analyze.measure(trace, "entropy", real=REAL)
    table = analyze.measure(trace, "entropy", by="query")
    assert table[table["stack"] == "decoder"]["token"].isna().all()
    assert table[table["stack"] == "encoder"]["token"].notna().all()
    own = trace.select(stack="decoder", kind="self")
    own.tokens = [["x", "y", "x", "y", "x", "y"][:length]] * 2
    assert analyze.SameWord()(own)["same_word"].notna().all()
    assert len(analyze.measure(trace.select(kind="cross"), "entropy", real=REAL)) == 8


def test_a_survey_of_an_encoder_and_its_decoder(tmp_path: object) -> None:
    pd = pytest.importorskip("pandas")
    from hookattn.analyze.survey import Batch, survey

    def encode(_: object) -> list[Batch]:
        decoder = torch.tensor([[0, 4, 5, 6, 7, 8], [0, 7, 8, 9, 3, 3]])
        inputs = {"input_ids": IDS, "attention_mask": REAL, "decoder_input_ids": decoder}
        return [Batch(inputs, 2, real=REAL)]

    out = f"{tmp_path}/heads.parquet"
    survey(tiny_models.t5(), ["a", "b"], encode, out, measures=["entropy"])
    found = pd.read_parquet(out).groupby(["path", "kind", "example", "head"], observed=True)["value"].first()
    expected = analyze.measure(t5(6), "entropy", by="example")
    for row in expected.to_dict("records"):
        assert found[row["path"], row["kind"], row["example"], row["head"]] == pytest.approx(row["entropy"], abs=1e-5)


def test_tokens_of_the_end_fit_a_generation_that_was_put_together() -> None:
    """Its last token never was a key."""
    model = tiny_models.gpt2()
    with hookattn.tracing(model) as trace:
        ids = model.generate(torch.tensor([[5, 6, 7, 5]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    trace.tokens = [[str(i) for i in ids[0].tolist()]]
    table = analyze.measure(trace.stitch(), "duplicate_token", by="query")
    assert table[table["head"] == 0]["token"].tolist()[:6] == trace.tokens[0][:6]


def test_labels_of_words_are_not_taken_for_those_of_a_prompt() -> None:
    """Four words, of which a first step has seen four tokens."""
    tokens = [["▁a", "b", "▁c", "d", "▁e", "▁f"]]
    long, short = given(uniform(6), tokens=tokens), given(uniform(4), tokens=tokens)
    both = hookattn.Trace([*short.calls, *(replace(c, step=1) for c in long.calls)], tokens=tokens)
    found = analyze.LabelMass(["X", "X", "Y", "Y"], "X")(both)
    assert found.loc[0].iloc[-1] == pytest.approx(1.0)  # all four tokens are of the first two words


def test_padding_is_no_repeated_segment() -> None:
    tokens = [["a", "b", "a", "b", *["[PAD]"] * 6], ["c", "d", "c", "d", "c", "d", "c", "d", "e", "f"]]
    real = torch.tensor([[1] * 4 + [0] * 6, [1] * 10])
    mask = torch.ones(10, 10, dtype=torch.bool).tril() & real.bool()[:, None, None]
    trace = given(mask / mask.sum(-1, keepdim=True), mask=mask, tokens=tokens)
    found = analyze.RepeatedSegment("duplicate_token")(trace, by="example")
    # The second copy is at 2 and 3: 1/3 and 1/4 to each key; and at 2 to 7.
    expected = [(1 / 3 + 1 / 4) / 2, sum(1 / n for n in range(3, 9)) / 6]
    assert found["repeated_segment(score='duplicate_token')"].tolist() == pytest.approx(expected)


def test_without_tokens_a_period_begins_with_what_is_no_padding() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    mask = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None]
    trace = given(mask / mask.sum(-1, keepdim=True).clamp_min(1), mask=mask)
    found = analyze.RepeatedSegment("previous_token", period=2)(trace).iloc[0, -1]
    assert found == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_the_level_of_another_kind_of_attention_is_not_taken() -> None:
    """A cross-attention has none for what needs positions; a self-attention with the same mask has."""
    full = torch.ones(5, 5, dtype=torch.bool)
    cross = given(torch.full((1, 1, 5, 5), 0.2), mask=full, kind="cross")
    own = given(torch.full((1, 1, 5, 5), 0.2), mask=full)
    chance = Chance([analyze.PreviousToken()])
    assert chance.of(analyze.View(cross[0], cross)) == {}
    assert chance.of(analyze.View(own[0], own)) == {"previous_token": pytest.approx(0.16)}


def test_statistics_of_a_static_cache_do_not_tell_where_their_queries_are() -> None:
    model = tiny_models.llama()
    with hookattn.tracing(model, capture=analyze.capture("positional", "previous_token")) as trace:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False,
                       cache_implementation="static")  # fmt: skip
    with pytest.raises(MeasureError, match="'mask' in capture="):
        analyze.Positional()(trace)
    assert analyze.PreviousToken()(trace)["previous_token"].notna().all()
