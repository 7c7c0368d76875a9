"""Labels that a caller passes: parts of speech, segments, syntax and coreference, against loops."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from hookattn import analyze
from hookattn.analyze import BetweenSegments, Coreference, Dependency, LabelMass
from hookattn.analyze.measures.segments import segment_of
from hookattn.errors import MeasureError
from tests.analyze import explicit
from tests.analyze.build import CASES, Case, case, given, uniform

TAGS = ("N", "V", "D", None)


def tagged(b: int, s: int) -> list[list[Any]]:
    drawn = random.Random(b * s)
    return [[drawn.choice(TAGS) for _ in range(s)] for _ in range(b)]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("source", [None, "V"])
def test_label_mass_of_every_kind(kind: str, source: str | None) -> None:
    options = CASES[kind]
    b, s = options.get("b", 2), options.get("s", options.get("t", 9))
    labels = tagged(b, s)
    labels[0][-1] = source or "N"
    labels[0][0] = "N"
    made = case(**options)
    some = [any(x == "N" and made.real[i, j] for j, x in enumerate(row)) for i, row in enumerate(labels)]
    explicit.holds(
        LabelMass(labels, "N", source),
        made,
        lambda i, _, j: labels[i][j] == "N",
        lambda i, place, n: some[i] and (source is None or labels[i][place] == source),
    )


@pytest.mark.parametrize(
    "kind", ["causal", "both ways", "padded right", "padded left", "cache", "sinks", "some queries"]
)
def test_between_labels(kind: str) -> None:
    made = case(**CASES[kind])
    b, _, t, s = made.weights[0].shape
    labels = tagged(b, s)
    table = analyze.between_labels(made.trace, labels)
    for row in table.to_dict("records"):
        w, total, queries = made.weights[row["call"]], 0.0, 0
        for i in range(b):
            for q in range(t):
                place = int(made.positions[q])  # type: ignore[index]
                if not made.rows[i, q] or (isinstance(row["from"], str) and labels[i][place] != row["from"]):
                    continue
                queries += 1
                total += sum(float(w[i, row["head"], q, j]) for j in range(s) if labels[i][j] == row["to"])
        assert row["queries"] == queries
        assert math.isnan(row["value"]) if not queries else row["value"] == pytest.approx(total / queries, abs=1e-6)
    assert len(table) == 2 * 4 * 4 * 3
    assert set(table["to"]) == {"N", "V", "D"}


def test_labels_of_words() -> None:
    tokens = [["[CLS]", "the", "cat", "##s", "ran", "[SEP]"]]
    trace = given(torch.rand(1, 2, 6, 6).softmax(-1), tokens=tokens)
    of_words, of_tokens = LabelMass(["D", "N", "V"], "N"), LabelMass([None, "D", "N", "N", "V", None], "N")
    assert of_words(trace)[of_words.key].tolist() == of_tokens(trace)[of_tokens.key].tolist()
    assert of_words.key == "label_mass(target='N')"
    wanted = trace[0].weights[0, :, :, 2:4].double().sum(-1).mean(-1)
    assert of_words(trace)[of_words.key].to_numpy() == pytest.approx(wanted.numpy(), abs=1e-6)
    with pytest.raises(MeasureError, match="lists of 2 for 6 keys and 3 words"):
        LabelMass(["D", "N"], "N")(trace)
    with pytest.raises(MeasureError, match="no token has the label X"):
        LabelMass(["D", "N", "V"], "X")(trace)
    with pytest.raises(MeasureError, match="expected one label"):
        LabelMass("DNV", "N")
    with pytest.raises(MeasureError, match="places in one sequence"):
        analyze.between_labels(case(cross=True).trace, ["N"] * 9)


# ------------------------------------------------------------------------------------------------ segments


def test_segments_of_the_common_tokenizers() -> None:
    assert segment_of(("[CLS]", "a", "[SEP]", "b", "b", "[SEP]", "[PAD]")) == (0, 0, 0, 1, 1, 1, -1)
    assert segment_of(("<s>", "a", "</s>", "</s>", "b", "</s>")) == (0, 0, 0, 0, 1, 1)
    assert segment_of(("<|endoftext|>", "a", "<|endoftext|>", "b")) == (0, 0, 0, 1)
    assert segment_of(("a", "b")) == (0, 0)


@pytest.mark.parametrize("pad", [None, (0, 2)])
def test_between_segments(pad: Any) -> None:
    tokens = [["[CLS]", "a", "b", "[SEP]", "c", "d", "e", "[SEP]", "x"],
              ["[CLS]", "a", "[SEP]", "b", "c", "d", "[SEP]", "[PAD]", "[PAD]"]]  # fmt: skip
    tokens[0][-1] = "[SEP]"
    types = [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0, 0]]
    made = case(causal=False, pad=pad or (0, 2), tokens=tokens)
    found, wanted = analyze.between_segments(made.trace), analyze.between_labels(
        made.trace, [["AB"[x] for x in row] for row in types]
    )  # fmt: skip
    assert found["value"].to_numpy() == pytest.approx(wanted["value"].to_numpy())
    assert analyze.between_segments(made.trace, types)["value"].to_numpy() == pytest.approx(wanted["value"].to_numpy())
    shares = found.groupby(["call", "head", "from"], dropna=False)["value"].sum()
    assert shares.to_numpy() == pytest.approx(1, abs=1e-6)
    for source, target in ("AA", "AB", "BA", "BB"):
        number = {"A": 0, "B": 1}
        counts = lambda i, place, n, s=source: types[i][place] == number[s]  # noqa: E731
        related = lambda i, _, j, t=target: types[i][j] == number[t]  # noqa: E731
        explicit.holds(BetweenSegments(source=source, target=target), made, related, counts)
        explicit.holds(BetweenSegments(source=source, target=target, labels=types), made, related, counts)


def test_segments_that_are_none() -> None:
    trace = given(uniform(3), tokens=[list("abc")])
    with pytest.raises(MeasureError, match="no token has the label B"):
        BetweenSegments()(trace)
    with pytest.raises(MeasureError, match="needs tokens"):
        analyze.between_segments(given(uniform(3)))
    with pytest.raises(MeasureError, match="segments don't fit: lists of 2 for 3 keys"):
        analyze.between_segments(trace, [0, 1])


# ------------------------------------------------------------------------------------------------ syntax, coreference

TOKENS = [["[CLS]", "the", "cat", "##s", "saw", "it", "##self", "[SEP]", "[PAD]"],
          ["[CLS]", "a", "dog", "ran", "to", "my", "old", "hou", "##se"]]  # fmt: skip
OF = [[0, 1, 2, 2, 3, 4, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 7]]
ORDINARY = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]
HEADS = [[1, 2, 2, 2], [1, 2, -1, 2, 6, 6, 3]]
NAMES = [["det", "nsubj", "root", "obj"], ["det", "nsubj", "root", "prep", "poss", "amod", "pobj"]]


def share(made: Case, layer: int, head: int, pairs: list[list[tuple[int, int]]], how: str) -> tuple[float, list[int]]:
    """The mean over the words with an open related word, and how many there are in each batch entry."""
    found, counts = [], []
    for b, (of, ordinary) in enumerate(zip(OF, ORDINARY, strict=True)):
        w = made.weights[layer][b, head]

        def weight(a: int, c: int, w: Any = w, of: list[int] = of) -> float:
            rows, keys = ([i for i, x in enumerate(of) if x == y] for y in (a, c))
            return sum(float(w[i, j]) for i in rows for j in keys) / len(rows)

        def is_open(a: int, c: int, b: int = b, of: list[int] = of) -> bool:
            return any(made.mask[b, 0, i, j] for i, x in enumerate(of) for j, y in enumerate(of) if x == a and y == c)

        before = len(found)
        for n, word in enumerate(ordinary):
            related = {ordinary[c] for a, c in pairs[b] if a == n and is_open(word, ordinary[c])}
            if not related:
                continue
            others = [c for c in ordinary if c != word and is_open(word, c)]
            top = max(others, key=lambda c, word=word, weight=weight: weight(word, c))
            found.append(float(top in related) if how == "argmax" else sum(weight(word, c) for c in related))
        counts.append(len(found) - before)
    return sum(found) / len(found), counts


@pytest.mark.parametrize("how", ["argmax", "mass"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("direction", "relation"), [("head", None), ("dependent", None), ("head", "nsubj")])
def test_dependency(how: str, causal: bool, direction: str, relation: str | None) -> None:
    made = case(causal=causal, pad=(1, 0), tokens=TOKENS, h=6, g=6, seed=5)
    of = Dependency(heads=HEADS, relations=NAMES if relation else None, relation=relation, direction=direction, how=how)
    pairs = [
        [(w, h) for w, h in enumerate(heads) if h not in (-1, w) and relation in (None, names[w])]
        for heads, names in zip(HEADS, NAMES, strict=True)
    ]
    if direction == "dependent":
        pairs = [[(h, w) for w, h in row] for row in pairs]
    if causal and relation == "nsubj":
        assert of(made.trace)[of.key].isna().all(), "the verb comes after its subject"
        return
    table = of(made.trace)
    for layer in range(2):
        for head in range(6):
            wanted, _ = share(made, layer, head, pairs, how)
            assert table[table.call == layer][of.key].to_numpy()[head] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("how", ["argmax", "mass"])
def test_coreference(how: str) -> None:
    made = case(tokens=TOKENS, pad=(1, 0), h=6, g=6, seed=2)
    clusters = [[[(0, 2), 3]], [[1, 6, (4, 6)], [2]]]
    pairs = [[(3, 0), (3, 1)], [(4, 1), (5, 1), (6, 1), (6, 4), (6, 5)]]
    of = Coreference(clusters=clusters, how=how)  # type: ignore[arg-type]
    table = of(made.trace)
    for layer in range(2):
        for head in range(6):
            wanted, counts = share(made, layer, head, pairs, how)
            assert counts == [1, 3]
            assert table[table.call == layer][of.key].to_numpy()[head] == pytest.approx(wanted, abs=1e-6)


def test_a_head_that_looks_at_the_head() -> None:
    w = torch.zeros(1, 1, 4, 4)
    w[0, 0, range(4), [1, 2, 2, 2]] = 1  # the last word, too, to its head; the root to itself
    trace = given(w, torch.ones(4, 4, dtype=torch.bool), tokens=[["a", "cat", "ran", "off"]])
    assert Dependency(heads=[[1, 2, -1, 2]])(trace)["dependency"].item() == 1
    assert Dependency(heads=[[1, 2, None, 1]])(trace)["dependency"].item() == pytest.approx(2 / 3)
    assert (
        Dependency(heads=[[1, 2, -1, 2]], direction="dependent")(trace)["dependency(direction='dependent')"].item() == 0
    )
    ids = [0, 0, 1, 1]
    assert Dependency(heads=[[1, -1]], words=ids)(trace)["dependency"].item() == 1


def test_a_head_that_looks_at_itself_alone_hits_nothing() -> None:
    trace = given(torch.eye(3).view(1, 1, 3, 3), torch.ones(3, 3, dtype=torch.bool), tokens=[["a", "cat", "ran"]])
    assert Dependency(heads=[[1, 0, 0]])(trace)["dependency"].item() == 0


def test_the_words_of_a_mention_are_not_its_antecedents() -> None:
    trace = given(uniform(3), tokens=[["my", "old", "house"]])
    assert Coreference(clusters=[[[(0, 2), (0, 3)]]], how="mass")(trace).isna()["coreference(how='mass')"].all()  # type: ignore[arg-type]


def test_labels_that_do_not_fit() -> None:
    trace = given(uniform(4), tokens=[["a", "cat", "ran", "off"]])
    for wrong, message in (
        ({"heads": [0, 1]}, "expected one for each of 4 words, got 2"),
        ({"heads": [1, 2, 9, 2]}, "there is no word 9 of 4"),
        ({"heads": [[1, 2, -1, 2]] * 2}, "expected one list for each of 1 batch entries, got 2"),
        ({"heads": [1, 2, -1, 2], "relations": ["x"], "relation": "x"}, "relations of batch entry 0"),
        ({"heads": ["a", "b", "c", "d"]}, "expected the number of a word"),
        ({"heads": [1, 2, -1, 2], "direction": "up"}, "expected one of head, dependent"),
        ({"heads": [1, 2, -1, 2], "relation": "nsubj"}, "or neither"),
        ({"heads": [1, 2, -1, 2], "how": "sum"}, "expected one of argmax, mass"),
    ):
        with pytest.raises(MeasureError, match=message):
            Dependency(**wrong)(trace)  # type: ignore[arg-type]
    for clusters, message in (
        ([[[0, 9]]], "words 9 to 10 are not within its 4 words"),
        ([[0, 1]], "expected for each batch entry a list of clusters"),
        ([[["a"]]], "expected for each batch entry a list of clusters"),
        ([[[(2, 2)]]], "words 2 to 2 are not within"),
        ([[], []], "expected one list for each of 1 batch entries"),
    ):
        with pytest.raises(MeasureError, match=message):
            Coreference(clusters=clusters)(trace)  # type: ignore[arg-type]
    with pytest.raises(MeasureError, match="needs tokens"):
        Coreference(clusters=[[[0, 1]]])(given(uniform(4)))  # type: ignore[arg-type]
