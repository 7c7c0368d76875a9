"""Why a weight is what it is, in Chromium: the words and numbers against arithmetic in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from tests.browser.conftest import Layers, assert_fits, causal, cells, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

TOKENS = ["<s>", "Ġthe", "Ġcat", "Ġsat", "Ġdown", "Ġhere"]


def crafted(scores: Tensor, sinks: Tensor | None = None, mask: Tensor | None = None) -> hookattn.Trace:
    """One call of two heads with the given scores (H T S)."""
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 6, 24),), tokens=TOKENS)
    mask = ~causal(6) if mask is None else mask
    masked = scores.double().masked_fill(~mask, -torch.inf)
    sunk = torch.full((2, 6, 1), -torch.inf) if sinks is None else sinks.double()[:, None, None].expand(2, 6, 1)
    weights = torch.cat([masked, sunk], -1).softmax(-1)[..., :-1].nan_to_num(0)
    fields = {
        "scores": scores[None].float(),
        "mask": mask[None, None],
        "sinks": sinks,
        "weights": weights[None].float(),
    }
    return replace(made, calls=[replace(made[0], fields=fields, derivable=())])


def words(weights: Tensor, mask: Tensor, sink: bool, first: int = 0) -> list[str]:
    """The words of a row: written from their definition, apart from both of the renderers."""
    n = int(mask.sum())
    away = float(weights[first]) if n > 1 and mask[first] and weights[first] >= 1 / n else 0.0
    away += 1 - float(weights[mask].sum()) if sink else 0.0
    said = []
    for weight, may in zip(weights.tolist(), mask.tolist(), strict=True):
        if not may:
            said.append("masked")
        elif weight >= 1 / n:
            said.append("attended")
        else:
            said.append("drained" if weight >= (1 - away) / n else "outscored")
    return said


@pytest.mark.parametrize("sink", [False, True])
def test_the_words_of_every_row(open_page: Open, tmp_path: Path, sink: bool) -> None:
    torch.manual_seed(4)
    scores = 2 * torch.randn(2, 6, 6)
    scores[1, :, 0] += 3  # a head that rests on the first key
    made = crafted(scores, torch.tensor([2.0, 0.5]) if sink else None)
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'lens'}}")
    seen = set()
    for head in range(2):
        for query in range(6):
            page.evaluate(f"viewer.set({{heads: [{head}], query: {query}}})")
            page.get_by_text(f"Head {head}, query {query} “").wait_for()
            shown = [row[5] for row in cells(page)]
            wanted = words(made[0].weights[0, head, query].double(), ~causal(6)[query], sink)
            assert shown == wanted, (head, query)
            seen |= set(wanted)
    assert seen == {"attended", "drained", "masked", "outscored"}


def test_equal_weights_are_all_attended_to(open_page: Open, tmp_path: Path) -> None:
    """Among 1 to 40 keys some 1/n are rounded down, which makes none of them less than an equal share."""
    model = Layers(1).eval()
    made = hookattn.trace(model, (torch.zeros(1, 40, 24), None, causal(40)))
    assert any(made[0].weights[0, 0, n - 1, 0].double() < 1 / n for n in range(1, 41))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'lens'}}")
    for query in range(40):
        page.evaluate(f"viewer.set({{query: {query}}})")
        page.get_by_text(f"Head 0, query {query}:").wait_for()
        assert [row[5] for row in cells(page)] == ["attended"] * (query + 1) + ["masked"] * (39 - query)


def verdict(page: Any, query: int, key: int) -> str:
    page.evaluate(f"viewer.set({{query: {query}, key: {key}}})")
    page.wait_for_timeout(150)
    return str(page.locator(".verdict").inner_text())


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text.replace("−", "-"))]


def test_the_sentences(open_page: Open, tmp_path: Path) -> None:
    scores = torch.tensor([[3.0, -1.0, 0.5, 0.25, -2.0, 4.0]]).expand(2, 6, 6)
    made = crafted(scores, torch.tensor([-9.0, 3.5]))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'lens', heads: [0]}}")
    page.locator(".verdict").wait_for()
    plain, sunk = made[0].weights[0, :, 4].double()
    said = verdict(page, 4, 5)
    assert said.startswith("Query 4 “down” may not attend to key 5 “here”: the mask hides it, so it weighs 0.")
    total = scores[0, 0, :5].double().exp().sum() + torch.tensor(-9.0).exp()
    assert "rank 1 of 6" in said and numbers(said)[-1] == pytest.approx(
        (torch.tensor(4.0).exp() / (total + torch.tensor(4.0).exp())).item(), rel=5e-3
    )
    said = verdict(page, 4, 1)
    assert said == (
        f"Query 4 “down” gives key 1 “the” a weight of {plain[1]:.3g}, less than an equal share, 1/5 = 0.200: "
        "key 0 “<s>” outscores it, 3.00 against −1.00 (rank 4 of 5), and is 54.6 times as heavy."
    )
    digits = page.locator(".verdict span").evaluate_all("s => s.map(x => x.title)")
    assert float(digits[0]) == pytest.approx(plain[1].item(), rel=1e-7) and digits[2:4] == ["3", "−1"]
    said = verdict(page, 4, 0)
    assert said == (
        f"Query 4 “down” gives key 0 “<s>” a weight of {plain[0]:.3g}: its score of 3.00 is the largest of 5, "
        "2.50 above key 2 “cat” (0.500)."
    )
    page.evaluate("viewer.set({heads: [1]})")
    page.get_by_text("Head 1, query 4").wait_for()
    said = verdict(page, 4, 2)
    learned = 1 - sunk.sum()
    assert said.startswith("Query 4 “down” gives key 2 “cat” a weight of")
    assert "drained by a sink: key 0 “<s>”, the first key, takes" in said
    first, share = re.findall(r"takes (\d+) %", said)
    assert (int(first), int(share)) == (round(100 * float(sunk[0])), round(100 * float(learned)))
    assert f"{sunk[2] / (1 - learned - sunk[0]):.3g}" in said and "rank 2 of 5" in said


def test_the_facts(open_page: Open, tmp_path: Path) -> None:
    torch.manual_seed(2)
    scores, sinks = torch.randn(2, 6, 6), torch.tensor([0.3, -0.2])
    made = crafted(scores, sinks)
    options = "{state: {view: 'lens', heads: [1], query: 3, key: 2}}"
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), options)
    page.locator(".facts").wait_for()
    terms = page.locator(".facts dt").all_text_contents()
    told = page.locator(".facts dd").evaluate_all("d => d.map(x => x.textContent)")
    assert all(
        len(x.replace(".", "").lstrip("0")) <= 3 for x in re.findall(r"[\d.]+", " ".join(told).replace("key", ""))
    ), told
    facts = dict(zip(terms, told, strict=True))
    digits = dict(zip(terms, page.locator(".facts dd").evaluate_all("d => d.map(x => x.title)"), strict=True))
    row = scores[1, 3, :4].double()
    lse = torch.cat([row, sinks[1:].double()]).logsumexp(0)
    assert numbers(digits["log-sum-exp"])[0] == pytest.approx(lse.item(), rel=1e-6)
    assert numbers(digits["score"])[0] == pytest.approx(row[2].item(), rel=1e-6)
    assert facts["rank"] == f"{int((row > row[2]).sum()) + 1} of 4"
    rival = int(row.masked_fill(torch.arange(4) == 2, -torch.inf).argmax())
    assert facts["largest competitor"].startswith(f"key {rival} “")
    assert numbers(digits["largest competitor"])[-1] == pytest.approx(row[rival].item(), rel=1e-6)
    assert numbers(facts["learned sink"])[0] == pytest.approx(100 * (sinks[1].double() - lse).exp().item(), abs=0.6)
    assert numbers(digits["weight"])[0] == pytest.approx((row[2] - lse).exp().item(), rel=1e-5)


def test_padding_before_the_first_key_is_no_sink(open_page: Open, tmp_path: Path) -> None:
    scores = torch.zeros(2, 6, 6)
    scores[:, :, 2] = 4.0
    mask = ~causal(6)
    mask[:, :2] = False
    made = crafted(scores, None, mask)
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'lens', heads: [0]}}")
    page.locator(".verdict").wait_for()
    assert "key 2 “cat”, the first key, takes" in verdict(page, 5, 3)
    assert verdict(page, 1, 3).startswith("Query 1 “the” may attend to nothing: all keys are masked.")


def test_weights_that_are_not_of_their_scores_are_told(open_page: Open, tmp_path: Path) -> None:
    made = crafted(torch.zeros(2, 6, 6))
    options = "{state: {view: 'lens', heads: [0], query: 5, key: 1}}"
    page = show(open_page(), Path(made.save(tmp_path / "a.safetensors")), options)
    page.locator(".facts").wait_for()
    assert "not made of its scores" not in page.locator(".figure").inner_text()
    made[0].fields["weights"] = made[0].weights * 0.5
    page = show(open_page(), Path(made.save(tmp_path / "b.safetensors")), options)
    page.locator(".facts").wait_for()
    assert "not made of its scores" in page.locator(".figure").inner_text()


def weight(page: Any) -> float:
    return numbers(page.locator(".facts dd").last.get_attribute("title"))[0]


def test_hover_and_keys_choose(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    page = show(open_page(), file, "{state: {view: 'lens', layer: 1, heads: [2]}}")
    page.locator(".plane").wait_for()
    weights = trace[1].weights[0, 2, 8]
    assert weight(page) == pytest.approx(weights.max().item())  # the heaviest of the last query
    box = page.locator(".plane").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + box["height"] - 4 - 19 * (9 - 3.5))
    page.wait_for_timeout(100)
    assert weight(page) == pytest.approx(weights[3].item())
    page.mouse.down()
    page.mouse.up()
    assert (state(page)["query"], state(page)["key"]) == (8, 3)
    page.mouse.move(5, 5)
    for key in ["ArrowUp", "ArrowLeft"]:
        page.keyboard.press(key)
    page.wait_for_timeout(200)
    assert (state(page)["query"], state(page)["key"]) == (7, 2)
    assert weight(page) == pytest.approx(trace[1].weights[0, 2, 7, 2].item())


def test_a_step_of_a_generation(open_page: Open, tmp_path: Path) -> None:
    model, x, y = Layers(2).eval(), torch.randn(1, 3, 24), torch.randn(1, 6, 24)
    with hookattn.tracing(model) as made:
        model(y, y)
        model(x, torch.cat([y, x], 1))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'lens', heads: [1]}}")
    page.locator(".facts").wait_for()
    page.evaluate("viewer.set({step: 1, key: 8})")
    page.wait_for_timeout(300)
    assert weight(page) == pytest.approx(made[1].weights[0, 1, 2, 8].item(), rel=1e-5)


def test_a_compact_trace_says_the_same(open_page: Open, trace: hookattn.Trace, tmp_path: Path) -> None:
    options = "{state: {view: 'lens', layer: 1, heads: [2], query: 6}}"
    tables = []
    for compact in (False, True):
        path = Path(trace.save(tmp_path / f"{compact}.safetensors", compact=compact))
        page = show(open_page(), path, options)
        tables.append([[x[:9] for x in row] for row in cells(page)])
    shown = [[row[1:] for row in table] for table in tables]
    for one, other in zip(*shown, strict=True):
        assert one[2:3] + one[4:] == other[2:3] + other[4:]
        assert [numbers(x)[0] for x in one[:1] + one[3:4]] == pytest.approx(
            [numbers(x)[0] for x in other[:1] + other[3:4]], abs=2e-5
        )


def test_a_missing_field_names_the_capture(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 5, 24),), capture=("scores", "weights"))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'lens'}}")
    assert 'capture=("mask", …)' in page.get_by_role("alert").inner_text()


@pytest.mark.parametrize("width", [400, 3840])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_is_exported(open_page: Open, file: Path, width: int, theme: str) -> None:
    options = f"{{theme: '{theme}', state: {{view: 'lens', key: 2}}}}"
    page = show(open_page(viewport={"width": width, "height": 900}), file, options)
    page.locator(".plane").first.wait_for()
    assert_fits(page)
    svg = page.evaluate("viewer.svg()")
    assert "<circle" in svg and "outscored" in svg and "שלום" in svg and "var(--" not in svg
