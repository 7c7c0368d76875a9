"""Words of pieces, against real tokenizers; their weights, against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import analyze
from hookattn.analyze import pool_words
from hookattn.errors import MeasureError
from hookattn.tokens.words import given_words, is_punctuation, split_words
from tests.analyze.build import CASES, case, given, uniform
from tests.analyze.test_repeats import Causal

TEXTS = [
    "The quick brown foxes jumped over the lazy dogs, again and again.",
    "Unbelievable! Naïve cafés serve crème brûlée (for 12 euros); “quoted” text — and more…",
    "International Business Machines (IBM) is [not] a café.\n\nNew lines: too.",
]


def trained(kind: str) -> Any:
    """A small tokenizer of a real library, so small that most words have several pieces."""
    tokenizers = pytest.importorskip("tokenizers")
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=["[UNK]"], show_progress=False)
    elif kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    elif kind == "suffix":
        made = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        made.pre_tokenizer = pre.BertPreTokenizer()
        trainer = trainers.BpeTrainer(vocab_size=110, end_of_word_suffix="</w>", show_progress=False)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre.Sequence([pre.Metaspace(), pre.Punctuation()])
        trainer = trainers.UnigramTrainer(vocab_size=90, show_progress=False)
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "suffix", "metaspace"])
def test_words_are_those_of_the_tokenizer(kind: str, text: str) -> None:
    if kind == "metaspace":
        text = text.replace("\n\n", " ")
    made = trained(kind).encode(text)
    words = split_words(tuple(made.tokens))
    assert len(made.tokens) > len(words.texts), "no word has several pieces: nothing is tested"
    if kind == "metaspace":
        assert "".join(words.texts) == text.replace(" ", "")
        assert [w for w in words.texts if w] == _bert(text)
        return
    runs = [0]
    for a, b in zip(made.word_ids, made.word_ids[1:], strict=False):
        runs.append(runs[-1] + (a != b))
    if kind == "bytes":  # which has several marks in one piece, and line breaks
        found = [list(w) if is_punctuation(w) else [w] for w in words.texts if w.strip()]
        assert [x for own in found for x in own] == _bert(text)
        return
    assert list(words.of) == runs
    assert list(words.texts) == _bert(text)


def _bert(text: str) -> list[str]:
    """Words and single punctuation marks."""
    made: list[str] = []
    join = False
    for c in text:
        if c.isspace():
            join = False
        elif c.isalnum():
            made[-1:] = [made[-1] + c] if join else [*made[-1:], c]
            join = True
        else:
            made.append(c)
            join = False
    return made


def test_special_tokens_and_bytes() -> None:
    words = split_words(("<s>", "▁ca", "ts", "<0xE2>", "<0x82>", "<0xAC>", "</s>", "▁the", "<|im_end|>"))
    assert words.texts == ("<s>", "cats", "€", "</s>", "the", "<|im_end|>")
    assert words.special == (True, False, False, True, False, True)
    assert words.of == (0, 1, 1, 2, 2, 2, 3, 4, 5)
    assert split_words(("▁日", "本", "人")).texts == ("日", "本", "人")
    assert split_words((" a", "b", " c")).texts == ("ab", "c")
    assert split_words(("a", "b", "c")).texts == ("a", "b", "c")
    assert split_words(()).texts == ()


def test_given_ids() -> None:
    words = given_words(["[CLS]", "play", "##ing", "x", "[SEP]", "x"], [None, 0, 0, 1, None, 0])
    assert words.texts == ("[CLS]", "playing", "x", "[SEP]", "x")
    assert words.special == (True, False, False, True, False)
    assert given_words(None, [7, 7, None, 9]).texts == ("7", "", "9")
    with pytest.raises(MeasureError, match="an id for each of the 2 tokens, got 1"):
        given_words(["a", "b"], [1])


@pytest.mark.parametrize("text", [".", "...", "$", "—", "”", " ,"])
def test_punctuation(text: str) -> None:
    assert is_punctuation(text)


@pytest.mark.parametrize("text", ["", " ", "a", "1", "a.", "\n"])
def test_no_punctuation(text: str) -> None:
    assert not is_punctuation(text)


# ------------------------------------------------------------------------------------------------ pooling


def explicit(weights: Tensor, mask: Tensor, of: list[int]) -> tuple[Tensor, Tensor]:
    """H W W and W W of one batch entry, in loops."""
    h, n = len(weights), max(of) + 1
    made, seen = torch.zeros(h, n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.bool)
    for a in range(n):
        rows = [i for i, word in enumerate(of) if word == a]
        for c in range(n):
            keys = [j for j, word in enumerate(of) if word == c]
            for head in range(h):
                made[head, a, c] = sum(float(weights[head, i, j]) for i in rows for j in keys) / len(rows)
            seen[a, c] = any(bool(mask[i, j]) for i in rows for j in keys)
    return made, seen


@pytest.mark.parametrize("kind", ["causal", "both ways", "padded right", "encoder, padded", "sinks", "some heads"])
def test_pooled_weights(kind: str) -> None:
    tokens = ["[CLS] un ##do ##ing it is so it ##s".split(), "[CLS] a b c ##d e f g h".split()]
    of = [[0, 1, 1, 1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 3, 4, 5, 6, 7]]
    made = case(**CASES[kind], tokens=tokens)
    ids = [[None if w == 0 else w for w in row] for row in of]
    for pooled in (pool_words(made.trace), pool_words(made.trace, ids)):
        assert pooled.tokens == [["[CLS]", "undoing", "it", "is", "so", "its", "[PAD]", "[PAD]"],
                                 ["[CLS]", "a", "b", "cd", "e", "f", "g", "h"]]  # fmt: skip
        for layer, call in enumerate(pooled):
            assert call.heads == made.trace[layer].heads and call.site == made.trace[layer].site
            for b, row in enumerate(of):
                weights, mask = explicit(made.weights[layer][b], made.mask[b, 0], row)
                n = len(mask)
                torch.testing.assert_close(call.weights[b, :, :n, :n].double(), weights, atol=1e-6, rtol=0)
                assert torch.equal(call.mask[b, 0, :n, :n], mask)
                assert not call.mask[b, :, n:].any() and not call.mask[b, :, :, n:].any()
                assert not call.weights[b, :, n:].any()


def test_a_trace_of_words_is_a_trace(tmp_path: Any) -> None:
    trace = hookattn.trace(Causal(), torch.randn(1, 6, 8), tokens=[["The", "Ġcat", "s", "Ġsat", ",", "Ġcats"]])
    words = pool_words(trace)
    assert words.tokens == [["The", "cats", "sat", ",", "cats"]]
    words.save(f"{tmp_path}/words.safetensors")
    table = analyze.measure(hookattn.load(f"{tmp_path}/words.safetensors"), ["entropy", "duplicate_token"])
    w = words[0].weights[0].double()
    assert table["duplicate_token"].to_numpy() == pytest.approx(w[:, 4, 1].numpy(), abs=1e-6)
    assert table["entropy"].to_numpy() == pytest.approx(
        -(w * w.clamp_min(1e-30).log()).sum(-1).mean(-1).numpy(), abs=1e-5
    )
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_one_piece_a_word_changes_nothing() -> None:
    trace = given(uniform(4, 2), tokens=[list("abcd")])
    assert torch.equal(pool_words(trace)[0].weights, trace[0].weights)


def test_words_of_rows_that_were_selected_and_are_all(tmp_path: Any) -> None:
    words = pool_words(case(t=9, queries=tuple(range(9))).trace, [0, 0, 1, 2, 2, 2, 3, 4, 4])
    found = hookattn.load(words.save(tmp_path / "f"))[0]
    assert found.weights.shape[2:] == (5, 5) and found.queries is found.of_queries is None


def test_calls_that_have_no_words() -> None:
    with pytest.raises(MeasureError, match="needs tokens"):
        pool_words(given(uniform(4)))
    with pytest.raises(MeasureError, match="lists of 3 for 4 keys"):
        pool_words(given(uniform(4)), [1, 2, 3])
    with pytest.raises(MeasureError, match="stitch"):
        pool_words(case(t=3, s=9).trace, [1] * 9)
    with pytest.raises(MeasureError, match="all queries"):
        pool_words(case(queries=(1, 2)).trace, [1] * 9)
    with pytest.raises(MeasureError, match="self-attention"):
        pool_words(case(cross=True).trace, [1] * 9)


def test_bytes_are_told_without_any_space() -> None:
    """A single word, or a script that has none; Latin-1 that is no UTF-8 stays as it is."""
    assert split_words(("M", "Ã¼", "ller")).texts == ("Müller",)
    assert split_words(("ä½ł", "å¥½")).texts == ("你", "好")
    assert split_words(("M", "ü", "ller")).texts == ("M", "ü", "ller")


def test_what_was_added_to_a_vocabulary_of_bytes_is_as_it_is() -> None:
    assert split_words(("Ġthe", "Ġcat", "日本", "Ġsat", "Ġon")).texts == ("the", "cat", "日本", "sat", "on")
