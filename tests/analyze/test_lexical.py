"""Lexical patterns: which tokens are related, and the mean over these against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hookattn import analyze
from hookattn.analyze import Acronyms, Brackets, ListItems, PairMass, Punctuation, SameWord, Separators
from hookattn.errors import MeasureError
from tests.analyze import explicit
from tests.analyze.build import CASES, case, given, uniform


def related(of: PairMass, text: str) -> list[tuple[str, str]]:
    """The related tokens of a text, whose tokens are parted by spaces and "¶" is a line break."""
    tokens = tuple("\n" if t == "¶" else t for t in text.split())
    pairs = of.related(tokens)
    assert pairs.dtype == torch.int64 and len(pairs) == 2
    assert len(set(map(tuple, pairs.T.tolist()))) == pairs.shape[1], "a pair is there twice"
    return sorted((tokens[i], tokens[j]) for i, j in pairs.T.tolist())


def both(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return sorted([*pairs, *((b, a) for a, b in pairs)])


def test_same_word() -> None:
    assert related(SameWord(), "The cat , the cap ,") == both(("The", "the"))
    assert related(SameWord(), "[CLS] play ##ing or Play ##ing [SEP]") == both(
        ("play", "Play"), ("play", "##ing"), ("##ing", "Play"), ("##ing", "##ing")
    )
    assert related(SameWord(), "a ##b a") == []
    assert related(SameWord(), "Ġthe Ġcat s Ġcats Ġthe") == both(("Ġthe", "Ġthe"), ("Ġcat", "Ġcats"), ("s", "Ġcats"))


def test_brackets() -> None:
    assert related(Brackets(direction="closing"), "( a [ b ] c )") == [
        (")", "("), ("]", "[")
    ]  # fmt: skip
    assert related(Brackets(direction="opening"), "( a )") == [("(", ")")]
    assert related(Brackets(), "f ( x ] )") == both(("(", ")"))
    assert related(Brackets(), ") a (") == []
    assert related(Brackets(), "Ġ(( x )) ;") == both(("Ġ((", "))"))
    assert related(Brackets(direction="closing"), "( [ a )") == [(")", "(")]
    assert related(Brackets(), "ĠâĢ ľ a ĠâĢ Ŀ Ġb") == both(("ĠâĢ", "ĠâĢ"))  # “a ” with three bytes in two pieces each
    assert related(Brackets(), "[CLS] ( [SEP] )") == both(("(", ")"))


def test_acronyms() -> None:
    assert related(Acronyms(), "International Business Machines ( IBM )") == sorted(
        ("IBM", x) for x in ("International", "Business", "Machines")
    )
    assert related(Acronyms(), "the Department of Defense , DoD") == sorted(
        ("DoD", x) for x in ("Department", "of", "Defense")
    )
    assert related(Acronyms(), "the USA , the United States of America") == sorted(
        ("USA", x) for x in ("United", "States", "America")
    )
    assert related(Acronyms(), "BO is the Bank of Oman") == [("BO", "Bank"), ("BO", "Oman")]
    assert related(Acronyms(), "U . S . is the United States") == sorted(
        (a, b) for a in ("U", ".", "S", ".") for b in ("United", "States")
    )
    assert related(Acronyms(), "IBM and Intel Build Cars") == []
    assert related(Acronyms(), "I am here") == []
    assert related(Acronyms(), "ĠNational ĠA ero n autics ĠBoard ĠN AB") == sorted(
        (a, b) for a in ("ĠN", "AB") for b in ("ĠNational", "ĠA", "ero", "n", "autics", "ĠBoard")
    )


def items(*lists: list[str]) -> list[tuple[str, str]]:
    found = [(a, b) for own in lists for i, x in enumerate(own) for j, y in enumerate(own) if i != j
             for a in x.split() for b in y.split()]  # fmt: skip
    return sorted(found)


def test_list_items() -> None:
    assert related(ListItems(), "I like apples , pears and plums .") == items(["apples", "pears", "plums"])
    assert related(ListItems(), "buy red apples , ripe pears , and blue plums today") == items(
        ["red apples", "ripe pears", "blue plums"]
    )
    assert related(ListItems(), "one , two") == []
    assert related(ListItems(longest=1), "a , b c , d") == []
    assert related(ListItems(), "a ; b ; c . d , e , f") == items(["a", "b", "c"], ["d", "e", "f"])
    assert related(ListItems(), "to do : ¶ - milk ¶ - brown bread ¶ done") == items(["milk", "brown bread"])
    assert related(ListItems(), "1 . milk ¶ 2 . bread ¶ 3 ) eggs") == items(["milk", "bread", "eggs"])
    assert related(ListItems(), "- milk ¶ then") == []
    with pytest.raises(MeasureError, match="int from 1"):
        ListItems(longest=0)


TEXT = "the ( cat , dog and cow ) and the DCC [SEP]".split()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("of", [SameWord(), Brackets(), ListItems(), Acronyms()])
def test_means_of_every_kind(kind: str, of: PairMass) -> None:
    options = CASES[kind]
    s = max(12, options.get("s", 0))
    tokens = [(TEXT * 3)[:s], (TEXT * 3)[5 : 5 + s]][: options.get("b", 2)]
    tokens += [tokens[0]] * (options.get("b", 2) - len(tokens))
    size = {"t": s - 8, "s": s} if "s" in options else {"t": 1, "s": s} if options.get("t") == 1 else {"t": s}
    made = case(**{**options, **size, "pad": options.get("pad") and (0, 2)}, tokens=tokens)
    seen = [[t if made.real[b, i] else "[PAD]" for i, t in enumerate(row)] for b, row in enumerate(tokens)]
    pairs = [{(i, j) for i, j in of.related(tuple(row)).T.tolist()} for row in seen]
    own, _ = explicit.values(made, 0, lambda b, i, j: (i, j) in pairs[b])
    if bool(own.isnan().all()):
        assert of(made.trace)[of.key].isna().all()
    else:
        explicit.holds(of, made, lambda b, i, j: (i, j) in pairs[b])


def test_a_pair_that_no_head_may_attend_to_does_not_count() -> None:
    trace = given(uniform(3), tokens=[["(", "a", ")"]])
    assert Brackets()(trace)["brackets"].item() == pytest.approx(1 / 3)
    assert math.isnan(Brackets(direction="opening")(trace)["brackets(direction='opening')"].item())


def test_ids_are_no_text() -> None:
    with pytest.raises(MeasureError, match="tokens as text"):
        SameWord([1, 2, 3])(given(uniform(3)))
    with pytest.raises(MeasureError, match="expected one of closing"):
        Brackets(direction="left")


# ------------------------------------------------------------------------------------------------ separators

SEPARATED = "[CLS] a , b [SEP] c [SEP] d .".split()


@pytest.mark.parametrize("kind", ["causal", "both ways", "padded right", "padded left", "sinks", "some heads"])
@pytest.mark.parametrize(
    ("of", "chosen"),
    [
        (Separators(), {"[SEP]"}),
        (Separators(("c",)), {"c"}),
        (Separators(punctuation=True), {"[SEP]", ",", "."}),
        (Punctuation(), {",", "."}),
    ],
)
def test_separators(kind: str, of: Any, chosen: set[str]) -> None:
    tokens = [SEPARATED, SEPARATED[::-1]]
    made = case(**CASES[kind], tokens=tokens)
    some = [any(t in chosen and made.real[b, j] for j, t in enumerate(row)) for b, row in enumerate(tokens)]
    explicit.holds(of, made, lambda b, i, j: tokens[b][j] in chosen, lambda b, i, n: some[b])


def test_separators_of_the_common_tokenizers() -> None:
    w = uniform(4)
    for token in ("</s>", "<|endoftext|>", "<|im_end|>", "<eos>"):
        assert Separators()(given(w, tokens=[[token, "a", "b", "c"]]))["separators"].item() == pytest.approx(
            (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
        )
    assert Separators()(given(w, tokens=[list("abcd")]))["separators"].isna().all()
    missing = analyze.measure(given(w), ["separators", "punctuation"], missing=True)
    assert missing[["separators", "punctuation"]].isna().to_numpy().all()
    with pytest.raises(MeasureError, match="needs tokens"):
        Separators()(given(w))
