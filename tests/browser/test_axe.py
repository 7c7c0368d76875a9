"""No view breaks a rule of axe-core, in either theme: what is seen has a name for who does not see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import VIEWER
from tests.browser.everything import SELECTIONS, page_of_everything

pytest.importorskip("PIL.Image")
pytest.importorskip("pandas")

pytestmark = pytest.mark.browser
AXE = VIEWER / "node_modules" / "axe-core" / "axe.min.js"

RUN = """() => axe.run(document, { resultTypes: ["violations"] }).then((r) => r.violations.flatMap((v) => v.nodes.map(
  (n) => `${v.id}: ${n.target.flat().join(" ")}: ${n.any.concat(n.all, n.none).map((c) => c.message).join("; ")}`)))"""


def violations(page: Any) -> list[str]:
    """What axe finds in the page as it is."""
    if not page.evaluate("window.axe !== undefined"):
        page.evaluate(AXE.read_text("utf-8"))
    return list(page.evaluate(RUN))


def at_rest(page: Any) -> None:
    """Waits until what was asked for is drawn."""
    page.locator("[data-view]").wait_for(state="attached")
    page.wait_for_timeout(400)


@pytest.mark.skipif(not AXE.is_file(), reason="npm ci in hookattn/render/viewer installs axe-core")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=["opened", "locked", "scores"])
def test_axe_finds_no_violation(
    open_page: Callable[..., Any], tmp_path: Path, theme: str, selection: dict[str, Any]
) -> None:
    page = open_page()
    page.goto(page_of_everything(tmp_path, theme, state=selection))
    at_rest(page)
    found = {}
    tabs = page.get_by_role("tab")
    names = tabs.all_text_contents()
    assert len(names) >= 9
    for name in names:
        page.get_by_role("tab", name=name, exact=True).click()
        at_rest(page)
        for details in page.locator("details").all():
            details.evaluate("d => { d.open = true; }")
        found[name] = violations(page)
    page.keyboard.press("?")
    found["keys"] = violations(page)
    told = "\n".join(f"{name}: {x}" for name, all_ in found.items() for x in all_)
    assert not told, told
