"""docs/comparison.md: what stands there of other tools is what running them gives, wherever they are installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.same_weights import cases, meanwhile, page, views
from benchmarks.same_weights.cases import CASES
from benchmarks.same_weights.readers import READERS, Lacks, read
from hookattn.render.page_size import narrowed

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "comparison.md").read_text(encoding="utf-8")
INSTALLED = [tool for tool in READERS if tool == "output_attentions" or find_spec(tool) is not None]


def cells(title: str) -> dict[str, str]:
    """Tool → what the page says of it, in the row with a title."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {title} |")]
    return dict(zip(READERS, [cell.strip() for cell in row.split("|")[2:-1]], strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("tool", INSTALLED)
def test_the_page_says_what_running_it_gives(tool: str, case: cases.Case) -> None:
    found, written = read(tool, case), cells(case.title)[tool]
    if isinstance(found, Exception):
        assert written == "cannot", found
        assert isinstance(found, Lacks) or type(found).__name__ in PAGE
        return
    answer = page.cell(tool, case, found, case.reference())  # which raises if it is further off than it may be
    assert re.sub(r"^\S+?e-\d+", "", answer) == re.sub(r"^\S+?e-\d+", "", written)


def test_a_wrong_answer_is_no_row() -> None:
    case = CASES[0]
    right = case.reference().float()
    assert page.gap(case, right, case.reference())[0] < 1e-6
    with pytest.raises(ValueError, match="off, which is more than"):
        page.cell("nnsight", case, right.flip(1), case.reference())
    with pytest.raises(ValueError, match="was expected"):
        page.gap(case, right[:, :1], case.reference())
    masked = right.clone()
    masked[..., 0, 1] = torch.finfo(torch.float32).min
    assert page.gap(case, masked, case.reference()) == (pytest.approx(0, abs=1e-6), True)


def test_the_model_returns_what_it_returns_untraced() -> None:
    assert torch.equal(meanwhile.logits("hookattn"), meanwhile.as_loaded())
    assert "| 0, bit for bit |" in PAGE
    assert meanwhile.attentions_of_the_fused_model() == 0  # which is what the page says of it


def test_the_page_has_the_code_that_ran() -> None:
    for tool in READERS:
        assert f"```python\n{page.code(tool)}\n```" in PAGE, f"{tool}: run `make compare`"


def test_the_page_of_the_viewer_holds_what_the_table_says() -> None:
    for tokens in (32, 128):
        assert not {"q", "k", "weights"} & set(narrowed(views.traced(tokens)).left_out)
    assert [view for view in views.VIEWS if f"| {view} |" not in PAGE] == []
