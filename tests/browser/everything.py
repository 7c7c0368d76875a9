"""A page that has something for every view: a text over a picture's patches, an edit, scores, a second trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hookattn
from hookattn import Skipped, analyze, edit, render
from tests.browser.test_screenshots import TOKENS, Waves

# What a view has to be looked at in, beside how it opens.
SELECTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"query": 6, "key": 2, "layer": 1, "heads": [1]},
    {"field": "scores", "scale": "log"},
)


def pair_of_traces() -> tuple[hookattn.Trace, hookattn.Trace]:
    """Three layers of four heads over 17 tokens; the same with a head set to 0, a skipped module and notes."""
    x = torch.arange(1.0, 18.0).view(1, 1, 17, 1)
    plain = hookattn.trace(Waves(0.0), x, tokens=TOKENS, verify="full")
    changed = hookattn.edited(Waves(0.0), x, edit.zero("weights", layer=1, heads=[2], keys=[1]), tokens=TOKENS)
    return plain, replace(changed, skipped=[Skipped("mixer", "linear attention", (0,))])


def page_of_everything(folder: Path, theme: str, **more: Any) -> str:
    """The address of a page in which every view has something to show."""
    from PIL import Image

    plain, changed = pair_of_traces()
    Image.new("RGB", (64, 64), (40, 90, 160)).save(folder / "picture.png")
    given: dict[str, Any] = {
        "scores": analyze.report(plain),
        "theme": theme,
        "title": "everything",
        "images": {"urls": [str(folder / "picture.png")], "grid": (4, 4), "prefix": 1},
        **more,
    }
    path = folder / f"everything.{theme}.html"
    path.write_text(render.page(changed, compare=plain, **given), encoding="utf-8")
    return path.as_uri()
