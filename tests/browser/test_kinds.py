"""What is no plain softmax of products, and what was guessed, in Chromium: marked, and drawn as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests.browser.conftest import Layers, causal, cells, rows_of_table, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]
T = 7
GUESSED = {"B": "followed", "H": "guessed", "T": "guessed", "S": "followed", "G": "followed"}


def traced() -> hookattn.Trace:
    torch.manual_seed(0)
    made = hookattn.trace(
        Layers(2, 2).eval(), (torch.randn(1, T, 24), None, causal(T)), tokens=[f"t{i}" for i in range(T)]
    )
    assert made.faithful
    return made


def changed(layer: int, **own: Any) -> hookattn.Trace:
    """A trace one of whose calls is otherwise."""
    made = traced()
    fields = {**made[layer].fields, **own.pop("fields", {})}
    call = replace(made[layer], fields=fields, **own)
    call.certificate = made[layer].certificate
    made.calls[layer] = call
    return made


def of_weights(normalizer: str, weights: torch.Tensor) -> hookattn.Trace:
    """Weights of scores that are no product of queries and keys."""
    fields = {"q": None, "k": None, "scores": None, "weights": weights}
    own = {"score": "additive", "normalizer": normalizer, "own_scores": True, "scale": None, "derivable": ()}
    return changed(0, fields=fields, **own)


def saved(trace: hookattn.Trace, folder: Path) -> Path:
    return Path(trace.save(folder / "t.safetensors"))


def signed() -> torch.Tensor:
    w = torch.randn(1, 2, T, T, generator=torch.Generator().manual_seed(1)).tril()
    return w / w.abs().max() * 0.9


def test_a_guess_is_beside_the_certificate(open_page: Open, tmp_path: Path) -> None:
    page = show(open_page(), saved(changed(0, basis=GUESSED), tmp_path), "{state: {layer: 0}}")
    badge = page.locator("header .badge")
    assert badge.get_attribute("data-status") == "faithful" and badge.get_attribute("data-axes") == "axes guessed: H T"
    assert "axes guessed: H T" in badge.inner_text()
    assert "Which axis is which was guessed here (H, T)" in page.locator(".ha").inner_text()
    badge.click()
    page.locator("table.certificates").wait_for()
    assert "the axes of 1 were guessed" in page.locator(".figure").inner_text()
    said = page.locator(".certificates .guessed").all_inner_texts()
    assert said == ["axes guessed: H T, which no certificate can tell"]
    page.evaluate("viewer.set({view: 'head', layer: 1})")
    page.wait_for_function("!document.querySelector('#viewer').shadowRoot.querySelector('header .badge').dataset.axes")


def test_where_a_step_began_is_told(open_page: Open, tmp_path: Path) -> None:
    page = show(open_page(), saved(changed(0, entry="tower.encoder"), tmp_path), "{state: {layer: 0}}")
    assert "in a forward of tower.encoder alone" in page.locator("header").inner_text()


def test_lines_of_weights_below_0_are_dotted(open_page: Open, tmp_path: Path) -> None:
    w = signed()
    page = show(open_page(), saved(of_weights("differential", w), tmp_path), "{state: {layer: 0, heads: [1]}}")
    lines = page.locator("[data-view=head] path")
    lines.first.wait_for(state="attached")
    drawn = lines.evaluate_all("all => all.map(p => [+p.dataset.value, p.getAttribute('stroke-dasharray')])")
    own = w[0, 1][w[0, 1].abs() >= 0.01 * w.abs()[0, 1].max()]
    assert sorted(v for v, _ in drawn) == pytest.approx(sorted(own.tolist()), rel=1e-6)
    assert {dash for v, dash in drawn if v < 0} == {"0.5 4"} and "0.5 4" not in {dash for v, dash in drawn if v > 0}
    told = page.locator(".ha").inner_text()
    assert "dotted lines are negative" in told and "of the attention" not in page.locator(".readout").inner_text()
    assert "no softmax of the scores (normalizer: differential): they are no shares" in told


def test_weights_above_1_are_drawn_against_the_largest(open_page: Open, tmp_path: Path) -> None:
    w = 40 * signed().relu()
    page = show(open_page(), saved(of_weights("relu", w), tmp_path), "{state: {layer: 0, heads: [0]}}")
    lines = page.locator("[data-view=head] path")
    lines.first.wait_for(state="attached")
    drawn = lines.evaluate_all("all => all.map(p => [+p.dataset.value, +p.getAttribute('stroke-opacity')])")
    largest = float(w[0, 0].max())
    assert all(opacity == pytest.approx(max(0.03, v / largest), abs=6e-4) for v, opacity in drawn)
    page.evaluate("viewer.set({view: 'matrix'})")
    legend = page.locator(".foot svg").first
    legend.wait_for()
    assert f"{largest:.4g}" in (legend.get_attribute("aria-label") or "")


def test_a_matrix_of_weights_below_0_has_colours_about_0(open_page: Open, tmp_path: Path) -> None:
    w = signed()
    path = saved(of_weights("differential", w), tmp_path)
    page = show(open_page(), path, "{state: {view: 'matrix', layer: 0, heads: [0]}}")
    page.locator(".plane canvas").wait_for()
    label = page.locator(".foot svg").first.get_attribute("aria-label") or ""
    ends = [float(x) for x in re.findall(r"[−-]?\d+\.\d+", label.replace("−", "-"))[:2]]
    assert ends == pytest.approx([-float(w[0, 0].abs().max()), float(w[0, 0].abs().max())], rel=1e-3)


@pytest.mark.parametrize(("view", "said"), [
    ("neuron", "no product of queries and keys (additive)"),
    ("lens", "is told of a softmax"),
])  # fmt: skip
def test_a_view_that_a_call_has_nothing_for_says_why(open_page: Open, tmp_path: Path, view: str, said: str) -> None:
    path = saved(of_weights("sigmoid", signed().abs()), tmp_path)
    page = show(open_page(), path, f"{{state: {{view: '{view}', layer: 0}}}}")
    assert said in page.locator(".figure").inner_text()


def test_scores_that_a_call_has_none_of_are_not_said_to_be_captured_otherwise(open_page: Open, tmp_path: Path) -> None:
    path = saved(of_weights("sigmoid", signed().abs()), tmp_path)
    page = show(open_page(), path, "{state: {view: 'matrix', field: 'scores', layer: 0}}")
    told = page.locator(".figure").inner_text()
    assert "There is no “scores”" in told and "additive" in told and "capture=" not in told


def test_both_kinds_of_weights_are_offered_and_it_says_which_are_shown(open_page: Open, tmp_path: Path) -> None:
    made = traced()
    applied = made[1].weights * torch.tensor([0.5, -1.0]).view(1, 2, 1, 1)
    made = changed(1, fields={"applied": applied}, mixed=True)
    page = show(open_page(), saved(made, tmp_path), "{state: {view: 'head', layer: 1, heads: [1]}}")
    assert "Shown are the weights before that" in page.locator(".ha").inner_text()
    page.get_by_role("group", name="Weights").get_by_role("button", name="applied").click()
    page.wait_for_function("viewer.state.field === 'applied'")
    page.locator("[data-view=head] path[stroke-dasharray='0.5 4']").first.wait_for(state="attached")
    values = page.locator("[data-view=head] path").evaluate_all("all => all.map(p => +p.dataset.value)")
    shown = applied[0, 1][applied[0, 1].abs() >= 0.01 * applied[0, 1].abs().max()]
    assert sorted(values) == pytest.approx(sorted(shown.tolist()), rel=1e-6)
    assert "Shown is “applied”, what met the values" in page.locator(".ha").inner_text()
    strongest = rows_of_table(page)[0][2]
    assert strongest == pytest.approx(float(applied[0, 1].min()), rel=1e-6), "the farthest from 0, below it"
    page.evaluate("viewer.set({view: 'matrix'})")
    page.locator(".plane canvas").wait_for()
    assert "applied of head 1" in (page.locator(".plane").inner_html())
    # In a layer where nothing changed them, what met the values are the weights.
    page.evaluate("viewer.set({view: 'head', layer: 0})")
    page.wait_for_function("viewer.state.layer === 0")
    assert page.get_by_role("group", name="Weights").count() == 0
    assert state(page)["field"] == "applied"


def test_masked_scores_look_masked_and_are_no_strongest_pair(open_page: Open, tmp_path: Path) -> None:
    made = traced()
    scores = made[0].scores.clone()
    scores[0, 0, 1, T - 1] = 99.0  # a key that query 1 may not see
    made = changed(0, fields={"scores": scores})
    path = saved(made, tmp_path)
    page = show(open_page(), path, "{state: {view: 'matrix', field: 'scores', layer: 0, heads: [0]}}")
    page.locator(".plane canvas").wait_for()
    assert "masked" in page.locator(".foot").first.inner_html()
    allowed = scores[0, 0].masked_fill(~made[0].mask[0, 0], -torch.inf)
    query, key = divmod(int(allowed.argmax()), T)
    first = rows_of_table(page)[0]
    assert (first[0].split()[0], first[1].split()[0]) == (str(query), str(key))
    assert first[2] == pytest.approx(float(allowed.max()), rel=1e-6)
    assert "99" not in (page.locator(".foot svg").first.get_attribute("aria-label") or "")
    assert cells(page) is not None
