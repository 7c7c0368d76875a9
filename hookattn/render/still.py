"""A trace, or one call, as a still picture with a table: what a cell of a notebook shows, with or without a kernel.

It is plain HTML with inline attributes and pictures inside, since what shows saved notebooks (a code host, an export)
takes scripts and style sheets away. It needs nothing beside torch, reads at most a few million numbers, and says what
it leaves out.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.extents import extents_of
from ..calls.trace_data import TraceData
from ..errors import HookattnError
from ..printable import printable
from .palette import HATCH, MASKED, SEQUENTIAL_STOPS

Item = TypeVar("Item")

ROWS, HEADS, LARGE = 16, 12, 16
"""Calls of a trace, heads of one of its rows, and heads of a call that are drawn at the most."""
_BUDGET = 1 << 24
"""Numbers that are looked at for one output, and of one head a quarter of it."""
_SMALL, _WIDE = 28, 112
"""Pixels of a head in a row, and of one alone."""
_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:middle;white-space:nowrap"


def trace_html(trace: TraceData) -> str:
    """A trace: its calls in a table, each with its heads."""
    shown = _spread(trace.calls, ROWS)
    budget = _BUDGET // max(1, len(shown))
    rows = "".join(_row(call, budget) for call in shown)
    head = "".join(f'<th style="{_CELL}">{name}</th>' for name in ("layer", "module", "kind", "B H T S", "heads", ""))
    said = [repr(trace)]
    if len(shown) < len(trace.calls):
        said.append(f"{len(shown)} of {len(trace.calls)} calls are shown, spread over all")
    said += [f"skipped {skipped.path or 'the model itself'}: {skipped.reason}" for skipped in trace.skipped[:3]]
    if len(trace.skipped) > 3:
        said.append(f"and {len(trace.skipped) - 3} more in trace.skipped")
    said += [str(note) for note in trace.notes[:3]]
    table = f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f"<div>{_lines(said)}{_scrolled(table) if shown else ''}</div>"


def call_html(call: Call) -> str:
    """One call: what it is, and its heads."""
    extents = extents_of(call, "BHTS")
    facts = [repr(call), str(call.certificate)]
    if call.guessed:
        facts.append(f"axes guessed by convention: {' '.join(call.guessed)}; say them with layout=")
    facts += [str(edit) for edit in call.edits[:3]] + list(call.notes[:3])
    heads, why = _drawn(call, LARGE, _BUDGET)
    pictures = "".join(
        f'<td style="padding:2px 8px 2px 0;text-align:left;vertical-align:top"><div>head {number}</div>'
        f"{_picture([image], _WIDE, f'head {number}')}</td>{'</tr><tr>' if (i + 1) % 6 == 0 else ''}"
        for i, (number, image) in enumerate(heads.items())
    )
    parts = [f"{len(heads)} of {extents.h} heads are shown"] if heads and len(heads) < (extents.h or 0) else []
    parts += [f"what is drawn is the first of {extents.b} batch entries"] if heads and (extents.b or 1) > 1 else []
    why = why or "; ".join(parts)
    below = "queries down, keys across; darker is more, each pixel the largest of its block, masked is hatched"
    table = _scrolled(f"<table><tbody><tr>{pictures}</tr></tbody></table>") if heads else ""
    return f"<div>{_lines([*facts, *([why] if why else [])])}{table}{_lines([below] if heads else [])}</div>"


def _row(call: Call, budget: int) -> str:
    extents = extents_of(call, "BHTS")
    size = " ".join("?" if n is None else str(n) for n in (extents.b, extents.h, extents.t, extents.s))
    heads, why = _drawn(call, HEADS, budget)
    more = "" if extents.h is None or len(heads) in (0, extents.h) else f" {len(heads)} of {extents.h}"
    drawn = (
        _picture(list(heads.values()), _SMALL, f"{len(heads)} heads of {call.site.label}")
        if heads
        else html.escape(why)
    )
    status = call.certificate.status
    sign = {"faithful": "✓ faithful", "unfaithful": "✗ unfaithful"}.get(status, "? unverified")
    guessed = f", axes guessed: {' '.join(call.guessed)}" if call.guessed else ""
    step = f", step {call.step}" if call.step else ""
    cells = (
        "–" if call.site.layer is None else str(call.site.layer),
        html.escape(printable(call.site.label)),
        html.escape(printable(f"{call.site.stack} {call.site.kind}{step}")),
        size,
        drawn + more,
        html.escape(sign + guessed),
    )
    return f"<tr>{''.join(f'<td style={chr(34)}{_CELL}{chr(34)}>{cell}</td>' for cell in cells)}</tr>"


def _drawn(call: Call, most: int, budget: int) -> tuple[dict[int, Tensor], str]:
    """Pictures of some heads of the first batch entry by their numbers in the model, and why there are none."""
    if not (call.has("weights") or call.has("applied")):
        kept = ", ".join(name for name in call.fields if call.fields[name] is not None) or "nothing"
        return {}, f"no weights to draw (captured: {kept}); trace with capture=('weights', …) to see the heads"
    extents = extents_of(call, "BHTS")
    if extents.h is None or extents.t is None or extents.s is None:
        return {}, "how many heads it has is not known of what was captured"
    size = extents.t * extents.s
    count = min(most, extents.h, budget // max(1, size))
    if count == 0:
        return {}, f"{extents.t} queries × {extents.s} keys: look at them with hookattn.render.show(trace)"
    numbers = list(call.heads) if call.heads is not None else list(range(extents.h))
    shown = _spread(numbers, count)
    part = call.at(heads=shown, batch=0)
    try:
        weights = part.get("weights" if part.has("weights") else "applied")
    except HookattnError as error:
        return {}, str(error)
    if weights is None:
        return {}, "it has no weights"
    mask = part.get("mask") if part.has("mask") else None
    # What is the same for all heads may have one.
    weights = weights.detach().expand(1, len(shown), *weights.shape[2:])[0].float().cpu()
    open_ = None if mask is None else mask.detach().cpu().broadcast_to((1, *weights.shape))[0]
    images = [_image(weights[i], None if open_ is None else open_[i]) for i in range(len(weights))]
    return dict(zip(shown, images, strict=True)), ""


def _image(weights: Tensor, may: Tensor | None) -> Tensor:
    """uint8, rows columns 3: a head as a picture of at most 112 pixels a side."""
    block = max(1, -(-max(weights.shape) // _WIDE))
    magnitudes = weights.abs()
    if may is not None:
        magnitudes = torch.where(may, magnitudes, -1.0)
    pooled = torch.nn.functional.max_pool2d(magnitudes[None, None], block, ceil_mode=True)[0, 0]
    # Where the scale ends: as hookattn/render/scale.py has it, of the pooled rows, without what the first key gets.
    rows = pooled[:, 1:].amax(1) if pooled.shape[1] > 1 else pooled.amax(1)
    end = float(rows.clamp_min(0).quantile(0.75)) if len(rows) > 8 else float(pooled.max())
    top = float(pooled.max())
    end = top if end >= top / 2 or end <= 0 else max(end, 4 / weights.shape[1])
    stops = torch.tensor([_rgb(stop) for stop in SEQUENTIAL_STOPS], dtype=torch.float32)
    place = (pooled / (end or 1.0)).clamp(0, 1).nan_to_num(0.0) * (len(stops) - 1)
    low = place.floor().long().clamp_max(len(stops) - 2)
    part = (place - low).unsqueeze(-1)
    image = (stops[low] * (1 - part) + stops[low + 1] * part).round().to(torch.uint8)
    hidden = pooled < 0
    line = (torch.arange(image.shape[0])[:, None] + torch.arange(image.shape[1])) % 4 == 0
    image[hidden] = torch.tensor(_rgb(MASKED), dtype=torch.uint8)
    image[hidden & line] = torch.tensor(_rgb(HATCH), dtype=torch.uint8)
    return image


def _picture(images: Sequence[Tensor], side: int, said: str) -> str:
    """Heads side by side as one PNG, each as large as ``side`` pixels of the page."""
    scale = [max(1, side // max(image.shape[:2])) for image in images]
    large = [
        image.repeat_interleave(n, 0).repeat_interleave(n, 1)[: 4 * side, : 4 * side]
        for image, n in zip(images, scale, strict=True)
    ]
    height, gap = max(image.shape[0] for image in large), 3
    width = sum(image.shape[1] for image in large) + gap * (len(large) - 1)
    canvas = torch.zeros(height, width, 4, dtype=torch.uint8)  # transparent, whatever the ground is
    x = 0
    for image in large:
        canvas[: image.shape[0], x : x + image.shape[1], :3] = image
        canvas[: image.shape[0], x : x + image.shape[1], 3] = 255
        x += image.shape[1] + gap
    shown = round(side / height * width) if height > side else width
    data = base64.b64encode(_png(canvas)).decode()
    return (
        f'<img alt="{html.escape(printable(said))}" width="{shown}" height="{min(height, side)}" '
        f'src="data:image/png;base64,{data}">'
    )


def _png(pixels: Tensor) -> bytes:
    """Rows columns 4, uint8, as a PNG (ISO/IEC 15948)."""
    height, width, _ = pixels.shape
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, width * 4)], 1)
    body = zlib.compress(bytes(lines.flatten().tolist()), 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _scrolled(table: str) -> str:
    return f'<div style="overflow-x:auto">{table}</div>'


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"<div>{html.escape(printable(line))}</div>" for line in lines)


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
