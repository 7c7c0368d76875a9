"""Repeated tokens: against loops, TransformerLens and closed forms."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import analyze
from hookattn.analyze import Detection, DuplicateToken, Induction, RepeatedSegment
from hookattn.errors import FieldNotCaptured, MeasureError, SelectionError
from hookattn.statistics import OffsetMass
from tests.analyze import explicit
from tests.analyze.build import CASES, case, given, previous, uniform

SMALL = ("a", "b", "c", "d")


def duplicate(tokens: list[list[Any]], real: Tensor) -> explicit.Related:
    return lambda b, i, j: j < i and tokens[b][j] == tokens[b][i]


def induction(tokens: list[list[Any]], real: Tensor) -> explicit.Related:
    return lambda b, i, j: 0 < j <= i and bool(real[b, j - 1]) and tokens[b][j - 1] == tokens[b][i]


@pytest.mark.parametrize("kind", CASES)
def test_earlier_occurrences_of_every_kind(kind: str) -> None:
    options = CASES[kind]
    s = options.get("s", options.get("t", 9))
    tokens = explicit.words(options.get("b", 2), s, SMALL, 3)
    made = case(**options, tokens=tokens)
    explicit.holds(DuplicateToken(), made, duplicate(tokens, made.real))
    explicit.holds(Induction(), made, induction(tokens, made.real))


def test_token_ids_instead_of_tokens() -> None:
    ids = torch.tensor([[5, 6, 5, 7, 6, 5, 8, 8, 6], [1, 1, 2, 3, 4, 2, 1, 9, 9]])
    made = case()
    explicit.holds(DuplicateToken(ids), made, duplicate(ids.tolist(), made.real))
    explicit.holds(Induction(ids.tolist()), made, induction(ids.tolist(), made.real))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_of_weights_alone_in_every_dtype(dtype: torch.dtype) -> None:
    tokens = explicit.words(2, 9, SMALL, 3)
    made = case(dtype=dtype, keep=("weights",), tokens=tokens, pad=(2, 0))
    for weights, call in zip(made.weights, made.trace, strict=True):
        weights.copy_(call.weights)
    explicit.holds(Induction(), made, induction(tokens, made.real))
    explicit.holds(DuplicateToken(), made, duplicate(tokens, made.real))


def test_a_weight_that_is_no_number_shows() -> None:
    trace = given(uniform(4, 2), tokens=[list("abab")])
    trace[0].weights[0, 1, 3, 1] = torch.nan
    assert DuplicateToken()(trace)["duplicate_token"].isna().tolist() == [False, True]


def test_padding_that_is_written_as_a_real_token_is_no_earlier_occurrence() -> None:
    tokens = [["x", "x", "x", "a", "b", "x", "a", "x", "b"]] * 2
    made = case(pad=(3, 2), side="left", tokens=tokens)
    explicit.holds(Induction(), made, induction(tokens, made.real))
    explicit.holds(Induction(), made, induction(tokens, made.real), real=made.real)


def test_nothing_repeats() -> None:
    assert DuplicateToken()(given(uniform(4), tokens=[list("abcd")]))["duplicate_token"].isna().all()


def test_closed_forms() -> None:
    trace = given(uniform(6), tokens=[list("abcabc")])
    assert Induction()(trace)["induction"].item() == pytest.approx((1 / 4 + 1 / 5 + 1 / 6) / 3)
    w = torch.zeros(1, 1, 6, 6)
    w[0, 0, range(6), [0, 1, 2, 1, 2, 3]] = 1
    assert Induction()(given(w, tokens=[list("abcabc")]))["induction"].item() == 1


def test_tokens_that_do_not_fit() -> None:
    trace = given(uniform(5))
    with pytest.raises(MeasureError, match="needs tokens"):
        Induction()(trace)
    assert analyze.measure(trace, "induction", missing=True)["induction"].isna().all()
    with pytest.raises(MeasureError, match="lists of 4 for 5 keys"):
        Induction([1, 2, 3, 4])(trace)
    with pytest.raises(MeasureError, match="lists of 6 for 5 keys"):  # of one forward: of another stack, most likely
        Induction([1, 2, 3, 4, 5, 6])(trace)
    with pytest.raises(MeasureError, match="3 lists for 1 batch entries"):
        Induction([[1] * 5] * 3)(trace)
    with pytest.raises(MeasureError, match="expected one label"):
        Induction("abcde")
    with pytest.raises(MeasureError, match="expected one label"):
        Induction([1.5, 2.0])
    with pytest.raises(MeasureError, match="keys are patches"):
        Induction()(given(uniform(5), tokens=[list("ababa")], axes="patches"))
    with pytest.raises(MeasureError, match="places in one sequence"):
        Induction()(case(cross=True, tokens=[["a"] * 9] * 2).trace)
    with pytest.raises(SelectionError, match="other labels or tokens"):
        analyze.measure(trace, [Induction([1, 1, 1, 1, 1]), Induction([1, 2, 1, 2, 1])])
    with pytest.raises(FieldNotCaptured):
        Induction([1, 1, 1, 1, 1])(hookattn.trace(Causal(), torch.randn(1, 5, 8), capture=("q",)))


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Cached(nn.Module):
    """One token at a time, with a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.view(*x.shape[:2], 2, -1).transpose(1, 2))
        k = torch.cat(self.seen, 2)
        return nn.functional.scaled_dot_product_attention(self.seen[-1], k, k, is_causal=len(self.seen) == 1)


def test_a_generation_is_as_one_forward() -> None:
    x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = [list("abcabcab")]
    whole = hookattn.trace(Causal(), x, tokens=tokens)
    model = Cached()
    with hookattn.tracing(model, tokens=tokens) as steps:
        for part in x.split([5, 1, 1, 1], 1):
            model(part)
    for of in (Induction(), DuplicateToken()):
        table = analyze.measure(steps, of, by="query").dropna()
        wanted = analyze.measure(whole, of, by="query").dropna()
        after = wanted[wanted["query"] >= 3]
        found = table.sort_values(["head", "step", "query"])[of.key].to_numpy()
        assert found == pytest.approx(after.sort_values(["head", "query"])[of.key].to_numpy(), abs=1e-6)
        assert len(found) == 10


# ------------------------------------------------------------------------------------------------ TransformerLens


@pytest.mark.parametrize("s", [2, 7, 12])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("current", [False, True])
def test_detection_is_that_of_transformer_lens(s: int, bos: bool, current: bool) -> None:
    peer = pytest.importorskip("transformer_lens.head_detector")
    drawn = random.Random(s)
    tokens = torch.tensor([[drawn.randrange(4) for _ in range(s)]])
    weights = [torch.randn(1, 3, s, s).masked_fill(torch.ones(s, s).triu(1) > 0, -1e9).softmax(-1) for _ in range(2)]
    cfg = SimpleNamespace(device="cpu", n_ctx=64, n_heads=3, n_layers=2, dtype=torch.float32)
    model = SimpleNamespace(cfg=cfg, to_tokens=lambda text: tokens)
    trace = given(weights)
    for pattern in peer.HEAD_NAMES:
        for error in ("mul", "abs"):
            cache = {("pattern", layer, "attn"): w[0].clone() for layer, w in enumerate(weights)}
            options = {"exclude_bos": bos, "exclude_current_token": current}
            wanted = peer.detect_head(model, "one text", pattern, cache=cache, error_measure=error, **options)
            own = Detection(tokens, pattern=pattern, error=error, **options)
            found = torch.tensor(own(trace)[own.key].to_numpy()).view(2, 3)
            close = 1e-6 if error == "mul" else 5.1e-4  # the peer rounds it to three digits
            torch.testing.assert_close(found, wanted.double(), atol=close, rtol=0, equal_nan=True)


def test_detection_closed_forms() -> None:
    trace = given(uniform(5))
    for error, wanted in (
        ("mul", (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5),
        ("abs", 1 - (1 + 2 * (1 / 2 + 2 / 3 + 3 / 4 + 4 / 5)) / 5),
    ):
        of = Detection(pattern="previous_token_head", error=error)
        assert of(trace)[of.key].item() == pytest.approx(wanted)
    of = Detection(pattern="previous_token_head")
    assert of(given(previous(8)))[of.key].item() == pytest.approx(7 / 8)


def test_detection_expects_what_a_mask_forbids() -> None:
    trace = given(torch.eye(4).view(1, 1, 4, 4), torch.eye(4, dtype=torch.bool))
    of = Detection(pattern="previous_token_head", error="abs")
    assert of(trace)[of.key].item() == pytest.approx(1 - (4 + 3) / 4)


@pytest.mark.parametrize("pattern", ["induction_head", "previous_token_head"])
@pytest.mark.parametrize("error", ["mul", "abs"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_detection_with_padding(error: str, side: str, pattern: str) -> None:
    tokens = explicit.words(2, 9, SMALL, 5)
    made = case(pad=(0, 3), side=side, tokens=tokens, sinks=True)
    of = Detection(pattern=pattern, error=error, exclude_bos=True, exclude_current_token=True)
    table = analyze.measure(made.trace, of, by="example")
    for layer, w in enumerate(made.weights):
        found = torch.tensor(table[table.call == layer][of.key].to_numpy()).view(2, 4)
        for b in range(2):
            real = [i for i in range(9) if made.real[b, i]]
            related = induction(tokens, made.real)
            if pattern == "previous_token_head":
                related = lambda b, i, j: j == i - 1  # noqa: E731
            for h in range(4):
                hit = total = away = 0.0
                for i in real:
                    for j in real[1:]:
                        if j != i:
                            a, d = float(w[b, h, i, j]), float(related(b, i, j))
                            hit, total, away = hit + a * d, total + a, away + abs(a - d)
                wanted = hit / total if error == "mul" else 1 - away / len(real)
                assert float(found[b, h]) == pytest.approx(wanted, abs=1e-6)


def test_detection_of_something_unknown() -> None:
    with pytest.raises(MeasureError, match="expected one of previous_token_head"):
        Detection(pattern="name_mover")
    with pytest.raises(MeasureError, match="expected one of mul, abs"):
        Detection(error="squared")


# ------------------------------------------------------------------------------------------------ repeated segments


def test_repeated_random_tokens() -> None:
    drawn = random.Random(2)
    rows = [drawn.sample(range(50), 6) for _ in range(2)]
    tokens = [[99, *row, *row, *row[:2]] for row in rows]
    made = case(t=15, b=2)
    for period in (None, 6):
        table = analyze.repeated_segment(made.trace, period, tokens=tokens)
        for kind, offset in (("induction", -5), ("duplicate_token", -6), ("previous_token", -1)):
            for layer, w in enumerate(made.weights):
                wanted = w.diagonal(offset, 2, 3)[..., -8:].mean((0, 2))
                found = torch.tensor(table[table.call == layer][kind].to_numpy())
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_repeated_segment_of_statistics_alone() -> None:
    x = torch.randn(1, 12, 8)
    offsets = (OffsetMass(-5), OffsetMass(-6), OffsetMass(-1))
    alone = hookattn.trace(Causal(), x, capture=offsets)
    whole = hookattn.trace(Causal(), x)
    found, wanted = (analyze.repeated_segment(trace, 6) for trace in (alone, whole))
    for kind in ("induction", "duplicate_token", "previous_token"):
        assert found[kind].to_numpy() == pytest.approx(wanted[kind].to_numpy(), abs=1e-6)
        of = RepeatedSegment(kind, 6)
        w = whole[0].weights.double()
        offset = {"induction": -5, "duplicate_token": -6, "previous_token": -1}[kind]
        assert of(whole)[of.key].to_numpy() == pytest.approx(
            w.diagonal(offset, 2, 3)[0, :, -6:].mean(-1).numpy(), abs=1e-6
        )


def test_repeated_segment_that_is_none() -> None:
    with pytest.raises(MeasureError, match="no segment of the tokens"):
        analyze.repeated_segment(given(uniform(5), tokens=[list("abcde")]))
    with pytest.raises(MeasureError, match="int from 1"):
        RepeatedSegment(period=0)
    with pytest.raises(MeasureError, match="expected one of induction"):
        RepeatedSegment("copying")
    with pytest.raises(MeasureError, match="needs tokens"):
        analyze.repeated_segment(given(uniform(5)))


def test_a_model_that_has_learned_to_copy() -> None:
    from hookattn.demo.induction import example_tokens, load_pretrained

    tokens = example_tokens(length=24)
    trace = hookattn.trace(load_pretrained(), tokens, tokens=[[str(int(x)) for x in tokens[0]]])
    found = analyze.measure(trace, ["induction", "duplicate_token", "positional"])
    runs = analyze.repeated_segment(trace)
    assert (found[found.layer == 1]["induction"] > 0.5).any() and (found[found.layer == 0]["induction"] < 0.3).all()
    assert found["duplicate_token"].max() < 0.3
    assert found["induction"].to_numpy() == pytest.approx(
        runs["induction"].to_numpy(), abs=1e-6
    )  # nothing else repeats
    offsets = analyze.best_offset(trace)
    assert set(offsets[(offsets.layer == 0) & (offsets.share > 0.9)]["offset"]) == {-1}
