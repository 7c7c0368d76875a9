"""The public API does not move by accident: names, signatures and the command line are what is written down."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .public_api import FILE, public_api


def differences(was: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two trees of plain data, a line each."""
    if isinstance(was, dict) and isinstance(now, dict):
        found = [f"{where}{key}: gone" for key in was if key not in now]
        found += [f"{where}{key}: new" for key in now if key not in was]
        for key in was.keys() & now.keys():
            found += differences(was[key], now[key], f"{where}{key} > ")
        return sorted(found)
    return [] if was == now else [f"{where.removesuffix(' > ')}: was {was!r}, is {now!r}"]


def test_the_public_api_is_what_is_written_down() -> None:
    pytest.importorskip("click")
    found = differences(json.loads(FILE.read_text()), json.loads(json.dumps(public_api())))
    assert not found, (
        "the public API differs from public_api.json; if that is meant, run `python -m tests.project.public_api` and "
        "say it in CHANGELOG.md:\n" + "\n".join(found)
    )


def test_differences_are_seen() -> None:
    was = {"module": {"f": "(x: int)", "g": "()"}}
    assert differences(was, {"module": {"f": "(x: int, y: int)", "h": "()"}}) == [
        "module > f: was '(x: int)', is '(x: int, y: int)'",
        "module > g: gone",
        "module > h: new",
    ]
    assert differences(was, was) == []
