"""What is a special token and what a mark of word pieces means: one table, for Python and for the viewer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookattn.analyze.measures.segments import segment_of
from hookattn.tokens.display import shown
from hookattn.tokens.pieces import SEPARATORS, is_special, marks_of, read_pieces
from hookattn.tokens.words import split_words

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "cases.json").read_text("utf-8"))
ROWS = pytest.mark.parametrize("row", CASES["rows"], ids=lambda row: row["name"])


def data(text: Any) -> bytes:
    """The bytes of a text of the table, or of a part of a character."""
    return bytes.fromhex(text["bytes"]) if isinstance(text, dict) else str(text).encode()


@pytest.mark.parametrize("token", CASES["special"])
def test_special_tokens(token: str) -> None:
    """Of themselves, and in what is said of a text: no letter of one is drawn as the text of a word."""
    assert is_special(token)
    assert split_words(("a", token, "b")).special == (False, True, False)
    assert shown([" a", token, "b"]) == ["a", token.removeprefix("▁"), "b"]


@pytest.mark.parametrize("token", [*CASES["ordinary"], *CASES["bytes"]])
def test_what_is_text(token: str) -> None:
    assert not is_special(token)
    assert not any(split_words(("a", token, "b")).special)


def test_a_separator_is_special() -> None:
    assert all(map(is_special, SEPARATORS))


@ROWS
def test_pieces(row: dict[str, Any]) -> None:
    found = read_pieces(row["tokens"])
    assert marks_of(row["tokens"]).value == row["marks"]
    assert [x.data for x in found] == [data(text) for text in row["texts"]]
    assert [x.joins for x in found] == row["joins"]
    assert [x.special for x in found] == [token in CASES["special"] for token in row["tokens"]]


@ROWS
def test_words_are_put_together_as_the_marks_say(row: dict[str, Any]) -> None:
    """Where two letters meet, a token is of the word before it where the marks say so, and else not."""
    words = split_words(tuple(row["tokens"]))
    texts = [data(text).decode(errors="ignore") for text in row["texts"]]
    for i in range(1, len(texts)):
        if texts[i - 1][-1:].isalnum() and texts[i][:1].isalnum() and texts[i].isascii():
            assert (words.of[i] == words.of[i - 1]) == row["joins"][i], row["tokens"][i]
    assert [words.special[n] for n in words.of] == [token in CASES["special"] for token in row["tokens"]]


@ROWS
def test_labels_go_on_as_the_marks_say(row: dict[str, Any]) -> None:
    labels = shown(row["tokens"])
    texts = [data(text).decode(errors="ignore") for text in row["texts"]]
    for i in range(1, len(texts)):
        if texts[i - 1][-1:].isalnum() and texts[i][:1].isalnum() and texts[i].isascii():
            assert labels[i].startswith("…") == row["joins"][i], labels


def test_words_of_joined_pieces() -> None:
    assert split_words(("he@@", "ll@@", "o", "world")).texts == ("hello", "world")
    assert shown(["he@@", "ll@@", "o", "world"]) == ["he", "…ll", "…o", "world"]


def test_bytes_without_any_word_beside_them() -> None:
    assert split_words(("<0xE2>", "<0x82>", "<0xAC>")).texts == ("€",)


@pytest.mark.parametrize("case", CASES["segments"], ids=lambda case: " ".join(case["tokens"]))
def test_segments(case: dict[str, Any]) -> None:
    assert segment_of(tuple(case["tokens"])) == tuple(case["segments"])


LOWER = st.text(st.characters(categories=["Ll", "Lo"]), min_size=1, max_size=12).filter(lambda t: t == t.lower())


@given(LOWER, st.sampled_from(["[]", "()", "{}", "«»", "【】", "“”"]))
def test_a_word_in_brackets_is_no_special_token(word: str, brackets: str) -> None:
    assert not is_special(brackets[0] + word + brackets[1])
    assert not is_special(brackets[0] + word.capitalize() + " " + word + brackets[1])


@given(st.text(st.characters(categories=["N", "P", "S", "Z", "M", "C"], exclude_characters="|｜"), max_size=8))
def test_nothing_without_a_letter_is_a_name(text: str) -> None:
    assert not any(is_special(form.format(text)) for form in ("<{}>", "[{}]", "</{}>", ">>{}<<"))


NAMES = st.from_regex(r"[A-Z][A-Z0-9]{1,6}(_[A-Z0-9]{1,5}){0,2}", fullmatch=True)


@given(NAMES)
def test_a_name_of_capitals_is_special_in_every_form(name: str) -> None:
    forms = ("[{}]", "[/{}]", "<{}>", "</{}>", "<|{}|>", "<｜{}｜>", "<|{}>", "<{}|>", ">>{}<<", "▁<{}>")
    assert all(is_special(form.format(name)) for form in forms)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*CASES["special"], *CASES["ordinary"], *"ab "]) | st.text(max_size=4), max_size=8))
def test_the_three_answers_are_one(tokens: list[str]) -> None:
    """Pieces, words and labels: one for each token, and the same ones are special."""
    pieces = read_pieces(tokens)
    words = split_words(tuple(tokens))
    assert [x.special for x in pieces] == [words.special[n] for n in words.of] == [is_special(t) for t in tokens]
    assert len(shown(tokens)) == len(tokens)
    assert not any(b.joins for a, b in itertools.pairwise(pieces) if a.special or b.special)
