"""No text is too small, too pale, cut off or over another one: by geometry, at every width, in every view."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.everything import page_of_everything

pytest.importorskip("PIL.Image")
pytest.importorskip("pandas")

pytestmark = pytest.mark.browser

# Runs in the page, and finds what is wrong with its texts. A text is a text node, or an SVG's <text>, that is seen.
FAULTS = """() => {
  const root = [...document.querySelectorAll("*")].map((e) => e.shadowRoot).find(Boolean);
  const up = (e) => e.parentElement ?? (e.parentNode instanceof ShadowRoot ? e.parentNode.host : null);
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const ground = (e) => {
    const layers = [];
    for (let p = e; p; p = up(p)) {
      const c = rgba(getComputedStyle(p).backgroundColor);
      if (c[3] > 0) layers.push(c);
      if (c[3] === 1) break;
    }
    return layers.reduceRight((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const linear = (x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
  const lum = (c) => { const [r, g, b] = c.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
  const ratio = (a, b) => { const [x, y] = [lum(a), lum(b)]; return Math.max(x, y) / Math.min(x, y); };
  const found = [], seen = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement, text = node.data.trim();
    if (!text || !e || e.closest("style, dialog:not([open]), title, .hidden, option, noscript")) continue;
    if (!e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    const svg = e.closest("text");
    const whole = svg ? [svg.getBoundingClientRect()] : [...range.getClientRects()];
    const boxes = whole.filter((r) => r.width > 1 && r.height > 1);
    if (boxes.length === 0) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    const said = `“${text.slice(0, 40)}” in ${e.tagName}.${e.getAttribute("class") ?? ""}`;
    if (size < 11) found.push(`${size} px: ${said}`);
    const disabled = e.closest(":disabled");
    const colour = rgba(svg ? style.fill : style.color);
    if (!disabled && !e.closest(".tip")) {
      const under = ground(e), r = ratio(over(colour, under), under);
      if (r < 4.5) found.push(`contrast ${r.toFixed(2)}: ${said}`);
    }
    let scrolled = false;
    for (let p = svg ? svg.ownerSVGElement : e; p && p !== root.host; p = up(p)) {
      const s = getComputedStyle(p);
      const [x, y] = [s.overflowX, s.overflowY];
      if (x === "visible" && y === "visible") continue;
      const box = p.getBoundingClientRect();
      const scrollsX = x === "auto" || x === "scroll", scrollsY = y === "auto" || y === "scroll";
      const told = s.textOverflow === "ellipsis" && (p.title || p.closest("[title]"));
      for (const b of boxes) {
        if ((b.right > box.right + 1 || b.left < box.left - 1) && !(scrollsX && p.scrollWidth > p.clientWidth) && !told)
          { found.push(`cut across by ${p.tagName}.${p.getAttribute("class") ?? ""}: ${said}`); break; }
        if ((b.bottom > box.bottom + 2 || b.top < box.top - 2) && !(scrollsY && p.scrollHeight > p.clientHeight))
          { found.push(`cut down by ${p.tagName}.${p.getAttribute("class") ?? ""}: ${said}`); break; }
      }
      scrolled ||= scrollsX && p.scrollWidth > p.clientWidth;
      if (scrollsX || scrollsY) break;
    }
    const edge = document.documentElement.clientWidth + 1;
    if (boxes.some((b) => b.right > edge || b.left < -1) && !scrolled)
      found.push(`off the page: ${said}`);
    // What is turned has a box that is larger than it is; two of the same slant do not meet where their feet do not.
    const turned = svg?.getAttribute("transform")?.includes("rotate");
    // Of a text that ends in an ellipsis only what is before it is seen.
    let clip = null;
    for (let p = e; p && !clip; p = up(p))
      if (getComputedStyle(p).textOverflow === "ellipsis") clip = p.getBoundingClientRect();
    if (!turned && !e.closest(".tip")) for (const { left, top, right, bottom, height } of boxes)
      seen.push([{ left, top, right: Math.min(right, clip?.right ?? right), bottom, height }, said, e]);
  }
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page is wider than the window");
  for (let i = 0; i < seen.length; i++) for (let j = i + 1; j < seen.length; j++) {
    const [a, sa, ea] = seen[i], [b, sb, eb] = seen[j];
    if (ea === eb || ea.contains(eb) || eb.contains(ea)) continue;
    const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    // Boxes of text have room above and below the letters.
    if (w > 2 && h > 0.35 * Math.min(a.height, b.height)) found.push(`over each other: ${sa} and ${sb}`);
  }
  return [...new Set(found)];
}"""

SELECTIONS: dict[str, dict[str, Any]] = {
    "opened": {},
    "locked": {"query": 6, "key": 2, "layer": 1, "heads": [2, 1]},
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 768, 1440, 3840])
def test_every_text_can_be_read(open_page: Callable[..., Any], tmp_path: Path, width: int, theme: str) -> None:
    page = open_page(viewport={"width": width, "height": 900})
    found = {}
    page.goto(page_of_everything(tmp_path, theme))
    page.get_by_role("tab").first.wait_for()
    for name in page.get_by_role("tab").all_text_contents():
        page.get_by_role("tab", name=name, exact=True).click()
        for chosen, selection in SELECTIONS.items():
            page.evaluate("s => { location.hash = JSON.stringify(s); }", {**state(page), **selection})
            page.wait_for_timeout(350)
            for details in page.locator("details").all():
                details.evaluate("d => { d.open = true; }")
            found[f"{name}, {chosen}"] = page.evaluate(FAULTS)
    told = "\n".join(f"{place}: {x}" for place, all_ in found.items() for x in all_)
    assert len(found) >= 18 and not told, told


def state(page: Any) -> dict[str, Any]:
    """The selection, as the address has it."""
    return dict(page.evaluate('JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}")'))


@pytest.mark.parametrize(
    ("style", "said"),
    [
        ("font-size: 10px", "10 px"),
        ("color: #999", "contrast 2."),
        ("position: absolute; left: 16px; top: 14px; width: 200px", "over each other"),
        ("display: block; width: 20px; overflow: hidden; white-space: nowrap", "cut across"),
    ],
)
def test_what_is_wrong_is_found(open_page: Callable[..., Any], tmp_path: Path, style: str, said: str) -> None:
    page = open_page()
    page.goto(page_of_everything(tmp_path, "light"))
    page.get_by_role("tab").first.wait_for()
    page.wait_for_timeout(300)
    page.evaluate(
        """style => { const root = [...document.querySelectorAll("*")].map((e) => e.shadowRoot).find(Boolean);
        const made = document.createElement("span"); made.style = style; made.textContent = "a text to be found";
        root.querySelector("header").append(made); }""",
        style,
    )
    assert any(said in fault for fault in page.evaluate(FAULTS))
