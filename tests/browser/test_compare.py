"""Two traces side by side: the difference, how far the heads are apart, what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn import render
from tests.browser.conftest import PAGE, READ, TOKENS, Layers, causal, serve, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]
OTHER = [*TOKENS[:2], "Ġdog", *TOKENS[3:]]


def other_trace(
    n: int = 9, heads: tuple[int, ...] = (4, 4), batch: int = 2, seed: int = 8, **options: Any
) -> hookattn.Trace:
    """The layers of the first trace on another input, of whose tokens one is another."""
    x = torch.randn(batch, n, 24, generator=torch.Generator().manual_seed(seed))
    tokens = OTHER if n == 9 else None
    return hookattn.trace(Layers(*heads).eval(), (x, None, causal(n)), **{"tokens": tokens, **options})


def compared(page: Any, one: Path, other: hookattn.Trace, **options: Any) -> Any:
    """The viewer on two files; ``options`` are the selection."""
    path = Path(other.save(one.parent / "other.safetensors"))
    serve(page, {"other.safetensors": path})
    chosen = json.dumps({"view": "compare", **options})
    made = show(page, one, f"{{compare: await served('/other.safetensors'), state: {chosen}}}")
    assert PAGE.count("served") == 2
    return made


def hover(page: Any, nth: int, query: int, key: int, n: int = 9) -> str:
    canvas = page.locator("[data-view=compare] .plane canvas").nth(nth)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + (key + 0.5) * box["width"] / n, box["y"] + (query + 0.5) * box["height"] / n)
    return str(page.locator(".tip").inner_text())


def numbers(tip: str) -> list[float]:
    return [float(line.rsplit(" ", 1)[1].replace("−", "-")) for line in tip.splitlines()]


@pytest.mark.parametrize("field", ["weights", "scores"])
def test_both_and_their_difference_at_one_cursor(
    open_page: Open, file: Path, trace: hookattn.Trace, field: str
) -> None:
    other = other_trace()
    page = compared(open_page(), file, other, layer=1, heads=[2], batch=1, field=field)
    page.locator("[data-side=difference] canvas").wait_for()
    a, b = (t[1].get(field)[1, 2].double() for t in (trace, other))
    for nth, query, key in [(0, 8, 3), (1, 4, 2), (2, 6, 6)]:
        tip = hover(page, nth, query, key)
        expected = [a[query, key].item(), b[query, key].item(), (b - a)[query, key].item()]
        assert numbers(tip) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert f"A: {query} “{READ[query][:10]}" in tip
        outlined = page.locator("[data-view=compare] .plane svg rect[stroke='var(--cursor)']").count()
        assert outlined == 6  # the row and the column, in all three


PIXEL = """([x, y]) => {
  const c = document.querySelector('#viewer').shadowRoot.querySelector('[data-side=difference] canvas');
  return [...c.getContext('2d').getImageData(Math.floor(x * c.width), Math.floor(y * c.height), 1, 1).data]; }"""


def test_the_map_of_differences_is_symmetric_and_loses_none(open_page: Open, tmp_path: Path) -> None:
    """Of two single differences among a million, the positive and the negative one are seen, equally strong."""
    made = [hookattn.trace(Layers(1).eval(), (torch.randn(1, 1200, 24),), capture=("weights",)) for _ in "ab"]
    for trace, (query, key) in zip(made, [(300, 200), (900, 1100)], strict=True):
        weights = torch.full((1, 1, 1200, 1200), 0.001)
        weights[0, 0, query, key] = 0.5
        trace[0].fields["weights"] = weights
    page = compared(open_page(), Path(made[0].save(tmp_path / "t.safetensors")), made[1], view="compare", theme="light")
    page.locator("[data-side=difference] canvas").wait_for()
    page.wait_for_timeout(500)
    less, more, same = (page.evaluate(PIXEL, [k / 1200, q / 1200]) for q, k in [(302, 202), (902, 1102), (6, 6)])
    assert (
        less[0] > less[2] + 80 and more[2] > more[0] + 60
    )  # orange for less, blue for more; in the middle of the pooled cells
    assert max(same[:3]) - min(same[:3]) < 4
    assert abs(sum(less) - sum(more)) < 120


def test_heads_are_sorted_by_how_far_they_are_apart(open_page: Open, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    from hookattn import analyze

    one, two = other_trace(batch=1, seed=1), other_trace(batch=1)
    table = analyze.compare(one, two)
    page = compared(open_page(), Path(one.save(tmp_path / "t.safetensors")), two, heads=[0])
    page.locator(".distances tbody tr").nth(7).wait_for()

    def rows() -> list[tuple[str, float, float]]:
        cells = page.locator(".distances tbody tr").evaluate_all(
            "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
        )
        return [(name, float(v), float(d)) for name, v, d in cells]

    found = rows()
    assert [name for name, _, _ in found] == [f"{r.layer}.{r.head}" for r in table.itertuples()]
    assert [v for _, v, _ in found] == pytest.approx(table["total_variation"].tolist(), rel=1e-3)
    assert [d for _, _, d in found] == pytest.approx(table["max_difference"].tolist(), rel=1e-3)
    page.get_by_role("button", name="head", exact=False).and_(page.locator(".distances th button")).first.click()
    assert [name for name, _, _ in rows()] == [f"{i}.{j}" for i in range(2) for j in range(4)]
    page.locator(".distances tbody tr button").nth(6).click()
    page.wait_for_function("viewer.state.layer === 1 && viewer.state.heads[0] === 2")
    assert page.locator(".distances tr[aria-current=true]").inner_text().startswith("1.2")


def test_tokens_that_differ_are_named(open_page: Open, file: Path) -> None:
    page = compared(open_page(), file, other_trace(), heads=[0])
    page.locator("[data-side=difference] canvas").wait_for()
    told = page.locator("[data-view=compare] .readout").first.inner_text()
    assert told.split() == "One token differs: 2 cat → dog".split()
    texts = page.locator("[data-side=difference] svg text").all_text_contents()
    assert texts.count("cat → dog") == 2


def test_the_table_has_the_largest_differences(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    other = other_trace()
    page = compared(open_page(), file, other, layer=0, heads=[1])
    page.locator(".as-table summary").click()
    first = page.locator(".as-table tbody tr").first.locator("td").all_text_contents()
    apart = (other[0].weights - trace[0].weights)[0, 1]
    query, key = divmod(int(apart.abs().argmax()), 9)
    assert (first[0].split()[0], first[1].split()[0]) == (str(query), str(key))
    assert float(first[4].replace("−", "-")) == pytest.approx(apart[query, key].item(), rel=1e-5)


def test_what_does_not_fit_is_said(open_page: Open, file: Path) -> None:
    page = compared(open_page(), file, other_trace(n=7), heads=[0])
    told = page.get_by_role("note").filter(has_text="no difference").inner_text()
    assert "9 queries and 9 keys in A, and 7 queries and 7 keys in B" in told
    assert page.locator("[data-view=compare] .plane").count() == 2
    hover(page, 0, 8, 8)  # a cell that B does not have
    assert page.locator(".tip").inner_text().startswith("A: 8 ") and "B:" not in page.locator(".tip").inner_text()


def test_calls_heads_and_fields_of_one_trace_alone(open_page: Open, file: Path) -> None:
    page = compared(open_page(), file, other_trace(heads=(4,)), layer=1)
    assert "nothing to compare with layer 1" in page.get_by_role("note").inner_text()
    page.evaluate("viewer.set({layer: 0})")
    page.locator("[data-side=difference] canvas").wait_for()
    assert "1 of the 2 calls of A have no counterpart in B, and 0 of the 1" in page.get_by_role("note").inner_text()
    page = compared(open_page(), file, other_trace(heads=(2, 2)), heads=[3])
    told = page.get_by_role("note").filter(has_text="has no head 3").inner_text()
    assert "shown is head 0, which both have" in told
    page = compared(open_page(), file, other_trace(capture=("q",)), heads=[3])
    alert = page.get_by_role("alert").inner_text()
    assert alert.startswith("B, other.safetensors: ") and 'capture=("weights", …)' in alert


def test_without_a_second_trace_there_is_no_tab(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{state: {view: 'compare'}}")
    assert page.get_by_role("tab", name="Compare").count() == 0 and state(page)["view"] == "overview"


@pytest.mark.parametrize("width", [400, 1280, 3840])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_page_holds_both(open_page: Open, trace: hookattn.Trace, tmp_path: Path, width: int, theme: str) -> None:
    path = render.save_page(trace, tmp_path / "p.html", compare=other_trace(), state={"view": "compare"}, theme=theme)
    page = open_page(viewport={"width": width, "height": 900})
    page.goto(Path(path).as_uri())
    page.locator("[data-side=difference] canvas").wait_for()
    page.locator(".distances tbody tr").nth(7).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    fits = "document.querySelector('#viewer').shadowRoot.querySelector('.figure')"
    assert page.evaluate(f"{fits}.scrollWidth <= {fits}.clientWidth")


WIDGET = """async () => {
  const { default: widget } = await import("/hookattn-viewer.js");
  const files = {};
  for (const of of ["trace", "other"]) files[of] = await (await fetch(`/${of}.safetensors`)).arrayBuffer();
  const heard = [];
  const values = { _name: "a", _size: files.trace.byteLength, state: { view: "compare", layer: 1, heads: [2] },
    options: {}, _compare: { name: "b", size: files.other.byteLength } };
  const model = {
    get: (name) => values[name], set: (name, value) => (values[name] = value), save_changes() {}, off() {},
    on: (event, f) => event === "msg:custom" && heard.push(f),
    send({ id, of, start, end }) {
      const bytes = files[of === "compare" ? "other" : "trace"].slice(start, end);
      setTimeout(() => heard.forEach((f) => f({ kind: "bytes", id }, [new DataView(bytes)])));
    } };
  widget.render({ model, el: document.querySelector("#viewer") });
}"""


def test_a_widget_reads_both(open_page: Open, file: Path, trace: hookattn.Trace) -> None:
    other = other_trace()
    page = compared(open_page(), file, other)
    page.evaluate("viewer.destroy()")
    page.evaluate(WIDGET)
    page.locator("[data-side=difference] canvas").wait_for()
    a, b = (t[1].weights[0, 2, 7, 2].item() for t in (trace, other))
    assert numbers(hover(page, 1, 7, 2))[:2] == pytest.approx([a, b], rel=1e-6)


def test_the_selection_is_in_the_link_and_the_drawing_in_the_export(open_page: Open, file: Path) -> None:
    pages = []
    for fragment in ["", None]:
        page = open_page()
        serve(page, {"other.safetensors": Path(other_trace().save(file.parent / "other.safetensors"))})
        link = pages[0].evaluate("location.hash") if fragment is None else ""
        show(page, file, "{compare: await served('/other.safetensors'), link: true}", fragment=link)
        if fragment is not None:
            page.evaluate("viewer.set({view: 'compare', layer: 1, heads: [3, 1], query: 4, sink: 'drop', batch: 1})")
            page.wait_for_timeout(100)
        pages.append(page)
    assert state(pages[0]) == state(pages[1]) and state(pages[1])["sink"] == "drop"
    pages[1].locator("[data-side=difference] canvas").wait_for()
    svg = pages[1].evaluate("viewer.svg()")
    assert svg.count("<image") == 3 and "cat → dog" in svg and "B − A" in svg and "var(--" not in svg
    assert pages[1].evaluate("viewer.png().then(b => b.size)") > 3000


def test_pairs_and_first_keys_of_both(open_page: Open, tmp_path: Path) -> None:
    tokens = ["[CLS]", "a", "b", "[SEP]", "c", "d", "[SEP]"]
    one, two = (
        hookattn.trace(
            Layers(2).eval(), (torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(i)),), tokens=tokens
        )
        for i in (1, 2)
    )
    path = Path(one.save(tmp_path / "t.safetensors"))
    page = compared(open_page(), path, two, heads=[1], filter="BA", sink="renormalise")
    page.locator(".as-table summary").click()
    cells = page.locator(".as-table tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    found = {(int(q[0]), int(k[0])): float(d.replace("−", "-")) for q, k, _, _, d in cells}
    a, b = (t[0].weights[0, 1].double() for t in (one, two))
    rest = b / (1 - b[:, :1]) - a / (1 - a[:, :1])
    assert found == pytest.approx({(t, s): rest[t, s].item() for t in (4, 5, 6) for s in (1, 2, 3)}, rel=1e-4, abs=1e-8)


def test_a_head_that_the_other_lacks_is_replaced_by_one_that_both_have(
    open_page: Open, file: Path, trace: hookattn.Trace
) -> None:
    part = trace.select(layer=1)
    other = hookattn.trace(
        Layers(4, 4).eval(), (torch.randn(2, 9, 24), None, causal(9)), heads=[0, 2], layers=[1], tokens=TOKENS
    )
    assert len(part) == 1
    page = compared(open_page(), file, other, layer=1, heads=[3])
    page.locator("[data-side=difference] canvas").wait_for()
    told = page.locator(".figure").inner_text()
    assert "has no head 3 of layer 1" in told and "shown is head 0, which both have" in told
    page.evaluate("viewer.set({layer: 0})")
    page.get_by_role("button", name="which both have").click()
    page.locator("[data-side=difference] canvas").wait_for()
    assert state(page)["layer"] == 1
