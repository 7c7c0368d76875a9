"""The views as a reader meets them: what is drawn is what is in the trace, by mouse, by key and by link."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests.browser.conftest import HATCHED, READ, Layers, rows_of_table, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

# ------------------------------------------------------------------------------------------------------ the head view


def test_lines_are_the_weights(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    page = show(open_page(), file, "{state: {layer: 1, batch: 1, heads: [2]}}")
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    weights = trace[1].weights[1, 2]
    assert page.locator("[data-view=head] path").count() == int((weights >= 0.01).sum())
    opacity = page.locator("[data-view=head] path").evaluate_all(
        "all => all.map(p => +p.getAttribute('stroke-opacity'))"
    )
    assert torch.allclose(torch.tensor(opacity), weights[weights >= 0.01].sort().values.clamp(min=0.03), atol=6e-4)


def test_heads_shown_together_look_apart(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(12).eval(), (torch.randn(1, 5, 24),), tokens=list("abcde"))
    path = Path(made.save(tmp_path / "t.safetensors"))
    looks = "all => all.map(p => p.getAttribute('stroke') + ' ' + p.getAttribute('stroke-dasharray'))"
    own = {}
    for heads in ([9], [1, 9], [0, 1, 2, 3, 8, 9, 10, 11], list(range(12))):
        page = show(open_page(), path, f"{{state: {{heads: {heads}}}}}")
        page.locator("[data-view=head] path").first.wait_for(state="attached")
        found = set(page.locator("[data-view=head] path").evaluate_all(looks))
        assert len(found) == len(heads)
        assert any(look.split(" ", 1)[1] for look in found) == (max(heads) >= 8)
        chips = page.locator(".chip[aria-pressed=true]").evaluate_all("all => all.map(c => c.style.borderBottomColor)")
        # A head has the same colour whichever others are beside it.
        for head, colour in zip(sorted(heads), chips, strict=True):
            assert own.setdefault(head, colour) == colour == f"var(--h{head % 8})"


def test_a_locked_query_shows_its_own_weights(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    page = show(open_page(), file, "{state: {heads: [3]}}")
    page.locator("[data-view=head] text", has_text="↵").first.click()
    page.wait_for_function("viewer.state.query === 6")
    weights = trace[0].weights[0, 3, 6]
    shown = page.locator("[data-view=head] text").all_text_contents()
    assert {f"{w:.4f}" for w in weights[weights > 1e-4].tolist()} <= set(shown)
    table = rows_of_table(page)
    assert [q for q, _, _ in table] == ["6 “↵”"] * 7  # later keys are masked
    assert torch.allclose(torch.tensor([w for _, _, w in table]), weights[:7].sort(descending=True).values, rtol=1e-6)
    assert table[0][1].startswith(f"{int(weights.argmax())} ")


def test_tokens_are_shown_as_they_are_read_and_run_nothing(open_page: Open, file: Path) -> None:
    page = show(open_page(), file)
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    texts = page.locator("[data-view=head] svg > g").first.locator("text").all_text_contents()
    assert texts == READ
    assert page.evaluate("document.querySelector('#viewer').shadowRoot.querySelectorAll('img').length") == 0


@pytest.mark.parametrize(("tokens", "read"), [
    (["[CLS]", "un", "##believ", "##able", "[...]"], ["[CLS]", "un", "…believ", "…able", "[...]"]),
    (["▁x", "<0xE2>", "<0x82>", "<0xAC>", "a\tb"], ["x", "€ 1/3", "€ 2/3", "€ 3/3", "a⇥b"]),
    (["<|startoftext|>", "pho", "to</w>", "of</w>", ".</w>"], ["<|startoftext|>", "pho", "…to", "of", "."]),
    (["he@@", "ll@@", "o", "▁<PRE>", "world"], ["he", "…ll", "…o", "<PRE>", "world"]),
])  # fmt: skip
def test_pieces_of_words(open_page: Open, tmp_path: Path, tokens: list[str], read: list[str]) -> None:
    model, x = Layers(2).eval(), torch.randn(1, 5, 24)
    path = Path(hookattn.trace(model, (x,), tokens=tokens).save(tmp_path / "t.safetensors"))
    page = show(open_page(), path)
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    texts = page.locator("[data-view=head] svg > g").first.locator("text").all_text_contents()
    assert texts == read


def test_pairs_are_filtered_by_direction(open_page: Open, tmp_path: Path) -> None:
    tokens = ["[CLS]", "a", "b", "[SEP]", "c", "d", "[SEP]"]
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 7, 24),), tokens=tokens)
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {heads: [1], filter: 'AB'}}")
    found = {(int(q[0]), int(k[0])): w for q, k, w in rows_of_table(page)}
    expected = {(t, s): made[0].weights[0, 1, t, s].item() for t in range(4) for s in range(4, 7)}
    assert found == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------------------------------------- the matrix view


@pytest.mark.parametrize("field", ["weights", "scores", "mask"])
def test_hover_tells_the_number_of_the_cell(open_page: Open, file: Path, trace: hookattn.Trace, field: str) -> None:
    page = show(open_page(), file, f"{{state: {{view: 'matrix', layer: 1, heads: [0], field: '{field}'}}}}")
    canvas = page.locator(".plane canvas")
    box = canvas.bounding_box()
    values = trace[1].get(field).expand(2, 4, 9, 9)[0, 0]
    for query, key in [(0, 0), (8, 3), (5, 7)]:
        page.mouse.move(box["x"] + (key + 0.5) * box["width"] / 9, box["y"] + (query + 0.5) * box["height"] / 9)
        text = page.locator(".tip").inner_text()
        assert f"query {query} “{READ[query][:20]}" in text and f"key {key} “{READ[key][:20]}" in text
        if field == "mask":
            assert text.endswith("may attend" if values[query, key] else "masked")
        elif field == "weights" and key > query:
            assert text.endswith("weights masked")
        else:
            hidden = key > query
            assert ("masked (without the mask" in text) == hidden  # no softmax has seen it
            said = float(text.rsplit(" ", 1)[1].replace("−", "-").rstrip(")"))
            assert said == pytest.approx(values[query, key].item(), rel=1e-6)


PIXEL = """([x, y]) => { const c = document.querySelector('#viewer').shadowRoot.querySelector('.plane canvas');
  return [...c.getContext('2d').getImageData(Math.floor(x * c.width), Math.floor(y * c.height), 1, 1).data]; }"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_bright_cell_among_thousands_is_seen(open_page: Open, tmp_path: Path, theme: str) -> None:
    """Pooled by the largest: a single weight of 1 among a million stays, at every zoom; the mean would lose it."""
    made = hookattn.trace(Layers(1).eval(), (torch.randn(1, 1500, 24),), capture=("weights",))
    weights = torch.zeros(1, 1, 1500, 1500)
    weights[0, 0, 777, 1234] = 1.0
    made[0].fields["weights"] = weights
    page = show(
        open_page(), Path(made.save(tmp_path / "t.safetensors")), f"{{theme: '{theme}', state: {{view: 'matrix'}}}}"
    )
    page.locator(".plane canvas").wait_for()
    at = [1234.5 / 1500, 777.5 / 1500]
    # Before all of it is drawn, in frames to come, its pixels are alike, or hatched where rows are still being read.
    page.wait_for_function(
        f"([at, far]) => {{ const [a, b] = [({PIXEL})(at), ({PIXEL})(far)]; "
        "return a.reduce((sum, x, i) => sum + Math.abs(x - b[i]), 0) > 400; }",
        arg=[at, [0.1, 0.1]],
    )
    strong = page.evaluate(PIXEL, at)
    page.evaluate("viewer.set({zoom: [1200, 750, 60, 60]})")
    # The plane is drawn in a frame to come; before that the pixel is one of the weak ones.
    page.wait_for_function(
        f"([at, strong]) => String(({PIXEL})(at)) === String(strong)", arg=[[34.5 / 60, 27.5 / 60], strong]
    )
    box = page.locator(".plane canvas").bounding_box()
    page.mouse.move(box["x"] + 34.5 / 60 * box["width"], box["y"] + 27.5 / 60 * box["height"])
    assert re.search(r"query 777\s+key 1234\s+weights 1$", page.locator(".tip").inner_text())


def test_the_first_key_is_dropped_or_shared_out(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    weights = trace[0].weights[0, 1].double()
    rest = weights[8, 1:] / (1 - weights[8, 0])
    page = show(open_page(), file, "{state: {view: 'matrix', heads: [1], query: 8, sink: 'renormalise'}}")
    found = {int(k.split()[0]): w for _, k, w in rows_of_table(page)}
    assert found == pytest.approx({s + 1: w for s, w in enumerate(rest.tolist())}, rel=1e-5)
    page.get_by_role("button", name="Display").click()
    page.get_by_role("button", name="dropped").click()
    page.wait_for_timeout(200)
    found = {int(k.split()[0]): w for _, k, w in rows_of_table(page)}
    assert found == pytest.approx({s: weights[8, s].item() for s in range(1, 9)}, rel=1e-6)


def test_zoom_and_pan_keep_the_cell_under_the_pointer(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(1).eval(), (torch.randn(1, 200, 24),))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'matrix'}}")
    box = page.locator(".plane canvas").bounding_box()
    x, y = box["x"] + box["width"] * 0.7025, box["y"] + box["height"] * 0.4025
    page.mouse.move(x, y)
    before = page.locator(".tip").inner_text()
    for _ in range(5):
        page.mouse.wheel(0, -100)
    page.mouse.move(x + 0.3, y)
    page.wait_for_function("viewer.state.zoom !== null")
    assert page.locator(".tip").inner_text() == before
    left = state(page)["zoom"][0]
    page.mouse.down()
    page.mouse.move(x - 60, y, steps=4)
    page.mouse.up()
    page.wait_for_function(f"viewer.state.zoom[0] > {left + 1}")
    page.keyboard.press("Escape")
    page.wait_for_function("viewer.state.zoom === null")


# ------------------------------------------------------------------------------------------------------ the model view


def test_heads_are_sorted_filtered_and_badged_by_scores(open_page: Open, file: Path) -> None:
    values = [[0.1, 0.9, None, 0.4], [0.8, 0.2, 0.7, 0.3]]
    roles = [[[], ["previous token"], [], []], [[], [], [], []]]
    scores = {"mass": {"unit": "", "description": "Mass on the first key.", "values": values}, "roles": roles}
    options = f"{{scores: {json.dumps(scores)}, state: {{view: 'model', sort: 'mass', least: 0.25}}}}"
    page = show(open_page(), file, options)
    page.locator(".tile").first.wait_for(state="attached")
    names = page.locator(".tile .hidden").all_text_contents()
    assert names == [f"layer {i}, head {j}: " for i, j in [(0, 1), (1, 0), (1, 2), (0, 3), (1, 3)]]
    assert "previous token" in page.locator(".tile").first.inner_text()
    page.locator(".tile").nth(2).click()
    assert {k: state(page)[k] for k in ("view", "layer", "heads")} == {"view": "matrix", "layer": 1, "heads": [2]}


def test_thumbnails_are_of_one_direction_of_a_pair(open_page: Open, tmp_path: Path) -> None:
    tokens = ["[CLS]", "a", "b", "[SEP]", "c", "d", "[SEP]"]
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 7, 24),), tokens=tokens)
    options = "{state: {view: 'model', heads: [1], filter: 'AB'}, theme: 'light'}"
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), options)
    page.locator(".tile").first.wait_for()
    page.wait_for_timeout(300)
    cells = [(t, s) for t in range(7) for s in range(7)]
    void = {(t, s) for t, s in cells if page.evaluate(HATCHED, [".tile canvas", t, s, 7, 7])}
    assert void == {(t, s) for t, s in cells if not (t < 4 <= s)}


def test_ragged_layers_are_all_there(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(2, 4, 1).eval(), (torch.randn(1, 5, 24),))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'model'}}")
    assert page.locator(".tile").count() == 7
    page.locator(".tile").nth(5).click()
    assert (state(page)["layer"], state(page)["heads"]) == (1, [3])
    page.keyboard.press("]")
    page.wait_for_function("viewer.state.layer === 2")
    assert state(page)["heads"] == [0]


def test_a_line_and_a_locked_token_have_their_numbers(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    page = show(open_page(), file, "{state: {view: 'head', layer: 1, heads: [1, 2], query: 8}}")
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    weights = trace[1].weights[0, [1, 2], 8]
    largest = weights.max()
    head, key = divmod(int(weights.argmax()), 9)
    told = page.locator("[data-view=head] .readout").inner_text()
    assert told.startswith("from query 8 “") and f"{largest:.3g} (head {head + 1})" in told and f"key {key} “" in told
    line = page.locator("[data-view=head] path").evaluate_all(
        """(all) => { const p = all.reduce((a, b) => Number(a.dataset.value) > Number(b.dataset.value) ? a : b);
        const at = p.getPointAtLength(0.7 * p.getTotalLength()), box = p.ownerSVGElement.getBoundingClientRect();
        return [box.x + at.x, box.y + at.y]; }"""
    )
    page.mouse.move(*line)
    tip = page.locator(".tip").inner_text()
    assert float(tip.rsplit(" ", 1)[1]) == pytest.approx(float(largest), rel=1e-6) and f"head {head + 1}:" in tip
