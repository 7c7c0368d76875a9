"""The flow view in Chromium: rollout and maximum flow against float64, scipy and the analyzers; what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hookattn
from hookattn.analyze import flow, rollout
from tests.browser.conftest import READ, TOKENS, Layers, assert_fits, causal, cells, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def deep() -> hookattn.Trace:
    """Four layers of ragged numbers of causal heads, two sequences."""
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))
    return hookattn.trace(Layers(4, 2, 3, 4).eval(), (x, None, causal(9)), tokens=TOKENS)


@pytest.fixture
def deep_file(deep: hookattn.Trace, tmp_path: Path) -> Path:
    return Path(deep.save(tmp_path / "t.safetensors"))


def mixed(trace: hookattn.Trace, batch: int) -> list[Tensor]:
    """A of each layer, T T, in float64: half of the mean over heads, half of the token itself."""
    layers = []
    for call in trace:
        mean = call.weights[batch].double().mean(0)
        layers.append(0.5 * mean / mean.sum(-1, keepdim=True) + 0.5 * torch.eye(len(mean)))
    return layers


def shown(page: Any, count: int) -> list[float]:
    """What comes of each input token, by its position."""
    page.locator(".as-table tbody tr").nth(count - 1).wait_for(state="attached")
    values = {int(token.split()[0]): float(value) for token, value in cells(page)}
    return [values[i] for i in range(count)]


def asked(page: Any, query: int, what: str) -> list[float]:
    page.evaluate(f"viewer.set({{query: {query}}})")
    page.locator(".as-table summary", has_text=f"{query} “{READ[query][:3]}").wait_for()
    page.locator(".as-table summary", has_text=what).wait_for()
    return shown(page, 9)


def test_rollout_is_the_product_of_the_layers(open_page: Open, deep: hookattn.Trace, deep_file: Path) -> None:
    page = show(open_page(), deep_file, "{state: {view: 'flow', batch: 1}}")
    product = torch.eye(9, dtype=torch.float64)
    for layer in mixed(deep, 1):
        product = layer @ product
    for query in (8, 0, 5):
        values = asked(page, query, "rollout")
        assert values == pytest.approx(product[query].tolist(), rel=2e-6, abs=1e-9)
        assert values == pytest.approx(rollout(deep)[-1, 1, query].tolist(), rel=2e-6, abs=1e-9)


def cut(layers: list[Tensor], query: int, key: int) -> float:
    """The maximum flow by scipy over a network that is built here."""
    from scipy.sparse import lil_array
    from scipy.sparse.csgraph import maximum_flow

    n, depth = len(layers[0]), len(layers)
    network = lil_array(((depth + 1) * n, (depth + 1) * n), dtype=np.int32)
    for level, layer in enumerate(layers):
        for i in range(n):
            for j in range(n):
                network[(level + 1) * n + i, level * n + j] = round(float(layer[i, j]) * 2**30)
    return float(maximum_flow(network.tocsr(), depth * n + query, key).flow_value / 2**30)


def test_flow_is_the_maximum_flow(open_page: Open, deep: hookattn.Trace, deep_file: Path) -> None:
    page = show(open_page(), deep_file, "{state: {view: 'flow', through: 'flow'}}")
    layers = mixed(deep, 0)
    for query in (8, 6):
        values = asked(page, query, "maximum flow")
        assert values == pytest.approx([cut(layers, query, key) for key in range(9)], abs=2e-7)
        assert values == pytest.approx(flow(deep, [query])[0, 0].tolist(), abs=2e-7)


def test_bottlenecks_bend_a_flow(open_page: Open, tmp_path: Path) -> None:
    """Weights that are all or nothing: shortest paths are full at once, and flow has to be taken back and sent anew."""
    torch.manual_seed(0)
    made = hookattn.trace(Layers(1, 1, 1, 1, 1).eval(), (torch.randn(1, 12, 24),), capture=("weights", "mask"))
    for call in made:
        sparse = torch.rand(1, 1, 12, 12) * (torch.rand(1, 1, 12, 12) < 0.25)
        call.fields["weights"] = sparse / sparse.sum(-1, keepdim=True).clamp(min=1e-9)
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'flow', through: 'flow'}}")
    for query in range(12):
        page.evaluate(f"viewer.set({{query: {query}}})")
        page.locator(".as-table summary", has_text=f"{query} after the last layer").wait_for()
        assert shown(page, 12) == pytest.approx(flow(made, [query])[0, 0].tolist(), abs=2e-7)


def test_padding_and_sinks(open_page: Open, deep: hookattn.Trace, tmp_path: Path) -> None:
    """Rows that are padding stay themselves, and what a sink takes goes nowhere, as the analyzer has it."""
    mask = ~causal(9)
    mask[:, 6:] = False
    calls = []
    for call in deep:
        weights = call.weights * mask * torch.rand(1, call.weights.shape[1], 9, 1)
        calls.append(replace(call, fields={**call.fields, "weights": weights, "mask": mask[None, None]}))
    made = replace(deep, calls=calls)
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'flow'}}")
    for query in (8, 5, 2):
        values = asked(page, query, "rollout")
        assert values == pytest.approx(rollout(made)[-1, 0, query].tolist(), rel=2e-6, abs=1e-9)
    assert asked(page, 7, "rollout")[7] == 1


PATHS = """() => [...document.querySelector('#viewer').shadowRoot.querySelectorAll('path.path')].map(p =>
  [...p.getAttribute('d').match(/[\\d.]+/g).map(Number), +p.dataset.value])"""


@pytest.mark.parametrize("through", ["rollout", "flow"])
def test_the_paths_of_a_pair(open_page: Open, deep: hookattn.Trace, deep_file: Path, through: str) -> None:
    options = f"{{state: {{view: 'flow', through: '{through}', query: 7, key: 2}}}}"
    page = show(open_page(), deep_file, options)
    page.locator("path.path").first.wait_for(state="attached")
    drawn = page.evaluate(PATHS)
    layers = mixed(deep, 0)
    total = cut(layers, 7, 2) if through == "flow" else float((layers[3] @ layers[2] @ layers[1] @ layers[0])[7, 2])
    levels = sorted({line[0] for line in drawn}, reverse=True)
    assert len(levels) == 4
    top, row = min(line[1] for line in drawn), 20
    for level in levels:  # what is not drawn is below 0.2 % a line
        carried = sum(line[4] for line in drawn if line[0] == level)
        assert 0.9 * total < carried <= total * (1 + 1e-6)
    if through == "rollout":
        above = layers[3][7].clone()
        last = {round((line[3] - top) / row): line[4] for line in drawn if line[0] == levels[0]}
        reach = (layers[2] @ layers[1] @ layers[0])[:, 2]
        first = min(last)
        offset = int((above * reach > 0.002 * total).nonzero()[0]) - first
        wanted = {i: float(above[i] * reach[i]) for i in range(9) if above[i] * reach[i] >= 0.002 * total}
        assert {i + offset: v for i, v in last.items()} == pytest.approx(wanted, rel=1e-5)
    assert "2 “cat”" in page.locator(".readout").first.inner_text()
    said = page.locator(".readout").first.inner_text().replace("−", "-")
    assert any(float(x) == pytest.approx(total, abs=2e-7) for x in said.replace(",", "").split() if x[:2] == "0.")


def test_tokens_are_chosen_by_pointer_and_keys(open_page: Open, deep_file: Path) -> None:
    page = show(open_page(), deep_file, "{state: {view: 'flow'}}")
    page.locator("[data-view=flow] svg").wait_for()
    page.locator("[data-view=flow] text", has_text="↵").last.click()
    page.wait_for_function("viewer.state.query === 6")
    page.locator("[data-view=flow] text", has_text="cat").first.click()
    page.wait_for_function("viewer.state.key === 2")
    page.mouse.move(5, 5)
    for key in ["ArrowUp", "ArrowRight"]:
        page.keyboard.press(key)
    assert (state(page)["query"], state(page)["key"]) == (5, 3)
    page.get_by_role("button", name="maximum flow").click()
    page.locator(".as-table summary", has_text="maximum flow").wait_for()
    assert state(page)["through"] == "flow"
    again = show(open_page(), deep_file, fragment=page.evaluate("'#' + JSON.stringify(viewer.state)"))
    again.locator(".as-table summary", has_text="maximum flow").wait_for()


def test_hover_tells_what_a_token_is_made_of(open_page: Open, deep: hookattn.Trace, deep_file: Path) -> None:
    page = show(open_page(), deep_file, "{state: {view: 'flow', query: 8}}")
    page.locator("path.path").first.wait_for(state="attached")
    circle = page.locator("[data-view=flow] circle")
    found = circle.evaluate_all("all => all.map(c => [+c.getAttribute('cx'), +c.getAttribute('cy')])")
    level = sorted({x for x, _ in found})[2]
    box = page.locator("[data-view=flow] svg").bounding_box()
    x, y = max(p for p in found if p[0] == level)
    page.mouse.move(box["x"] + x, box["y"] + y)
    tip = page.locator(".tip").inner_text().split("\n")
    assert tip[0].startswith("8 “") and tip[0].endswith("after layer 1")
    layers = mixed(deep, 0)
    assert float(tip[1].split(": ")[1]) == pytest.approx(float((layers[3] @ layers[2])[8, 8]), rel=1e-5)
    best = layers[1][8].topk(3)
    assert [int(line.split()[1]) for line in tip[3:]] == best.indices.tolist()
    assert [float(line.split()[0]) for line in tip[3:]] == pytest.approx(best.values.tolist(), rel=1e-3)


def refused(page: Any) -> str:
    page.locator("[data-view=flow] .notice").wait_for()
    assert page.locator("[data-view=flow] svg").count() == 0
    return str(page.locator("[data-view=flow]").inner_text())


def test_what_it_is_not_defined_for_says_why(open_page: Open, deep: hookattn.Trace, tmp_path: Path) -> None:
    model, x, y = Layers(2, 2).eval(), torch.randn(1, 5, 24), torch.randn(1, 7, 24)

    def opened(made: hookattn.Trace, options: str = "{state: {view: 'flow'}}") -> Any:
        return show(open_page(), Path(made.save(tmp_path / "t.safetensors")), options)

    crossed = hookattn.trace(model, (x, y))
    crossed = replace(crossed, calls=[replace(c, site=replace(c.site, kind="cross")) for c in crossed])
    assert "it is cross-attention" in refused(opened(crossed))
    assert "query rows were left out" in refused(opened(hookattn.trace(model, (x,), queries=slice(0, 1))))
    with hookattn.tracing(model) as made:
        model(y, y)
        model(x, torch.cat([y, x], 1))
    made = replace(made, calls=[replace(c, site=replace(c.site, kind="self")) for c in made])
    told = refused(opened(made, "{state: {view: 'flow', step: 1}}"))
    assert "it has 5 queries and 12 keys" in told and "step 0" in told
    other = hookattn.trace(model, (torch.randn(2, 9, 24),))[0]
    longer = replace(deep, calls=[replace(deep[0], fields=dict(other.fields)), hookattn.trace(model, (x,))[1]])
    assert "1 × 5 tokens" in refused(opened(longer))
    bare = hookattn.trace(model, (x,), capture=("q",))
    assert 'capture=("weights", …)' in opened(bare).get_by_role("alert").inner_text()


def test_weights_that_are_not_finite_are_told(open_page: Open, deep: hookattn.Trace, tmp_path: Path) -> None:
    weights = deep[1].weights.clone()
    weights[0, 0, 3, 1] = torch.nan
    calls = [deep[0], replace(deep[1], fields={**deep[1].fields, "weights": weights})]
    path = Path(replace(deep, calls=calls).save(tmp_path / "t.safetensors"))
    page = show(open_page(), path, "{state: {view: 'flow', through: 'flow'}}")
    page.get_by_role("alert").wait_for()
    assert "not finite" in page.get_by_role("alert").inner_text()


@pytest.mark.parametrize("width", [400, 3840])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_is_exported(open_page: Open, deep_file: Path, width: int, theme: str) -> None:
    options = f"{{theme: '{theme}', state: {{view: 'flow', key: 2}}}}"
    page = show(open_page(viewport={"width": width, "height": 900}), deep_file, options)
    page.locator("path.path").first.wait_for(state="attached")
    assert_fits(page)
    svg = page.evaluate("viewer.svg()")
    assert "<path" in svg and "שלום" in svg and "var(--" not in svg


def test_a_step_of_a_generation_leads_to_one_that_flows(open_page: Open, tmp_path: Path) -> None:
    model, x, y = Layers(2).eval(), torch.randn(1, 3, 24), torch.randn(1, 6, 24)
    with hookattn.tracing(model) as made:
        model(y, y)
        model(x, torch.cat([y, x], 1))
    made = replace(made, calls=[replace(c, site=replace(c.site, kind="self")) for c in made])
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'flow', step: 1}}")
    page.get_by_role("button", name="Show step 0").click()
    page.locator("[data-view=flow] svg path").first.wait_for(state="attached")
    assert state(page)["step"] == 0


def test_derived_weights_are_summed_as_stored_ones_are(open_page: Open, tmp_path: Path) -> None:
    """Of q and k with fewer key heads, a causal mask and a width that is no multiple of four."""
    q, k = torch.randn(1, 6, 9, 5), torch.randn(1, 2, 9, 5)

    class Grouped(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    made = hookattn.trace(Grouped(), q)
    path = Path(made.save(tmp_path / "t.safetensors", compact=True))
    page = show(open_page(), path, "{state: {view: 'flow'}}")
    page.locator(".as-table summary", has_text="rollout").wait_for()
    assert shown(page, 9) == pytest.approx(rollout(made)[-1, 0, 8].tolist(), rel=2e-6, abs=1e-9)
