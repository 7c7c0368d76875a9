"""Labels of tokens, and the colours: as a person reads them, whatever the tokenizer wrote."""

from __future__ import annotations

import itertools
import unicodedata

import pytest

pytest.importorskip("numpy")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hookattn.render.palette import FAINT, HEADS, INK, MASKED, PAPER, head_style
from hookattn.tokens.display import shortened, shown, visible

CASES = {
    "byte-level": (["Hello", "Ġworld", "ly", ",", "Ġcaf", "Ã©", "Ċ", "Ġ("], "Hello world …ly , caf …é ↵ ␣("),
    "a character in two tokens": (["ä½", "ł", "å¥½"], "你 1/2¦你 2/2¦好"),
    "sentencepiece": (["▁The", "▁cat", "s", "▁"], "The cat …s ␣"),
    "sentencepiece bytes": (["▁x", "<0xE2>", "<0x82>", "<0xAC>"], "x¦€ 1/3¦€ 2/3¦€ 3/3"),
    "a byte alone": (["<0xE2>", "▁a"], "<E2> a"),
    "wordpiece": (["[CLS]", "un", "##afford", "##able", ".", "[SEP]"], "[CLS] un …afford …able . [SEP]"),
    "ends of words": (["<|startoftext|>", "a</w>", "pho", "to</w>", ".</w>"], "<|startoftext|> a pho …to ."),
    "decoded": (["Hello", " world", " ", "  x"], "Hello world ␣ ␣␣x"),
    "characters": (list("ab c"), "a b ␣ c"),
    "Chinese has no spaces": (["▁x", "你", "好"], "x 你 好"),
    "accents that are themselves": (["naïve", "café", "é"], "naïve café é"),
    "a heading is no word piece": (["##", "ĠTitle"], "## Title"),
    "a special token ends a word": (["<s>", "▁a", "<eos>", "b"], "<s> a <eos> b"),
    "Hebrew": (["▁שלום", "ים"], "שלום …ים"),
    "added tokens among bytes": (["Ġif", "Ġx", ":", "Ċ", "   ", "y"], "if¦x¦:¦↵¦␣␣␣¦y"),
    "bytes that are no text": (["The", "Ġcat", "ü", "Ġ", "ğ", "ĕ"], "The¦cat¦<FC>¦␣¦␟¦␕"),
    "an accent beside sentencepiece": (["caf", "é", "▁x"], "caf …é x"),
    "a Maltese word": (["Ġurnata", "ħobż"], "Ġurnata ħobż"),
    "mojibake is what was meant": (["Ġna", "Ã¯", "ve"], "na …ï …ve"),
}


@pytest.mark.parametrize("name", CASES)
def test_labels(name: str) -> None:
    tokens, expected = CASES[name]
    assert shown(tokens) == (expected.split("¦") if "¦" in expected else expected.split(" "))


def test_what_has_no_shape_has_a_stand_in() -> None:
    labels = shown(["a\u202eb", "\x00", "\t", "", "\u0301a", "\u200b", "\u00a0", "\ud800", "\r\n", "[\n]"])
    assert labels == ["aU+202Eb", "␀", "⇥", "∅", "◌\u0301a", "U+200B", "␣", "U+D800", "␍↵", "[↵]"]


def test_markup_stays_text() -> None:
    hostile = ["</script><img onerror=alert(1)>", "$x^2$", "&amp;", "<b>"]
    assert shown(hostile) == hostile


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), max_size=8))
def test_no_label_breaks_out(tokens: list[str]) -> None:
    """One label a token, none empty, nothing that ends a line, or turns or hides the text around it."""
    labels = shown(tokens)
    assert len(labels) == len(tokens) and all(labels)
    for c in "".join(labels):
        assert unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"), hex(ord(c))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z", "M")), min_size=1, max_size=12), st.data())
def test_bytes_come_back(text: str, data: st.DataObject) -> None:
    """The peer's own byte alphabet, cut anywhere: every character is shown, in each token that has a part of it."""
    tokenizers = pytest.importorskip("tokenizers")
    written = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = "Ġ" + written.pre_tokenize_str(text)[0][0]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=4)))
    tokens = [whole[a:b] for a, b in itertools.pairwise([0, *cuts, len(whole)])]
    if any(t[0] in "<[" and t[-1] in ">]" for t in tokens):
        return  # might be a special token
    labels = shown(tokens)
    assert set(text) - {" "} <= set("".join(labels))
    if not cuts:
        assert labels == [text if text[0].isalnum() else "␣" + text]


@pytest.mark.parametrize(("label", "length", "expected"), [
    ("short", 5, "short"), ("longer", 5, "long…"), ("a\u0301b\u0301cd", 4, "a\u0301…"), ("xy", 2, "xy"),
])  # fmt: skip
def test_shortened(label: str, length: int, expected: str) -> None:
    assert shortened(label, length) == expected


def test_visible_spaces_at_the_ends() -> None:
    assert visible(" New York ") == "␣New York␣" and visible("   ") == "␣␣␣"


# ----------------------------------------------------------------------------------------------------- colours

# Machado, Oliveira and Fernandes (2009), severity 1.0: linear RGB -> linear RGB.
DICHROMATS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    x = XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    low, high = sorted(float((XYZ @ linear(c))[1]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", DICHROMATS)
def test_heads_are_told_apart(vision: str) -> None:
    seen = [lab(np.array(DICHROMATS[vision]) @ linear(c)) for c in HEADS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_contrast() -> None:
    assert min(contrast(c, PAPER) for c in HEADS) >= 3
    assert min(contrast(INK, PAPER), contrast(FAINT, PAPER), contrast(FAINT, MASKED)) >= 4.5


def test_more_heads_than_colours() -> None:
    assert len({head_style(n) for n in range(32)}) == 32 and head_style(32) == head_style(0)
