"""The certificates of all calls, in Chromium: every number that was measured, and the way to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests.browser.conftest import Layers, assert_fits, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]


@pytest.fixture
def doubtful(tmp_path: Path) -> tuple[hookattn.Trace, Path]:
    """Four layers: a faithful call, one near its tolerance, an unfaithful one, one that was not verified."""
    made = hookattn.trace(Layers(2, 2, 2, 2).eval(), (torch.randn(1, 7, 24),))
    proof = made[0].certificate
    proofs = [
        proof,
        replace(proof, output_error=0.9 * proof.tolerance, weights_error=3.25e-7, weights_tolerance=1e-6),
        replace(proof, status="unfaithful", output_error=0.5, rows=3),
        replace(proof, status="unverified", output_error=0.0, basis="nothing: the kernel's output was not seen"),
    ]
    calls = [replace(call, certificate=c) for call, c in zip(made, proofs, strict=True)]
    calls[1] = replace(calls[1], notes=("a note of <b>layer 1</b>",))
    trace = replace(made, calls=calls)
    return trace, Path(trace.save(tmp_path / "t.safetensors"))


def rows(page: Any) -> list[list[str]]:
    page.locator("table.certificates").wait_for()
    found = page.locator(".certificates tbody tr").evaluate_all(
        "all => all.map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    return [list(row) for row in found]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_the_badge_leads_to_every_number(open_page: Open, doubtful: tuple[hookattn.Trace, Path]) -> None:
    trace, path = doubtful
    page = show(open_page(), path)
    page.locator("header .badge").click()
    assert state(page)["view"] == "certificates"
    assert "4 calls: 2 faithful, 1 unfaithful, 1 unverified" in page.locator(".figure").inner_text()
    shown = rows(page)
    for call, row in zip(trace, shown, strict=True):
        c = call.certificate
        assert row[0] == f"layer {call.site.layer}, main self attention ({call.site.path})"
        assert row[1].split()[-1] == c.status
        error, allowed = row[2].split(", allowed ")
        assert (number(error), number(allowed)) == pytest.approx((c.output_error, c.tolerance), rel=0.06)
        assert number(row[4]) == pytest.approx(c.row_sum_error, rel=0.06)
        assert row[5] == f"{c.rows} of {c.of_rows}"
        assert row[6].startswith(c.basis) and f"({call.tap}, float32)" in row[6]
    error, allowed = shown[1][3].split(", allowed ")
    assert (number(error), number(allowed)) == pytest.approx((3.25e-7, 1e-6), rel=0.06)
    assert shown[0][3] == "–" and "a note of <b>layer 1</b>" in shown[1][6]


def test_worst_first(open_page: Open, doubtful: tuple[hookattn.Trace, Path]) -> None:
    page = show(open_page(), doubtful[1], "{state: {view: 'certificates'}}")
    page.get_by_role("button", name="worst first").click()
    page.wait_for_timeout(100)
    assert [row[0][6] for row in rows(page)] == ["2", "3", "1", "0"]


def test_a_row_brings_its_call_into_view(open_page: Open, doubtful: tuple[hookattn.Trace, Path]) -> None:
    page = show(open_page(), doubtful[1], "{state: {view: 'certificates'}}")
    page.locator(".certificates th button").nth(2).click()
    page.wait_for_function("viewer.state.layer === 2")
    assert page.locator("header .badge").get_attribute("data-status") == "unfaithful"
    assert page.locator(".certificates tr[aria-current=true]").count() == 1
    page.keyboard.press("2")
    page.wait_for_function("viewer.state.view === 'head'")


def test_the_table_is_exported(open_page: Open, doubtful: tuple[hookattn.Trace, Path]) -> None:
    page = show(open_page(), doubtful[1], "{state: {view: 'certificates'}}")
    page.locator("table.certificates").wait_for()
    svg = page.evaluate("viewer.svg()")
    assert "5.0e−1, allowed" in svg and "✗ unfaithful" in svg and "(layers.3)" in svg


@pytest.mark.parametrize("width", [400, 3840])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits(open_page: Open, doubtful: tuple[hookattn.Trace, Path], width: int, theme: str) -> None:
    options = f"{{theme: '{theme}', state: {{view: 'certificates'}}}}"
    page = show(open_page(viewport={"width": width, "height": 900}), doubtful[1], options)
    page.locator("table.certificates").wait_for()
    assert_fits(page)
