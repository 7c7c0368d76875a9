"""What a notebook shows of a trace and of a call: pictures of what was captured, bounded, and never an error."""

from __future__ import annotations

import base64
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hookattn
from hookattn.calls.call import Skipped
from hookattn.calls.fields import Derived
from hookattn.calls.still import still_html
from tests.derivations import derivations


class Layer(nn.Module):
    def __init__(self, heads: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        made = scaled_dot_product_attention(4 * q, q, q, is_causal=self.causal).transpose(1, 2).flatten(2)
        return torch.roll(made, 1, -1)


def traced(layers: int = 2, heads: int = 2, length: int = 6, **options: Any) -> hookattn.Trace:
    x = torch.randn(1, length, 8 * heads, generator=torch.Generator().manual_seed(0))
    return hookattn.trace(nn.Sequential(*(Layer(heads) for _ in range(layers))), x, **options)


class Checked(HTMLParser):
    """What is opened is closed, and nothing runs or is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"div", "table", "thead", "tbody", "tr", "th", "td", "img", "pre"}, tag
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "img":
            self.pictures.append(dict(attrs))
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def pixels(picture: dict[str, str | None]) -> np.ndarray[Any, Any]:
    """Rows columns 4 of a PNG with one IDAT and no filter; decoded here, by the standard."""
    data = base64.b64decode((picture["src"] or "").removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    at = data.index(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    lines = np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + size]), np.uint8).reshape(height, 1 + 4 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 4)


def test_a_trace_is_a_table_with_pictures() -> None:
    trace = traced(3)
    page = trace._repr_html_()
    found = Checked(page)
    assert len(found.pictures) == 3 and page.count("✓ faithful") == 3 and "1 2 6 6" in page
    assert all((p["src"] or "").startswith("data:image/png;base64,") and p["alt"] for p in found.pictures)


def test_the_pixels_are_the_weights() -> None:
    call = traced(1)[0]
    image = pixels(Checked(call._repr_html_()).pictures[1])
    side = image.shape[0] // 6
    small = image[side // 2 :: side, side // 2 :: side, :3].astype(int)
    weights = call.weights[0, 1]
    for i in range(6):
        order = weights[i, : i + 1].argsort().tolist()
        dark = [-small[i, j].sum() for j in order]
        assert dark == sorted(dark), "a larger weight is not darker"
        for j in range(i + 1, 6):  # masked: grey, not white
            assert tuple(small[i, j]) in {(0xEC, 0xEF, 0xF1), (0xA3, 0xAD, 0xB7)}


def test_large_ones_are_shown_in_part_and_say_so() -> None:
    many = traced(40, 20)
    page = many._repr_html_()
    assert len(Checked(page).pictures) == 16 and "16 of 40 calls" in page and "12 of 20" in page
    assert "16 of 20 heads" in many[0]._repr_html_() and len(page) < 400_000
    long = traced(1, 2, 5000, capture=("q", "k", "v", "bias", "mask", "sinks"))
    page = long._repr_html_()
    assert "5000 queries × 5000 keys" in page and not Checked(page).pictures


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    counted = traced(capture=("entropy",))
    for page in (counted._repr_html_(), counted[0]._repr_html_()):
        assert "captured: entropy" in page and "capture=(&#x27;weights&#x27;" in page and not Checked(page).pictures
    lazy = hookattn.load(traced().save(tmp_path / "a.safetensors"))
    assert len(Checked(lazy._repr_html_()).pictures) == 2
    trace = traced()
    trace.skipped.append(Skipped("<script>x</script>", "it\x1b[2J forms none"))
    trace.notes.append("a & b")
    page = trace._repr_html_()
    Checked(page)
    assert "&lt;script&gt;" in page and "\x1b" not in page and "a &amp; b" in page
    assert not re.search("<script", page)
    empty = trace[:0]._repr_html_()
    assert "0 calls" in empty and "<table" not in empty


def test_a_picture_that_fails_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced()
    monkeypatch.setattr("hookattn.render.still.trace_html", lambda _: 1 / 0)
    page = trace._repr_html_()
    assert page.startswith("<pre>") and "Trace(2 calls" in page and "ZeroDivisionError" in page
    assert "a call" in still_html(_Bad(), "call")


class _Bad:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_one_token_and_no_mask() -> None:
    one = traced(1, 1, 1)
    assert len(Checked(one[0]._repr_html_()).pictures) == 1
    plain = hookattn.trace(Layer(2, causal=False), torch.randn(2, 4, 16), capture=("weights",))
    assert len(Checked(plain._repr_html_()).pictures) == 1


@pytest.mark.parametrize(("heads", "room"), [(16, 4), (7, 3), (20, 16), (5, 1)])
def test_each_picture_has_the_number_of_the_head_that_it_is(
    heads: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where heads are large fewer have room, and others are drawn than where all have."""
    call = traced(1, heads)[0]
    alone = {h: pixels(Checked(call.at(heads=[h])._repr_html_()).pictures[0]).tobytes() for h in range(heads)}
    assert len(set(alone.values())) == heads  # otherwise a wrong number would not show
    monkeypatch.setattr("hookattn.render.still._BUDGET", room * 6 * 6 + 1)
    page = call._repr_html_()
    pictures = Checked(page).pictures
    named = [int(n) for n in re.findall(r"<div>head (\d+)</div>", page)]
    assert len(named) == len(pictures) == min(room, 16) and f"{room} of {heads} heads are shown" in page
    assert [p["alt"] for p in pictures] == [f"head {n}" for n in named]
    for number, picture in zip(named, pictures, strict=True):
        assert pixels(picture).tobytes() == alone[number]


def test_heads_of_a_selection_keep_their_numbers() -> None:
    call = traced(1, 8)[0].at(heads=[6, 3])
    assert re.findall(r"<div>head (\d+)</div>", call._repr_html_()) == ["6", "3"]


def test_no_more_is_derived_than_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced(1, 20).certify()
    assert isinstance(trace[0].place("weights"), Derived)
    for room, count in ((16, 16), (4, 4)):
        monkeypatch.setattr("hookattn.render.still._BUDGET", room * 6 * 6)
        with derivations() as made:
            assert len(Checked(trace[0]._repr_html_()).pictures) == count
        assert sum(d.b * d.h for d in made) == count
    monkeypatch.setattr("hookattn.render.still._BUDGET", 35)
    with derivations() as made:
        assert "look at them with" in trace[0]._repr_html_() and "look at them with" in trace._repr_html_()
    assert not made


def test_which_batch_entry_is_drawn_is_said() -> None:
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    call = hookattn.trace(Layer(2), x)[0]
    first, second = call._repr_html_(), call.at(batch=1)._repr_html_()
    assert "the first of 3 batch entries" in first and "batch entries" not in second
    assert pixels(Checked(first).pictures[0]).tobytes() != pixels(Checked(second).pictures[0]).tobytes()
