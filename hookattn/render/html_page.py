"""One HTML file with the trace and the viewer in it: it opens offline, and fetches nothing."""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from .. import checks
from ..errors import RenderError, TraceWriteError
from ..store.document import save
from ..store.format import LENGTH_BYTES, METADATA_KEY, data_start, encode_document, frame_header
from ..store.partial import PartialFile, explaining_os_errors
from ..store.scratch import scratch
from .html_shell import content_policy, module_script, page_head, page_tail, viewer_module
from .options import script_json, viewer_options
from .page_size import LIMIT, Narrowed, narrowed
from .trace_files import TraceLike, as_trace, name_of, title_of

BLOCK = 1 << 18
"""Bytes of one block, which is what is decoded at once: a head of 512 tokens in 8-bit codes."""

# Codes of noise repeat by chance, and to name such a repetition takes more than the codes; masks are nothing but runs.
_STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY)

# The module is packed as the blocks are: what unpacks these unpacks it.
_OPEN = """
  const packed = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0));
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const { mount, embedded } = await import("data:text/javascript;charset=utf-8," + encodeURIComponent(text));
  const part = (id) => document.getElementById(id);
  return {
    mount,
    source: embedded(part("trace")),
    compare: part("compare") && embedded(part("compare")),
    options: JSON.parse(part("options").textContent),
  };
"""


def page(
    trace: TraceLike,
    *,
    compare: TraceLike | None = None,
    state: Mapping[str, Any] | None = None,
    scores: Any = None,
    images: Mapping[str, Any] | None = None,
    theme: str = "auto",
    title: str | None = None,
    fields: Sequence[str] | None = None,
) -> str:
    """The trace as a self-contained HTML page: viewer and data are inside, and nothing is fetched.

    A small trace is in it bit for bit. Of a larger one the weights become 8-bit codes (a weight is off by 0.004 at the
    most), other numbers 16-bit floats, and fields that have no room are left out; the page says all of that.

    Args:
        trace: a trace (in memory, loaded, compact, or a part of one), or the path of a trace file.
        compare: a second one, for the compare view.
        state: the selection shown first, such as ``{"view": "matrix", "layer": 3, "heads": [5]}``.
        scores: by which heads are sorted: the table of :func:`hookattn.analyze.report`, or plain data.
        images: what the patches of a vision model were cut of; see docs/viewer.md.
        theme: ``"light"``, ``"dark"`` or ``"auto"``.
        title: of the page; by default the model and the file.
        fields: what to keep, such as ``("q", "k", "v", "weights", "mask")``; by default what four million bytes have
            room for, the weights and the mask in any case.

    Raises:
        PageTooLargeError: says how large it is, and what shows it all the same.
        RenderError: options of another form.
        FieldNotCaptured, SelectionError: ``fields`` names what is not there.
        TraceFileError: the path is not that of a trace file.
    """
    given: dict[str, Any] = {"state": state, "scores": scores, "images": images, "theme": theme}
    return "".join(page_pieces(trace, compare=compare, title=title, fields=fields, **given))


def save_page(trace: TraceLike, path: str | PathLike[str], **options: Any) -> str:
    """Write :func:`page` to a file, which appears whole or not at all; returns its path.

    Args:
        trace: as there.
        path: the file; an older one is replaced.
        options: those of :func:`page`.

    Raises:
        TraceWriteError: it cannot be written there; and what :func:`page` raises.
    """
    target = Path(checks.path("path", path, TraceWriteError))
    file = PartialFile(target)
    size = 0
    try:
        for piece in page_pieces(trace, **options):
            data = piece.encode("utf-8")
            with explaining_os_errors(target, "write the page", size + len(data)):
                file.write(size, data)
            size += len(data)
        with explaining_os_errors(target, "finish the page", size):
            file.commit(size)
    finally:
        file.discard()
    return os.fspath(path)


def page_pieces(
    trace: TraceLike,
    *,
    compare: TraceLike | None = None,
    title: str | None = None,
    fields: Sequence[str] | None = None,
    limit: int = LIMIT,
    **given: Any,
) -> Iterator[str]:
    """The text of :func:`page`, piece by piece; ``given`` is for the viewer."""
    first = as_trace(trace)
    second = None if compare is None else as_trace(compare, "compare")
    if title is not None:
        checks.text("title", title, error=RenderError)
    options = viewer_options(trace=first, **given)
    made = {"trace": narrowed(first, fields, limit)}
    if second is not None:
        made["compare"] = narrowed(second, fields, limit)
    text = module_script(_OPEN % _packed(viewer_module().encode("utf-8")))
    yield page_head(
        title_of(first) if title is None else title, content_policy(text, module="data: blob:", connect="'none'")
    )
    yield f'<script type="application/json" id="options">{script_json(options)}</script>\n'
    for (name, part), source in zip(made.items(), (first, second), strict=False):
        assert source is not None
        yield f'<div id="{name}" hidden>\n'
        yield from _trace_elements(part, name_of(source))
        yield "</div>\n"
    yield page_tail(text)


def _trace_elements(made: Narrowed, name: str) -> Iterator[str]:
    """The bytes of a trace file, header first, as ``<script>`` elements of base64, which holds nothing that is HTML."""
    with scratch() as folder:
        path = save(made.trace, os.path.join(folder, "page.safetensors"), linked=False)  # as the viewer reads it
        with open(path, "rb") as file:
            header, start = _narrowed_header(file, made)
            yield _script_element(0, header, f' data-name="{html.escape(name)}"')
            at = len(header)
            file.seek(start)
            while data := file.read(BLOCK):
                yield _script_element(at, data)
                at += len(data)


def _narrowed_header(file: BinaryIO, made: Narrowed) -> tuple[bytes, int]:
    """The file's header with what was narrowed, and where the file's data starts."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    header = json.loads(file.read(length))
    document = json.loads(header["__metadata__"][METADATA_KEY])
    coding = {document["calls"][i]["fields"][field]: entry for (i, field), entry in made.coding.items()}
    document["notes"] += made.notes
    more = {"coding": coding, "left_out": list(made.left_out)}
    header["__metadata__"][METADATA_KEY] = encode_document(document | {k: v for k, v in more.items() if v})
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return frame_header(raw, data_start(raw)), LENGTH_BYTES + length


def _script_element(start: int, data: bytes, more: str = "") -> str:
    # The viewer decodes the blocks that it shows, so that a page of 200 MB opens as fast as a small one.
    packed = _packed(data)
    return (
        f'<script type="application/x-hookattn" data-start="{start}" data-end="{start + len(data)}" '
        f'data-codec="gzip"{more}>{packed}</script>\n'
    )


def _packed(data: bytes) -> str:
    return base64.b64encode(min((_gzip(data, strategy) for strategy in _STRATEGIES), key=len)).decode()


def _gzip(data: bytes, strategy: int) -> bytes:
    # Its header has no time, so that the same trace gives the same page.
    packer = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    return packer.compress(data) + packer.flush()
