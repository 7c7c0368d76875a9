"""The overview, which opens: what heads do, one head, one of its weights and why, and the text, all linked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import render
from hookattn.calls.trace_data import Skipped
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.render.options import viewer_options
from tests import tiny_models as tiny
from tests.browser.conftest import Layers, causal, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

PAIR = "[CLS] the cat sat on the mat . [SEP] the cat lay on the rug . [SEP]".split()
VIEW = "[data-view=overview]"
WIDTHS = (400, 768, 1440, 3840)
DONE = "viewer.findings.total > 0 && viewer.findings.done === viewer.findings.total"

GEOMETRY = """() => {
  const root = document.getElementById("viewer").shadowRoot;
  const part = (name) => root.querySelector(`.overview .${name}`)?.getBoundingClientRect();
  const parts = ["said", "atlas", "chosen", "asked"].map((n) => [n, part(n)]).filter(([, b]) => b);
  const wrong = [];
  for (const [n, b] of parts) {
    if (b.left < -1 || b.right > innerWidth + 1) wrong.push(`${n} leaves the window`);
    for (const [m, c] of parts)
      if (n < m && b.left < c.right - 1 && c.left < b.right - 1 && b.top < c.bottom - 1 && c.top < b.bottom - 1)
        wrong.push(`${n} and ${m} overlap`);
  }
  // Texts are not cut: nothing is wider than what holds it, but the lines of tokens, which scroll.
  for (const e of root.querySelectorAll(".overview p, .overview button, .overview h2, .overview h3, .overview .tok"))
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).display !== "inline")
      wrong.push(`cut: ${e.className} ${e.textContent.slice(0, 40)}`);
  const seen = [...root.querySelectorAll(".overview .tok")].map((e) => e.getBoundingClientRect());
  for (let i = 1; i < seen.length; i++)
    if (Math.abs(seen[i].top - seen[i - 1].top) < 4 && seen[i].left < seen[i - 1].right - 0.5) wrong.push(`token ${i}`);
  for (const e of root.querySelectorAll(".overview *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (own && parseFloat(getComputedStyle(e).fontSize) < 11) wrong.push(`small: ${e.textContent.slice(0, 20)}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) wrong.push("the page scrolls sideways");
  return wrong; }"""


def opened(page: Any, made: hookattn.Trace, tmp_path: Path, options: str = "{link: true}") -> Any:
    """The viewer on a trace, in the view that it opens by itself, when all heads are measured."""
    show(page, Path(made.save(tmp_path / "t.safetensors")), options, view=None)
    page.wait_for_function(f"{DONE} || viewer.findings.missing !== null", timeout=30_000)
    page.locator(f"{VIEW} .chosen :is(canvas, .notice)").first.wait_for()
    page.wait_for_timeout(1000)
    return page


def sentence(page: Any) -> str:
    return str(page.locator(f"{VIEW} .chosen .sentence").inner_text())


def bars(page: Any) -> list[tuple[str, str]]:
    rows = page.locator(f"{VIEW} .bars button").evaluate_all(
        "rows => rows.map(r => [r.querySelector('.who').textContent, r.querySelector('.much').textContent])"
    )
    return [(str(who), str(much)) for who, much in rows]


def shades(page: Any, line: int = 0) -> dict[int, float]:
    """The weight that each token of a line is shaded by."""
    found = (
        page.locator(f"{VIEW} .line")
        .nth(line)
        .locator(".tok")
        .evaluate_all(
            "all => all.filter(e => Number(e.dataset.weight)).map(e => [Number(e.dataset.i), Number(e.dataset.weight)])"
        )
    )
    return {int(i): float(w) for i, w in found}


@pytest.fixture(scope="module")
def induction() -> hookattn.Trace:
    """The demo's: two layers that have learned to copy."""
    ids = example_tokens(0, length=24)
    return hookattn.trace(load_pretrained(), ids, tokens=[[str(i) for i in ids[0].tolist()]])


def test_the_first_screen_tells_of_induction_and_why(
    open_page: Open, induction: hookattn.Trace, tmp_path: Path
) -> None:
    page = opened(open_page(viewport={"width": 1440, "height": 900}), induction, tmp_path)
    assert state(page)["view"] == "overview"
    assert "induction heads" in page.locator("[data-summary]").inner_text()
    told = sentence(page)
    assert re.search(r"L1H\d · .*induction.* · from the 2nd “\d+” it looks at what followed the 1st “\d+”", told), told
    why = page.locator(f"{VIEW} .why p")
    assert "its score of" in why.inner_text()
    for part in (page.locator(f"{VIEW} .chosen canvas"), why, page.locator(f"{VIEW} .bars")):
        box = part.bounding_box()
        assert box["y"] + box["height"] <= 900
    # The bars are the weights of the trace, in two digits.
    at = page.evaluate("viewer.findings.striking")
    pair = page.evaluate(
        "viewer.findings.heads[viewer.findings.striking.call][viewer.findings.striking.head].roles[0].pair"
    )
    row = induction[at["call"]].weights[pair["batch"], at["head"], pair["query"]]
    top = row.topk(5)
    assert bars(page)[0] == (f"{top.indices[0]} “{induction.tokens[0][int(top.indices[0])]}”", f"{top.values[0]:.2f}")
    assert len(bars(page)) == 5


def test_squares_have_the_roles_that_were_found(open_page: Open, induction: hookattn.Trace, tmp_path: Path) -> None:
    page = opened(open_page(), induction, tmp_path)
    found = page.evaluate("viewer.findings.heads.map(c => c.map(h => h.roles[0]?.role ?? ''))")
    drawn = page.locator(f"{VIEW} .atlas .head").evaluate_all("all => all.map(e => [e.dataset.head, e.dataset.role])")
    assert dict(drawn) == {f"{layer}.{head}": role for layer, row in enumerate(found) for head, role in enumerate(row)}
    counts = {role: sum(role == r for row in found for r in row) for row in found for role in row if role}
    button = page.locator(f"{VIEW} .roles button", has_text="induction")
    assert button.inner_text().split() == ["induction", str(counts["induction"])]
    button.click()
    left = page.locator(f"{VIEW} .atlas .head").evaluate_all("all => all.map(e => e.dataset.role).filter(Boolean)")
    assert left == ["induction"] * counts["induction"]
    assert state(page)["role"] == "induction"


def test_what_is_not_measured_yet_looks_pending(open_page: Open, induction: hookattn.Trace, tmp_path: Path) -> None:
    page = open_page()
    page.add_init_script("globalThis.Worker = class { postMessage() {} terminate() {} addEventListener() {} }")
    show(page, Path(induction.save(tmp_path / "t.safetensors")), view=None)
    page.locator(f"{VIEW} .chosen canvas").wait_for()
    drawn = page.locator(f"{VIEW} .atlas .head")
    assert drawn.count() == 8
    assert drawn.evaluate_all("all => all.filter(e => e.dataset.pending === 'true').length") == 8
    assert drawn.first.evaluate("e => e.previousElementSibling.getAttribute('stroke-dasharray')") == "2 2"


def test_it_follows_what_is_found_until_the_reader_chooses(
    open_page: Open, induction: hookattn.Trace, tmp_path: Path
) -> None:
    page = opened(open_page(), induction, tmp_path)
    striking = page.evaluate("viewer.findings.striking")
    assert [state(page)["layer"], state(page)["heads"]] == [striking["call"], [striking["head"]]]
    page.locator(f"{VIEW} .head[data-head='0.3']").click()
    page.wait_for_timeout(900)
    assert [state(page)["layer"], state(page)["heads"]] == [0, [3]]
    given = opened(open_page(), induction, tmp_path, "{state: {layer: 0, heads: [2]}}")
    assert [state(given)["layer"], state(given)["heads"]] == [0, [2]]


def test_the_keys_move_among_heads_and_along_the_text(
    open_page: Open, induction: hookattn.Trace, tmp_path: Path
) -> None:
    page = opened(open_page(), induction, tmp_path)
    page.locator(f"{VIEW} .head[data-head='0.0']").click()
    assert page.locator(f"{VIEW} .head[tabindex='0']").count() == 1
    page.locator(f"{VIEW} .head[tabindex='0']").focus()
    for key, head in (("ArrowRight", (0, 1)), ("ArrowDown", (1, 1)), ("ArrowLeft", (1, 0)), ("ArrowUp", (0, 0))):
        page.keyboard.press(key)
        assert (state(page)["layer"], state(page)["heads"]) == (head[0], [head[1]])
        assert (
            page.evaluate("viewer, document.activeElement.shadowRoot.activeElement.dataset.head")
            == f"{head[0]}.{head[1]}"
        )
    page.locator(f"{VIEW} .tok[tabindex='0']").focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(100)
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    focused = "document.activeElement.shadowRoot.activeElement"
    assert page.evaluate(f"{focused}.dataset.i") == "1"
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert state(page)["query"] == 1


@pytest.mark.parametrize("shift", [False, True])
def test_hovering_shades_the_weights(open_page: Open, induction: hookattn.Trace, tmp_path: Path, shift: bool) -> None:
    page = opened(open_page(), induction, tmp_path, "{state: {layer: 0, heads: [3]}}")
    page.locator(f"{VIEW} .tok").nth(20).hover()
    if shift:
        page.keyboard.down("Shift")
    page.wait_for_timeout(100)
    weights = induction[0].weights[0, 3]
    wanted = (weights[:, 20] if shift else weights[20]).tolist()
    found = shades(page)
    assert {i for i, w in enumerate(wanted) if w > 1e-4} <= set(found)
    assert all(abs(w - wanted[i]) < 1e-5 for i, w in found.items())
    page.keyboard.up("Shift")
    page.locator(f"{VIEW} .tok").nth(20).click(modifiers=["Shift"] if shift else [])
    assert (state(page)["query"], state(page)["key"]) == ((None, 20) if shift else (20, None))


def test_hovering_renders_nothing_anew_and_is_fast(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(4, 4).eval(), (torch.randn(1, 300, 24), None, causal(300)))
    page = opened(open_page(), made, tmp_path)
    times = page.evaluate(
        """async () => {
      const root = document.getElementById("viewer").shadowRoot, out = [], changed = [];
      const watch = new MutationObserver((all) => changed.push(...all.map((m) => m.target)));
      watch.observe(root.querySelector(".atlas"), {subtree: true, childList: true, attributes: true});
      watch.observe(root.querySelector(".asked"), {subtree: true, childList: true, attributes: true});
      for (const e of [...root.querySelectorAll(".tok")].slice(3, 23)) {
        const t = performance.now();
        e.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, composed: true}));
        await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
        out.push(performance.now() - t);
      }
      return {times: out.sort((a, b) => a - b), changed: changed.length}; }"""
    )
    assert times["changed"] == 0
    assert times["times"][10] < 50


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("of", ["induction", "encoder", "ragged", "generation", "cross", "image", "plain"])
def test_nothing_overlaps_or_is_cut(open_page: Open, tmp_path: Path, of: str, width: int) -> None:
    made, options = traced(of, tmp_path)
    page = opened(open_page(viewport={"width": width, "height": 900}), made, tmp_path, options)
    assert page.evaluate(GEOMETRY) == []
    if width == 400:
        tops = [page.locator(f"{VIEW} {p}").bounding_box()["y"] for p in (".said", ".atlas", ".lines", ".bars")]
        assert of == "image" or tops == sorted(tops)


class Causal(nn.Module):
    """Heads that attend to what is like them, among those before."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """B T 8 to B H T 8."""
        rates = 1 + torch.arange(self.heads).view(-1, 1, 1)
        q, k = (torch.sin(x[:, None] * rates + at) for at in (0, 1))
        return nn.functional.scaled_dot_product_attention(2 * q, 2 * k, q, is_causal=True)


class Stack(nn.Module):
    """Layers of the given numbers of heads."""

    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Causal(h) for h in heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Of each layer."""
        return [layer(x) for layer in self.layers]


def points(n: int) -> Tensor:
    return torch.arange(n * 8.0).view(1, n, 8).sin()


def traced(of: str, tmp_path: Path) -> tuple[hookattn.Trace, str]:
    words = "the cat sat on the mat while it rain ed and the dog slept".split()
    if of == "induction":
        ids = example_tokens(0, length=24)
        return hookattn.trace(load_pretrained(), ids, tokens=[[str(i) for i in ids[0].tolist()]]), "{}"
    if of == "encoder":
        return hookattn.trace(Layers(4, 4, 4).eval(), torch.randn(1, len(PAIR), 24), tokens=PAIR), "{}"
    if of == "ragged":
        return hookattn.trace(Stack(2, 6, 3), points(9), tokens=words[:9]), "{}"
    if of == "generation":
        return generated()
    if of == "cross":
        made = hookattn.trace(Layers(4, 4).eval(), (torch.randn(1, 5, 24), torch.randn(1, 9, 24)))
        return made, "{}"
    if of == "image":
        image = pytest.importorskip("PIL.Image")
        image.new("RGB", (16, 16), (200, 90, 30)).save(tmp_path / "a.png")
        model = tiny.build("ViTModel", "ViTConfig", **tiny.SMALL, image_size=16, patch_size=4)
        made = hookattn.trace(model, {"pixel_values": torch.randn(1, 3, 16, 16)})
        images = viewer_options(images={"urls": [str(tmp_path / "a.png")], "grid": (4, 4), "prefix": 1})["images"]
        return made, f"{{images: {json.dumps(images)}}}"
    return hookattn.trace(Stack(4, 4), points(7)), "{}"


def generated() -> tuple[hookattn.Trace, str]:
    model = tiny.build("GPT2LMHeadModel", "GPT2Config", n_layer=2, n_head=4, n_embd=32, vocab_size=50, n_positions=64)
    with hookattn.tracing(model) as made:
        model.generate(torch.arange(6)[None] + 3, max_new_tokens=5, do_sample=False, pad_token_id=0)
    made.tokens = [[f"t{i}" for i in range(10)]]
    return made, "{}"


def test_a_generation_is_one_matrix(open_page: Open, tmp_path: Path) -> None:
    made, _ = generated()
    page = opened(open_page(), made, tmp_path, "{state: {layer: 1, heads: [2]}}")
    assert page.locator(f"{VIEW} .tok").count() == 10
    steps = [c for c in made if c.site.layer == 1]
    page.locator(f"{VIEW} .tok").nth(8).hover()
    page.wait_for_timeout(100)
    wanted = steps[3].weights[0, 2, 0]
    found = shades(page)
    assert set(found) <= set(range(9)) and all(abs(found[i] - float(wanted[i])) < 1e-5 for i in found)
    page.locator(f"{VIEW} .tok").nth(8).click()
    page.wait_for_timeout(500)
    assert (state(page)["step"], state(page)["query"]) == (3, 0)
    assert page.locator(f"{VIEW} .asked .sentence").inner_text().startswith("8 “t8”")
    assert page.locator(f"{VIEW} .tok").count() == 10
    # The heads stay as they were measured in the step of most queries.
    assert page.locator(f"{VIEW} .head[data-pending=true]").count() == 0


def test_cross_attention_has_a_line_of_queries_and_one_of_keys(open_page: Open, tmp_path: Path) -> None:
    made, _ = traced("cross", tmp_path)
    page = opened(open_page(), made, tmp_path, "{state: {layer: 1, heads: [0]}}")
    assert page.locator(f"{VIEW} .line .name").all_inner_texts() == ["Queries", "Keys"]
    page.locator(f"{VIEW} .line").nth(0).locator(".tok").nth(3).hover()
    page.wait_for_timeout(100)
    weights = made[1].weights[0, 0]
    assert all(abs(w - float(weights[3, s])) < 1e-5 for s, w in shades(page, 1).items()) and len(shades(page, 1)) == 9
    page.locator(f"{VIEW} .line").nth(1).locator(".tok").nth(6).hover()
    page.wait_for_timeout(100)
    assert all(abs(w - float(weights[t, 6])) < 1e-5 for t, w in shades(page, 0).items()) and len(shades(page, 0)) == 5


def test_the_sentences_of_a_pair_are_told_apart(open_page: Open, tmp_path: Path) -> None:
    made, _ = traced("encoder", tmp_path)
    page = opened(open_page(), made, tmp_path)
    assert page.locator(f"{VIEW} .letter").all_inner_texts() == ["A", "B"]
    ends = [
        page.locator(f"{VIEW} .tok.of-{part}").first.evaluate("e => getComputedStyle(e).borderBottomColor")
        for part in "AB"
    ]
    assert ends[0] != ends[1]
    assert all(who[:4] in ("A · ", "B · ") for who, _ in bars(page))


def test_an_image_stands_in_the_middle(open_page: Open, tmp_path: Path) -> None:
    made, options = traced("image", tmp_path)
    page = opened(open_page(), made, tmp_path, options)
    assert state(page)["view"] == "overview"
    assert page.locator(f"{VIEW} .chosen .panel canvas").count() == 2
    assert page.locator(f"{VIEW} .tok").count() == 0
    page.locator(f"{VIEW} .chosen .panel").first.get_by_role("button", name="class token").click()
    page.wait_for_timeout(300)
    layer, head = state(page)["layer"], state(page)["heads"][-1]
    row = made[layer].weights[0, head, 0]
    best = int(row.argmax())
    name = "class token" if best == 0 else f"row {(best - 1) // 4}, column {(best - 1) % 4}"
    assert bars(page)[0] == (name, f"{row[best]:.2f}")


def test_stacks_and_kinds_stand_below_each_other(open_page: Open, tmp_path: Path) -> None:
    model = tiny.build("T5Model", "T5Config", d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=60)
    made = hookattn.trace(model, {"input_ids": torch.arange(6)[None], "decoder_input_ids": torch.arange(4)[None]})
    page = opened(open_page(), made, tmp_path)
    assert page.locator(f"{VIEW} .head").count() == 2 * 4 * 3
    texts = page.locator(f"{VIEW} .atlas svg text").all_text_contents()
    assert [t for t in texts if " · " in t] == ["encoder · self", "decoder · self", "decoder · cross"]
    page.locator(f"{VIEW} .head").last.click()
    page.wait_for_timeout(300)
    assert (state(page)["stack"], state(page)["kind"], state(page)["layer"]) == ("decoder", "cross", 1)
    assert page.locator(f"{VIEW} .line .name").all_inner_texts() == ["Queries", "Keys"]


@pytest.mark.parametrize("heads", [[12] * 12, [64] * 80, [4] * 100])
def test_many_heads_fit(open_page: Open, tmp_path: Path, heads: list[int]) -> None:
    made = hookattn.trace(Stack(*heads), points(6))
    page = show(
        open_page(viewport={"width": 1440, "height": 900}), Path(made.save(tmp_path / "t.safetensors")), view=None
    )
    page.locator(f"{VIEW} .chosen canvas").wait_for()
    assert page.locator(f"{VIEW} .head").count() == sum(heads)
    atlas, scroll = (page.locator(f"{VIEW} .atlas {part}").bounding_box() for part in (".plane", ".scroll"))
    assert atlas["width"] <= scroll["width"] + 1 and atlas["height"] <= 700
    assert page.evaluate(GEOMETRY) == []


def test_a_long_text_is_a_window_around_the_chosen_token(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(
        Stack(1), points(4096), tokens=[f"w{i}" for i in range(4096)], capture=("q", "k", "mask", "bias", "sinks")
    )
    page = show(
        open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {query: 3000, heads: [0]}}", view=None
    )
    page.locator(f"{VIEW} .chosen canvas").wait_for(timeout=60_000)
    assert state(page)["view"] == "overview"
    drawn = page.locator(f"{VIEW} .tok")
    assert 5 < drawn.count() < 300
    box, line = (page.locator(f"{VIEW} {p}").bounding_box() for p in (".tok[data-i='3000']", ".scroller"))
    assert line["x"] <= box["x"] and box["x"] + box["width"] <= line["x"] + line["width"]
    page.locator(f"{VIEW} .tok[data-i='3000']").focus()
    page.keyboard.press("End")
    page.locator(f"{VIEW} .tok[data-i='4095']").wait_for()


def test_rows_that_are_not_read_yet_are_blank_and_not_hatched(open_page: Open, tmp_path: Path) -> None:
    """A matrix is shown while the most of it is still being derived: that is not what a mask looks like."""
    made = hookattn.trace(
        Stack(1), points(4096), tokens=[f"w{i}" for i in range(4096)], capture=("q", "k", "mask", "bias", "sinks")
    )
    page = open_page()
    # Workers hear of what comes after the first rows when they are told to.
    page.add_init_script(
        """const post = Worker.prototype.postMessage;
        const held = (globalThis.held = []);
        Worker.prototype.postMessage = function (message) {
          const { name, args } = message;
          const first = name === "derived" && args[0].mask[0] === 1 && args[0].mask[1] === 0;
          if (name === "derived" && !first && !globalThis.goes) held.push([this, message]);
          else post.call(this, message);
        };"""
    )
    show(page, Path(made.save(tmp_path / "t.safetensors")), "{state: {heads: [0], query: 3000}}", view="matrix")
    canvas = ".plane canvas"
    page.locator(canvas).wait_for(timeout=60_000)
    page.wait_for_timeout(300)
    assert len(page.evaluate("held")) > 0
    alpha = """selector => { const c = document.querySelector('#viewer').shadowRoot.querySelector(selector);
      const row = (part) => c.getContext('2d').getImageData(0, Math.floor(part * c.height), c.width, 1).data;
      return [0.01, 0.9].map((part) => Math.max(...row(part).filter((_, i) => i % 4 === 3))); }"""
    assert page.evaluate(alpha, canvas) == [255, 0]
    box = page.locator(canvas).bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 0.9 * box["height"])
    page.locator(".tip", has_text="being read").wait_for()
    page.evaluate("goes = true; for (const [worker, message] of held.splice(0)) worker.postMessage(message)")
    page.wait_for_function(f"({alpha})('{canvas}')[1] === 255", timeout=60_000)
    page.mouse.move(box["x"] + 8, box["y"] + 0.9 * box["height"])
    page.locator(".tip", has_not_text="being read").wait_for()
    assert "weights" in page.locator(".tip").inner_text()


@pytest.mark.parametrize("tiles", ["squares", "matrix", "lines"])
def test_heads_as_squares_matrices_or_lines(
    open_page: Open, induction: hookattn.Trace, tmp_path: Path, tiles: str
) -> None:
    page = opened(open_page(), induction, tmp_path)
    page.locator(f"{VIEW} .atlas").get_by_role("button", name=tiles, exact=True).click()
    page.wait_for_timeout(500)
    assert state(page)["tiles"] == tiles
    canvas = page.locator(f"{VIEW} .atlas canvas")
    assert canvas.count() == (0 if tiles == "squares" else 1)
    if tiles != "squares":
        colours = canvas.evaluate(
            "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        assert colours > 5


@pytest.mark.parametrize("side", ["a", "b", "difference"])
def test_two_traces(open_page: Open, induction: hookattn.Trace, tmp_path: Path, side: str) -> None:
    ids = example_tokens(0, length=24)
    model = load_pretrained()
    with hookattn.editing(model, hookattn.edit.zero("weights", layer=0, heads=[0, 1, 3])) as edited, torch.no_grad():
        model(ids)
    page = open_page()
    page.goto(page_of(induction, edited, side, tmp_path))
    page.locator(f"{VIEW} .chosen canvas").wait_for()
    page.wait_for_timeout(1500)
    a, b = (t[1].weights[0, 2, 40] for t in (induction, edited))
    told = bars(page)
    if side == "difference":
        far = int((b - a).abs().argmax())
        said = [f"{w:.2f}" if w >= 0.005 or w == 0 else "<0.01" for w in (float(a[far]), float(b[far]))]
        assert told[0][0].startswith(f"{far} ") and told[0][1] == " → ".join(said)
        assert "B − A" in sentence(page) and "in A" in sentence(page) and "in B" in sentence(page)
        assert page.locator(f"{VIEW} .head[data-pending=true]").count() == 0
    else:
        row = a if side == "a" else b
        assert told[0][0].split()[0] == str(int(row.argmax())) and told[0][1] == f"{row.max():.2f}"


def test_the_heads_of_the_second_trace_are_told_of_as_they_are(
    open_page: Open, induction: hookattn.Trace, tmp_path: Path
) -> None:
    """Of B where B is shown: its roles in the squares, in the line above and in the sentence."""
    ids = example_tokens(0, length=24)
    model = load_pretrained()
    with hookattn.editing(model, hookattn.edit.zero("weights", layer=0, heads=[0, 1, 3])) as edited, torch.no_grad():
        model(ids)
    drawn = {}
    for name, one, other, side in (
        ("a", induction, edited, "a"),
        ("b", induction, edited, "b"),
        ("alone", edited, induction, "a"),
    ):
        page = open_page()
        page.goto(page_of(one, other, side, tmp_path))
        page.locator(f"{VIEW} .chosen canvas").wait_for()
        page.locator(f"{VIEW} {PENDING}").first.wait_for(state="detached")
        roles = page.locator(f"{VIEW} .atlas .head").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
        drawn[name] = [
            *roles,
            page.locator(f"{VIEW} [data-summary]").inner_text(),
            sentence(page).replace(" · B", " · A"),
        ]
    assert drawn["b"] == drawn["alone"] != drawn["a"]


PENDING = ".head[data-pending=true]"


def page_of(one: hookattn.Trace, other: hookattn.Trace, side: str, tmp_path: Path) -> str:
    path = tmp_path / "page.html"
    chosen = {"side": side, "layer": 1, "heads": [2], "query": 40}
    path.write_text(render.page(one, compare=other, state=chosen), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("tokens", "tokens=…"),
        ("scores", 'capture=("scores"'),
        ("weights", 'capture=("weights"'),
        ("one", "1 token"),
        ("skipped", "skipped"),
        ("guessed", "guessed"),
    ],
)
def test_what_is_missing_is_said(open_page: Open, tmp_path: Path, what: str, says: str) -> None:
    capture = {"scores": ("weights",), "weights": ("q",)}.get(what)
    more = {} if capture is None else {"capture": capture}
    made = hookattn.trace(Stack(2, 2), points(1 if what == "one" else 5), **more)
    if what == "skipped":
        made.skipped.append(Skipped("other", "it forms no weights"))
    if what == "guessed":
        made.calls[1] = replace(made[1], basis={**made[1].basis, "H": "guessed"})
    page = opened(open_page(), made, tmp_path)
    assert page.locator(f"{VIEW} .head").count() == 4
    assert says in page.locator(VIEW).inner_text()


def test_pages_and_the_widget_open_on_it(open_page: Open, induction: hookattn.Trace, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render.page(induction), encoding="utf-8")
    page = open_page()
    page.goto(path.as_uri())
    page.locator(f"{VIEW} .chosen canvas").wait_for()
    path.write_text(render.page(induction, state={"view": "matrix"}), encoding="utf-8")
    page.goto(path.as_uri())
    page.locator("[data-view=matrix] canvas").wait_for()
