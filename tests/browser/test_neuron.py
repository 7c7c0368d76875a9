"""The neuron view in Chromium: each step from q and k to the weight, against arithmetic in float64."""

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


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def columns(page: Any) -> dict[str, list[str]]:
    """The table of the view, by the title of its columns."""
    rows = cells(page)
    titles = page.locator(".as-table th").all_text_contents()
    return {title: [row[i] for row in rows] for i, title in enumerate(titles)}


def close(shown: list[str], wanted: Tensor, rtol: float = 2e-5) -> None:
    assert [number(x) for x in shown] == pytest.approx(wanted.tolist(), rel=rtol, abs=1e-6)


def rich(**changes: Any) -> hookattn.Trace:
    """One call of grouped heads with all there is: a scale a head, a soft-cap, a bias, a mask, sinks."""
    torch.manual_seed(8)
    b, h, g, t, s, d = 2, 4, 2, 6, 6, 5
    q, k, v = torch.randn(b, h, t, d), torch.randn(b, g, s, d), torch.randn(b, g, s, 7)
    scale, bias, sinks = torch.rand(1, h, t, 1) + 0.5, torch.randn(1, h, t, s), torch.randn(h)
    mask = ~causal(t)[None, None]
    made = hookattn.trace(Layers(4).eval(), (torch.randn(b, t, 24),))
    dots = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double().repeat_interleave(2, 1)) * scale
    scores = 2.5 * torch.tanh(dots / 2.5) + bias
    logits = torch.cat([scores.masked_fill(~mask, -torch.inf), sinks.double()[:, None, None].expand(b, h, t, 1)], -1)
    weights = logits.softmax(-1)[..., :-1]
    output = weights @ v.double().repeat_interleave(2, 1)
    fields = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "sinks": sinks}
    fields |= {"scores": scores.float(), "weights": weights.float(), "output": output.float(), **changes}
    call = replace(made[0], scale=scale, softcap=2.5, fields=fields, derivable=())
    return replace(made, calls=[call])


@pytest.mark.parametrize("compact", [False, True])
def test_each_step_is_that_of_the_kernel(open_page: Open, tmp_path: Path, compact: bool) -> None:
    made = rich()
    call, (b, h, t) = made[0], (1, 3, 4)
    path = Path(made.save(tmp_path / "t.safetensors", compact=compact))
    page = show(open_page(), path, f"{{state: {{view: 'neuron', batch: {b}, heads: [{h}], query: {t}}}}}")
    shown = columns(page)
    dots = (call.q[b, h, t].double() * call.k[b, 1].double()).sum(-1) * call.scale[0, h, t].double()
    close(shown["scale·q·k"], dots)
    close(shown["soft-capped"], 2.5 * torch.tanh(dots / 2.5))
    close(shown["bias"], call.bias[0, h, t])
    scores = 2.5 * torch.tanh(dots / 2.5) + call.bias[0, h, t]
    close(shown["score"], scores)
    assert shown["mask"] == ["may attend"] * 5 + ["masked"]
    total = scores[:5].exp().sum() + call.sinks[h].double().exp()
    close(shown["weight"], torch.cat([scores[:5].exp() / total, torch.zeros(1)]))
    told = page.locator(".figure").inner_text()
    assert "k and v of group 1 of 2" in told and "capped at ±2.5" in told and "learned sink" in told


def tips(page: Any, plane: int, x: float, rows: int) -> list[str]:
    """What is told at ``x`` (pixels from the left) of each of the ``rows`` rows of a plane."""
    box = page.locator(".plane").nth(plane).bounding_box()
    found = []
    for n in range(rows):
        page.mouse.move(box["x"] + x, box["y"] + box["height"] - 4 - 19 * (rows - n - 0.5))
        found.append(page.locator(".tip").inner_text())
    return found


def test_components_are_told_under_the_pointer(open_page: Open, tmp_path: Path) -> None:
    made = rich()
    path = Path(made.save(tmp_path / "t.safetensors"))
    page = show(open_page(), path, "{state: {view: 'neuron', heads: [2], query: 5}}")
    page.locator(".plane canvas").first.wait_for()
    left = page.locator(".plane canvas").evaluate_all("all => all.map(c => parseFloat(c.style.left))")
    width = page.locator(".plane canvas").evaluate_all("all => all.map(c => parseFloat(c.style.width))")
    q, k = made[0].q[0, 2, 5], made[0].k[0, 1]
    for x, wanted in ((left[0], k), (left[2], q * k)):  # the strip of q is the second
        for component in (0, 3):
            for n, tip in enumerate(tips(page, 0, x + (component + 0.5) * width[0] / 5, 6)):
                head, value = tip.split("\n")[:2]
                assert head == f"key {n}, component {component}"
                assert number(value.split(" ")[-1]) == pytest.approx(wanted[n, component].item(), rel=1e-6)
    tip = tips(page, 0, left[0] + 3.5 * width[0] / 5, 6)[0]
    assert number(tip.split("\n")[2].split(" ")[-1]) == pytest.approx(q[3].item(), rel=1e-6)


SIGNS = """() => { const c = document.querySelector('#viewer').shadowRoot.querySelector('.plane canvas');
  const g = c.getContext('2d'); return [0, 1].map(x => [...g.getImageData(x * (c.width - 2) + 1, 4, 1, 1).data]); }"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_signed(open_page: Open, tmp_path: Path, theme: str) -> None:
    made = rich()
    made[0].fields["k"][0, 0, 0] = torch.tensor([-2.0, 0, 0, 0, 2.0])
    path = Path(made.save(tmp_path / "t.safetensors"))
    page = show(open_page(), path, f"{{theme: '{theme}', state: {{view: 'neuron', heads: [0], query: 5}}}}")
    page.locator(".plane canvas").first.wait_for()
    page.wait_for_timeout(100)
    minus, plus = page.evaluate(SIGNS)
    assert minus[0] > minus[2] + 30 and plus[2] > plus[0] + 30, (minus, plus)
    assert "part of the largest (±)" in page.locator(".figure").inner_text()


def apart(page: Any) -> str:
    page.locator(".plane").first.wait_for()
    return str(page.locator(".figure").inner_text())


def test_what_does_not_add_up_is_told(open_page: Open, tmp_path: Path) -> None:
    made = rich()
    other = made[0].scores.clone()
    other[0, 0, 5, 2] += 0.75
    other_v = made[0].v.clone()
    call = replace(made[0], own_scores=True, mixed=True, fields={**made[0].fields, "scores": other, "v": other_v + 3})
    worse = replace(made, calls=[call])
    options = "{state: {view: 'neuron', heads: [0], query: 5}}"
    told = apart(show(open_page(), Path(made.save(tmp_path / "a.safetensors")), options))
    assert "is the score in the trace, to within" in told and "more than" not in told
    close_to = told.split("what the kernel returned, to within ")[1].split()[0].rstrip(".")
    assert number(close_to) < 1e-5
    told = apart(show(open_page(), Path(worse.save(tmp_path / "b.safetensors")), options))
    assert "they differ by up to 7.5e−1" in told and "changed the weights after the softmax" in told
    assert number(told.split("what the kernel returned, to within ")[1].split()[0].rstrip(".")) > 0.5


def test_missing_fields_name_the_capture(open_page: Open, tmp_path: Path) -> None:
    def traced(*capture: str) -> Path:
        made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 5, 24),), capture=capture)
        return Path(made.save(tmp_path / f"{len(capture)}.safetensors"))

    page = show(open_page(), traced("k", "scores", "mask", "weights"), "{state: {view: 'neuron'}}")
    assert 'capture=("q", …)' in page.get_by_role("alert").inner_text()
    page = show(open_page(), traced("q", "k", "bias", "scores", "mask", "weights"), "{state: {view: 'neuron'}}")
    page.locator(".plane").first.wait_for()
    assert 'capture=("v", …)' in page.locator(".figure").inner_text()


def test_keys_change_the_query_and_lock_a_key(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    page = show(open_page(), file, "{state: {view: 'neuron', heads: [1], layer: 1}}")
    page.locator(".plane").first.wait_for()
    for key in ["Tab", "ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight"]:
        page.keyboard.press(key)
    assert (state(page)["query"], state(page)["key"]) == (7, 1)
    page.get_by_text("Head 1, query 7").wait_for()
    product = trace[1].q[0, 1, 7] * trace[1].k[0, 1, 1]
    order = product.abs().argsort(descending=True)[:3].tolist()
    said = page.get_by_text("the largest components of").inner_text()
    assert [int(d) for d in re.findall(r"(\d+) \(", said)] == order
    page.locator("[data-view=neuron] text", has_text="猫 1/2").first.click(force=True)
    page.wait_for_function("viewer.state.key === 4")


def test_the_pointer_of_another_view_is_forgotten(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{state: {view: 'matrix', heads: [1]}}")
    box = page.locator(".plane canvas").bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + box["height"] - 5)  # below the rows of the other view
    page.locator(".tip").wait_for()
    page.evaluate("viewer.set({view: 'neuron'})")
    page.get_by_text("Head 1, query 8").wait_for()
    assert page.locator("[data-view=neuron] .plane svg > rect").count() == 0


def test_a_row_of_a_long_trace_is_read_alone(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(2, 2).eval(), (torch.randn(1, 700, 24), None, causal(700)))
    path = Path(made.save(tmp_path / "t.safetensors"))
    page, read = open_page(), []
    show(page, path, "{state: {view: 'neuron', heads: [1], query: 651, layer: 1}}")
    page.locator(".plane").first.wait_for()
    # Every head was read to be measured; what is drawn is read apart from that.
    page.wait_for_function("viewer.findings.total > 0 && viewer.findings.done === viewer.findings.total")
    page.on("request", lambda r: read.append(r.headers.get("range", "")))
    page.evaluate("viewer.set({query: 650})")
    page.get_by_text("Head 1, query 650").wait_for()
    spans = [span.removeprefix("bytes=").split("-") for span in read if span]
    total = sum(int(b) - int(a) + 1 for a, b in spans)
    assert 0 < total < 700 * 700 / 2  # one head of weights is eight times that
    shown = columns(page)
    weights = made[1].weights[0, 1, 650]
    kept = weights.topk(100).indices.sort().values
    assert [int(k.split()[0]) for k in shown["key"]] == kept.tolist()
    close(shown["weight"], weights[kept])


@pytest.mark.parametrize("width", [400, 3840])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_is_exported(open_page: Open, file: Path, width: int, theme: str) -> None:
    options = f"{{theme: '{theme}', state: {{view: 'neuron', key: 2}}}}"
    page = show(open_page(viewport={"width": width, "height": 900}), file, options)
    page.locator(".plane").first.wait_for()
    assert_fits(page)
    svg = page.evaluate("viewer.svg()")
    assert "<image" in svg and "שלום" in svg and "var(--" not in svg
