"""How what is chosen is drawn: what is masked, where colours end, names, sinks, and the menu that all views share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.demo import induction
from hookattn.render import palette
from tests.browser.conftest import HATCHED, Layers, causal, cells, serve, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[hookattn.Trace, Path]:
    ids = induction.example_tokens()
    with torch.no_grad():
        made = hookattn.trace(induction.load_pretrained(), ids, tokens=[[str(i) for i in row] for row in ids.tolist()])
    return made, Path(made.save(tmp_path_factory.mktemp("demo") / "t.safetensors"))


def many(n: int, *heads: int) -> hookattn.Trace:
    x = 0.3 * torch.randn(1, n, 24, generator=torch.Generator().manual_seed(1))
    return hookattn.trace(Layers(*heads).eval(), (x, None, causal(n)), tokens=[f"word{i}" for i in range(n)])


def saved(trace: hookattn.Trace, folder: Path) -> Path:
    return Path(trace.save(folder / "t.safetensors"))


def menu(page: Any, *names: str) -> None:
    page.get_by_role("button", name=re.compile("^Display")).click()
    for name in names:
        page.locator(".popover").get_by_role("button", name=name, exact=True).click()
    page.keyboard.press("Escape")


# ------------------------------------------------------------------------------------------------- what is masked


def test_a_masked_score_is_nothing_that_stands_out(open_page: Open, demo: tuple[hookattn.Trace, Path]) -> None:
    trace, path = demo
    scores, mask = trace[1].scores[0, 2], trace[1].mask.expand_as(trace[1].scores)[0, 2]
    page = show(open_page(), path, "{state: {view: 'matrix', layer: 1, heads: [2], field: 'scores'}}")
    assert not mask.flatten()[scores.argmax()]  # the largest of all is one that nothing may look at
    best = int(scores.masked_fill(~mask, -torch.inf).argmax())
    pairs = cells(page)
    assert [int(name.split()[0]) for name in pairs[0][:2]] == [best // 49, best % 49]
    assert all(mask[int(q.split()[0]), int(k.split()[0])] for q, k, _ in pairs)
    page.evaluate("viewer.set({query: 1, key: 26})")
    page.wait_for_function("viewer.state.key === 26")
    page.locator(".as-table summary", has_text="masked").wait_for()
    assert [row[2] for row in cells(page)] == ["masked"]


@pytest.mark.parametrize("field", ["weights", "scores", "mask"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_masked_is_hatched(open_page: Open, file: Path, field: str, theme: str) -> None:
    options = f"{{theme: '{theme}', state: {{view: 'matrix', heads: [1], field: '{field}'}}}}"
    page = show(open_page(), file, options)
    page.locator(".plane canvas").wait_for()
    at = [(t, s) for t in range(9) for s in range(9)]
    hatched = {(t, s) for t, s in at if page.evaluate(HATCHED, [".plane canvas", t, s, 9, 9])}
    assert hatched == {(t, s) for t, s in at if s > t}
    assert "hatched: masked" in page.locator(".foot svg").first.get_attribute("aria-label")
    page.evaluate("viewer.set({view: 'model'})")
    page.locator(".tile canvas").first.wait_for()
    page.wait_for_timeout(300)
    hatched = {(t, s) for t, s in at if page.evaluate(HATCHED, [".tile canvas", t, s, 9, 9])}
    assert hatched == {(t, s) for t, s in at if s > t}


def test_what_is_masked_in_one_of_two_traces(open_page: Open, tmp_path: Path) -> None:
    model, x = Layers(2).eval(), torch.randn(1, 9, 24)
    one, two = (
        Path(hookattn.trace(model, (x, None, m)).save(tmp_path / n)) for n, m in (("a", causal(9)), ("b", None))
    )
    page = open_page()
    serve(page, {"two.safetensors": two})
    show(page, one, "{state: {view: 'compare', heads: [0]}, compare: await served('/two.safetensors')}")
    page.locator("[data-side=difference] canvas").wait_for()
    box = page.locator("[data-side=difference] canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 7.5 / 9, box["y"] + box["height"] * 1.5 / 9)
    said = page.locator(".tip").filter(has_text="B − A").inner_text().split("\n")
    other = hookattn.load(two)[0].weights[0, 0, 1, 7].item()
    assert said[0].endswith("masked")
    assert float(said[2].split()[-1]) == pytest.approx(other, rel=1e-6)


def test_masked_keys_of_a_query_are_hatched_in_neurons(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{state: {view: 'neuron', heads: [1], query: 4}}")
    page.locator("[data-view=neuron] svg").first.wait_for()
    fills = page.locator("[data-view=neuron] svg rect").evaluate_all("all => all.map(r => r.getAttribute('fill'))")
    assert fills.count("url(#hatching)") == 2 * 4  # in the columns of the mask and of the weight


# ---------------------------------------------------------------------------------------------- where colours end

LIGHTNESS = """() => { const c = document.querySelector('#viewer').shadowRoot.querySelector('.plane canvas');
  const {data, width, height} = c.getContext('2d').getImageData(0, 0, c.width, c.height);
  const out = []; for (const [x, y] of [[.1, .9], [.5, .9], [.3, .6], [.8, .95]]) {
    const i = 4 * (Math.floor(y * height) * width + Math.floor(x * width)); out.push(data[i]); } return out; }"""


@pytest.mark.parametrize("n", [128, 300])
def test_a_diffuse_head_is_not_blank(open_page: Open, tmp_path: Path, n: int) -> None:
    page = show(open_page(), saved(many(n, 2), tmp_path), "{theme: 'light', state: {view: 'matrix', heads: [0]}}")
    page.locator(".plane canvas").wait_for()
    page.wait_for_timeout(200)
    assert max(page.evaluate(LIGHTNESS)) < 245  # with the 1 of the first row as the end: 254 and more
    legend = page.locator(".foot svg").first
    assert "≥ 0.0" in legend.text_content() and "and above" in legend.get_attribute("aria-label")
    page.evaluate("viewer.set({scale: 'log'})")
    page.wait_for_function(
        "!document.querySelector('#viewer').shadowRoot.querySelector('.foot svg').textContent.includes('≥')"
    )


# --------------------------------------------------------------------------------------------------- names, room


def test_names_of_49_tokens_are_legible(open_page: Open, demo: tuple[hookattn.Trace, Path]) -> None:
    page = show(open_page(viewport={"width": 1440, "height": 900}), demo[1], "{state: {view: 'matrix', heads: [2]}}")
    page.locator(".plane canvas").wait_for()
    names = [str(i) for i in induction.example_tokens()[0].tolist()]
    groups = page.locator(".plane svg > g").evaluate_all(
        "all => all.map(g => [...g.querySelectorAll('text')].map(t => t.textContent))"
    )
    assert groups[:2] == [names, names]
    texts = ".plane svg > g text"
    assert min(page.locator(texts).evaluate_all("all => all.map(t => parseFloat(getComputedStyle(t).fontSize))")) >= 11
    for g, side in ((1, "y"), (2, "x")):
        boxes = page.locator(f".plane svg > g:nth-of-type({g}) text").evaluate_all(
            "all => all.map(t => t.getBoundingClientRect()).map(b => ({x: b.x + b.width / 2, y: b.y + b.height / 2}))"
        )
        at = sorted(b[side] for b in boxes)
        assert min(b - a for a, b in itertools.pairwise(at)) >= 11


def test_names_are_thinned_before_they_are_numbers(open_page: Open, tmp_path: Path) -> None:
    page = show(open_page(), saved(many(120, 1), tmp_path), "{state: {view: 'matrix'}}")
    page.locator(".plane canvas").wait_for()
    names = page.locator(".plane svg > g").first.locator("text").all_text_contents()
    assert 20 < len(names) <= 60 and set(names) <= {f"word{i}" for i in range(120)}


@pytest.mark.parametrize("width", [400, 1280])
def test_controls_stay_in_view(open_page: Open, demo: tuple[hookattn.Trace, Path], width: int) -> None:
    page = show(open_page(viewport={"width": width, "height": 800}), demo[1], "{link: true, state: {view: 'head'}}")
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    page.mouse.wheel(0, 600)
    page.wait_for_function("scrollY > 300")
    for name in ("Matrix", "Heads"):
        box = page.get_by_role("tab", name=name).bounding_box()
        assert 0 <= box["y"] < 60
    menu_box = page.get_by_role("button", name="Display").bounding_box()
    assert 0 <= menu_box["y"] < 800 * 0.36
    assert page.locator(".bar").evaluate("b => b.getBoundingClientRect().height") <= 800 * 0.36


def test_lines_have_room_in_a_narrow_window(open_page: Open, tmp_path: Path) -> None:
    page = open_page(viewport={"width": 400, "height": 800})
    show(page, saved(many(20, 12), tmp_path), "{state: {view: 'head'}}")
    path = page.locator("[data-view=head] path").first
    path.wait_for(state="attached")
    left, right = re.match(r"M([\d.]+) .* ([\d.]+) [\d.]+$", path.get_attribute("d")).groups()
    assert float(right) - float(left) >= 150
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_log_scale_of_many_lines_is_no_solid_block(open_page: Open, tmp_path: Path) -> None:
    page = show(open_page(), saved(many(64, 4), tmp_path), "{state: {view: 'head', scale: 'log'}}")
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    found = page.locator("[data-view=head] path").evaluate_all(
        "all => all.map(p => Number(p.getAttribute('stroke-opacity')))"
    )
    assert len(found) > 1000 and sum(found) / len(found) < 0.15
    page.evaluate("viewer.set({query: 40})")
    page.wait_for_function(
        "document.querySelector('#viewer').shadowRoot.querySelectorAll('[data-view=head] path').length < 400"
    )
    one = page.locator("[data-view=head] path").evaluate_all(
        "all => all.map(p => Number(p.getAttribute('stroke-opacity')))"
    )
    assert max(one) > 0.2


# -------------------------------------------------------------------------------------------------------- sinks


@pytest.fixture
def sunk(tmp_path: Path) -> tuple[hookattn.Trace, Path]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=32, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    model.model.layers[0].self_attn.sinks.data.fill_(1.0)
    made = hookattn.trace(model, {"input_ids": torch.arange(8)[None]}, tokens=list("abcdefgh"))
    return made, saved(made, tmp_path)


def test_a_sink_is_a_column_of_its_own(open_page: Open, sunk: tuple[hookattn.Trace, Path]) -> None:
    trace, path = sunk
    page = show(open_page(), path, "{state: {view: 'matrix', heads: [1], query: 5}}")
    canvas = page.locator(".plane canvas")
    canvas.wait_for()
    rest = 1 - trace[0].weights[0, 1].double().sum(-1)
    assert page.locator(".plane svg > g").nth(1).locator("text").all_text_contents() == [*"abcdefgh", "sink"]
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 8.5 / 9, box["y"] + box["height"] * 3.5 / 8)
    said = page.locator(".tip").inner_text()
    assert "key the sink" in said
    assert float(re.search(r"weights ([\d.]+)", said)[1]) == pytest.approx(rest[3].item(), abs=1e-6)
    assert {k: float(w) for _, k, w in cells(page)}["the sink"] == pytest.approx(rest[5].item(), abs=1e-6)
    page.mouse.click(box["x"] + box["width"] * 8.5 / 9, box["y"] + box["height"] * 3.5 / 8)
    page.wait_for_function("viewer.state.query === 3")
    assert state(page)["key"] is None
    page.evaluate("viewer.set({sink: 'renormalise', query: null})")
    page.wait_for_timeout(300)
    page.mouse.move(box["x"] + box["width"] * 8.4 / 9, box["y"] + box["height"] * 3.5 / 8)
    assert "left out" in page.locator(".tip").inner_text() or "sink" in page.locator(".tip").inner_text()


def test_a_sink_is_a_row_of_heads(open_page: Open, sunk: tuple[hookattn.Trace, Path]) -> None:
    trace, path = sunk
    page = show(open_page(), path, "{state: {view: 'head', heads: [1], query: 5}}")
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    assert "sink" in page.locator("[data-view=head] text").all_text_contents()
    found = page.locator("[data-view=head] path").evaluate_all("all => all.map(p => Number(p.dataset.value))")
    assert sum(found) == pytest.approx(1, abs=1e-5)
    assert max(found) == pytest.approx(1 - trace[0].weights[0, 1, 5].double().sum().item(), abs=1e-5)


def test_a_field_without_a_sink_has_no_column(open_page: Open, sunk: tuple[hookattn.Trace, Path]) -> None:
    page = show(open_page(), sunk[1], "{state: {view: 'matrix', heads: [1], field: 'scores'}}")
    page.locator(".plane canvas").wait_for()
    assert page.locator(".plane svg > g").nth(1).locator("text").all_text_contents() == list("abcdefgh")


# ----------------------------------------------------------------------------------------- the menu, over heads


def test_the_menu_by_keyboard(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{state: {view: 'matrix', heads: [1], query: 3}}")
    button = page.get_by_role("button", name="Display")
    button.focus()
    assert button.get_attribute("aria-expanded") == "false"
    page.keyboard.press("Enter")
    # The button says it, and the focus is in the menu, once the browser has told that it is open.
    page.locator("button[aria-expanded=true]", has_text="Display").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("viewer.state.over === 'mean'")
    page.keyboard.press("Escape")
    page.locator(".popover").wait_for(state="hidden")
    assert state(page)["query"] == 3  # Escape closed the menu and nothing else
    assert "mean" in button.inner_text()
    page.keyboard.press("Enter")
    page.locator(".popover").wait_for()


@pytest.mark.parametrize("view", ["overview", "head", "matrix", "image", "model", "compare"])
def test_the_menu_is_the_same_in_all_views(open_page: Open, tmp_path: Path, view: str) -> None:
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 17, 24),))
    path = saved(made, tmp_path)
    images = "images: {urls: [], grid: [4, 4], prefix: 1}"
    page = open_page()
    serve(page, {"two.safetensors": path})
    show(page, path, f"{{{images}, state: {{view: '{view}'}}, compare: await served('/two.safetensors')}}")
    assert state(page)["view"] == view
    page.get_by_role("button", name="Display").click()
    groups = page.locator(".popover [role=group]").evaluate_all("all => all.map(g => g.ariaLabel)")
    assert {"Scale", "First key"} <= set(groups) <= {"Heads", "Scale", "First key", "Pooled", "Thumbnails"}
    assert ("Heads" in groups) == (view in ("overview", "head", "matrix", "image"))
    box = page.locator(".popover").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280


@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("field", ["weights", "scores"])
def test_a_matrix_over_heads(open_page: Open, file: Path, trace: hookattn.Trace, over: str, field: str) -> None:
    page = show(open_page(), file, f"{{state: {{view: 'matrix', heads: [0, 3, 2], query: 7, field: '{field}'}}}}")
    menu(page, over)
    page.wait_for_function(f"viewer.state.over === '{over}'")
    of = "mean of heads 0, 2, 3" if over == "mean" else "largest of heads 0, 2, 3"
    page.locator(".as-table summary", has_text=of[1:]).wait_for()
    values = trace[0].get(field)[0, [0, 2, 3], 7].double()
    expected = values.mean(0) if over == "mean" else values.max(0).values
    found = {int(k.split()[0]): float(w.replace("−", "-")) for _, k, w in cells(page)}
    assert found == pytest.approx({s: expected[s].item() for s in range(8)}, rel=1e-6)  # the last is masked
    assert of in page.locator(".foot svg").first.get_attribute("aria-label")
    assert page.evaluate(HATCHED, [".plane canvas", 2, 6, 9, 9])
    assert of in page.evaluate("viewer.svg()")


def test_over_all_heads_where_one_is_chosen(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    page = show(open_page(), file, "{state: {view: 'head', heads: [1], over: 'mean', query: 6}}")
    page.locator("[data-view=head] path").first.wait_for(state="attached")
    found = page.locator("[data-view=head] path").evaluate_all("all => all.map(p => Number(p.dataset.value))")
    expected = trace[0].weights[0, :, 6].double().mean(0)
    assert sorted(found) == pytest.approx(sorted(x for x in expected.tolist() if x > 1e-4), rel=1e-5)
    assert "mean of all 4 heads" in page.locator("[data-view=head] svg").first.get_attribute("aria-label")


def test_a_picture_over_heads(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(3).eval(), (torch.randn(1, 17, 24),))
    options = "{images: {urls: [], grid: [4, 4], prefix: 1}, state: {view: 'image', over: 'max', query: 5}}"
    page = show(open_page(), saved(made, tmp_path), options)
    page.locator(".panel[data-head]").first.wait_for()
    assert page.locator(".panel[data-head]").count() == 1
    assert "largest of all 3 heads" in page.locator(".panel[data-head] .label").first.inner_text()
    expected = made[0].weights[0, :, 5].max(0).values.sort(descending=True).values
    assert [float(row[2]) for row in cells(page)][:5] == pytest.approx(expected[:5].tolist(), rel=1e-6)


def test_thumbnails_of_lines(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{theme: 'light', state: {view: 'model'}}")
    menu(page, "lines")
    page.wait_for_function("viewer.state.thumbs === 'lines'")
    page.wait_for_timeout(300)
    seen = """i => { const c = document.querySelector('#viewer').shadowRoot.querySelectorAll('.tile canvas')[i];
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const all = new Map();
      for (let p = 0; p < d.length; p += 4) if (d[p + 3] > 250) {
        const k = [d[p], d[p + 1], d[p + 2]].map(x => x.toString(16).padStart(2, '0')).join('');
        all.set(k, (all.get(k) ?? 0) + 1); }
      return [...all].sort((a, b) => b[1] - a[1])[0]?.[0]; }"""
    assert [f"#{page.evaluate(seen, i)}" for i in range(4)] == list(palette.HEADS[:4])


# ---------------------------------------------------------------------------------- what is shared with figures


def test_the_viewer_has_the_colours_of_the_figures(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{theme: 'light', state: {view: 'head', heads: [2]}}")
    path = page.locator("[data-view=head] path").first
    path.wait_for(state="attached")
    root = "getComputedStyle(document.querySelector('#viewer').shadowRoot.querySelector('.ha'))"
    found = [page.evaluate(f"{root}.getPropertyValue('--h{i}')").strip() for i in range(8)]
    assert tuple(found) == palette.HEADS
    assert page.evaluate(f"{root}.getPropertyValue('--masked')").strip() == palette.MASKED
    x1, c1, c2, x2 = map(
        float, re.match(r"M([\d.]+) \S+C([\d.]+) \S+ ([\d.]+) \S+ ([\d.]+)", path.get_attribute("d")).groups()
    )
    assert [(c1 - x1) / (x2 - x1), (x2 - c2) / (x2 - x1)] == pytest.approx([palette.LINE["bend"]] * 2)
