"""The viewer as a widget for notebooks: the kernel hands out the bytes that are looked at."""

from __future__ import annotations

import base64
import gzip
import html
import os
import uuid
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import anywidget
import traitlets

from .. import checks
from ..calls.still import still_html
from ..errors import PageTooLargeError, RenderError
from ..traces import Trace
from .html_page import page_pieces, save_page
from .html_shell import viewer_module
from .options import viewer_options
from .page_size import ROOM
from .trace_files import TraceLike, as_trace, name_of, trace_file

_READ = 1 << 28
"""The most bytes of one message."""

# A notebook is read in many places. Where the widget does not come to life (no kernel, or an export), the page does;
# where that does not either (a notebook that is not trusted, a code host, a policy that refuses its script), the still
# picture is what is left.
_FALLBACK = """<div id="{id}"><div data-still>{still}</div>
<p data-said hidden style="margin:0 0 4px">The widget is not running here: this is the page that was saved with it.</p>
<script type="application/x-hookattn-page">{page}</script></div>
<script>(() => {{
  const box = document.getElementById("{id}");
  if (!box) return;
  const [still, said, packed] = box.children;
  const data = packed.textContent;
  const drawn = (x) => x.shadowRoot && x.shadowRoot.querySelector(".figure");
  const live = () => [...document.querySelectorAll(".{live}, .{live} *")].some(drawn);
  let waited = 0, frame = null;
  box.hidden = true;
  async function show() {{
    box.hidden = false;
    if (!data) return;
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const text = await new Response(unpacked).text();
    frame = document.createElement("iframe");
    frame.title = "hookattn";
    frame.style.cssText = "width: 100%; height: 720px; border: 0";
    frame.srcdoc = text;
    box.append(frame);
  }}
  function follow() {{
    if (!frame) return;
    // In a sandbox a frame may not be looked into: then it is taken to be drawn.
    const inside = frame.contentDocument;
    const view = inside && inside.getElementById("viewer");
    if (inside && !(view && drawn(view))) return;
    still.hidden = true;
    said.hidden = false;
  }}
  const timer = setInterval(() => {{
    if (live() || !box.isConnected) {{
      clearInterval(timer);
      box.hidden = true;
      if (frame) frame.remove();
    }} else if (++waited === 12) show();
    else if (!still.hidden && waited <= 132) {{
      follow();
      if (waited === 132 && frame && !still.hidden) frame.remove();
    }}
  }}, 250);
}})();</script>
"""


class Widget(anywidget.AnyWidget):
    """A trace in Jupyter, JupyterLab, VS Code, Colab or marimo. Its selection is :attr:`state`, in both directions.

    ``widget.observe(f, names="state")`` calls ``f`` when the reader selects something; ``widget.state = {...}``
    selects. What is shown is read from the trace file when it is needed, exactly, so the trace can be of any size. The
    output also carries a self-contained page, which shows where no kernel runs (in a saved or exported notebook), and a
    still picture, which shows where no script runs either.

    Attributes:
        state: the selection, such as ``{"view": "matrix", "layer": 3, "heads": [5], ...}``.
        options: what the viewer was handed: theme, scores, images.

    Raises:
        RenderError: options of another form.
        TraceFileError: the path is not that of a trace file.
    """

    state = traitlets.Dict().tag(sync=True)
    options = traitlets.Dict().tag(sync=True)
    _name = traitlets.Unicode().tag(sync=True)
    _size = traitlets.Int().tag(sync=True)
    _compare = traitlets.Dict().tag(sync=True)
    _close: weakref.finalize[..., Widget] | None = None  # a widget is closed, too, that could not be made

    def __init__(
        self,
        trace: TraceLike,
        *,
        compare: TraceLike | None = None,
        state: Mapping[str, Any] | None = None,
        scores: Any = None,
        images: Mapping[str, Any] | None = None,
        theme: str = "auto",
        page: bool = True,
    ) -> None:
        """Make the widget; it shows when it is the last line of a cell.

        Args:
            trace: a trace, or the path of a trace file; one that is not in a file is written to a temporary one.
            compare: a second one, for the compare view.
            state: the selection shown first.
            scores: by which heads are sorted: the table of :func:`hookattn.analyze.report`, or plain data.
            images: what the patches of a vision model were cut of.
            theme: ``"light"``, ``"dark"`` or ``"auto"``.
            page: whether the output carries the self-contained page and the still picture too, up to some megabytes of
                the notebook.
        """
        self._trace, self._page = as_trace(trace), checks.flag("page", page)
        given: dict[str, Any] = {"scores": scores, "images": images, "theme": theme}
        options = viewer_options(state=state, trace=self._trace, **given)
        shown = {"trace": self._trace} | ({} if compare is None else {"compare": as_trace(compare, "compare")})
        with ExitStack() as stack:
            # If the second file cannot be opened, the first is closed; after that the finalizer owns both.
            self._files = {name: _open_file(stack, of) for name, of in shown.items()}
            kept = stack.pop_all()
        self._close = weakref.finalize(self, kept.close)
        self._given = {**given, "state": state, "compare": shown.get("compare")}
        self._class = _unique_name()
        self._esm = viewer_module()
        super().__init__(
            state=options.pop("state", {}),
            options=options,
            _name=name_of(self._trace),
            _size=self._files["trace"].size,
            _compare={"name": name_of(shown["compare"]), "size": self._files["compare"].size}
            if "compare" in shown
            else {},
            _dom_classes=[self._class],
        )
        self.on_msg(_answer_request)

    def __repr__(self) -> str:
        return f"Widget({self._trace!r})"

    def read(self, start: int, end: int, of: str = "trace") -> bytes:
        """The bytes of the trace file from ``start`` up to ``end``.

        Args:
            start, end: in bytes.
            of: ``"trace"``, or ``"compare"``: the second one.

        Raises:
            RenderError: there are no such bytes, or they cannot be read any more.
        """
        checks.word("of", of, self._files, RenderError)
        descriptor, size = self._files[of]
        if not (type(start) is int and type(end) is int and 0 <= start <= end <= size):
            raise RenderError(f"bytes {start!r} to {end!r} of a trace of {size} bytes: there are none such.")
        if end - start > _READ:
            raise RenderError(f"{end - start} bytes at once; at most {_READ} fit in one message.")
        if self._close is None or not self._close.alive:
            raise RenderError("the widget is closed; show the trace again.")
        made = b""
        while len(made) < end - start:
            os.lseek(descriptor, start + len(made), os.SEEK_SET)
            more = os.read(descriptor, end - start - len(made))
            if not more:
                raise RenderError(f"the trace file was cut to {start + len(made)} of {size} bytes; show it again.")
            made += more
        return made

    def save_page(self, path: str | os.PathLike[str], **options: Any) -> str:
        """Write what is shown, the present selection first, to one HTML file; as :func:`hookattn.render.save_page`."""
        return save_page(self._trace, path, **{**self._given, "state": self.state, **options})

    def close(self) -> None:
        """Close the widget and its file."""
        super().close()
        if self._close is not None:
            self._close()

    def _ipython_display_(self, **kwargs: Any) -> None:
        from IPython.display import display

        bundle = self._repr_mimebundle_()
        assert bundle is not None
        display(bundle[0], raw=True)  # type: ignore[no-untyped-call]
        if self._page:
            # An output of its own: of one that has both forms exporters take the widget, and what runs it off the net.
            display({"text/html": self._fallback(), "text/plain": ""}, raw=True)  # type: ignore[no-untyped-call]

    def _fallback(self) -> str:
        try:
            text = "".join(page_pieces(self._trace, **self._given, limit=2 * ROOM))
            packed, said = base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode(), ""
        except PageTooLargeError as error:
            packed, said = "", f"<p>hookattn: {html.escape(str(error))}</p>"
        still = said + still_html(self._trace, "trace")
        return _FALLBACK.format(id=_unique_name(), live=self._class, still=still, page=packed)


def _answer_request(widget: Widget, content: Any, buffers: Any) -> None:
    if not isinstance(content, dict) or content.get("kind") != "read":
        return
    # Messages come from the page and may hold anything: what is not asked well is answered with an error, and the page
    # that sent it goes on. The id lets the viewer match answers to requests, of which several are under way.
    answer = {"id": content.get("id")}
    try:
        data = widget.read(content.get("start"), content.get("end"), content.get("of", "trace"))  # type: ignore[arg-type]
    except (RenderError, OSError) as error:
        widget.send({**answer, "kind": "error", "message": str(error)})
    else:
        widget.send({**answer, "kind": "bytes"}, buffers=[data])


def _unique_name() -> str:
    return f"hookattn-{uuid.uuid4().hex[:12]}"


class _OpenFile(NamedTuple):
    """A file by its descriptor: one that is replaced under its name is read as it was.

    Attributes:
        descriptor: of the operating system.
        size: bytes.
    """

    descriptor: int
    size: int


def _open_file(stack: ExitStack, trace: Trace) -> _OpenFile:
    """The file of a trace, until the stack is closed."""
    descriptor = os.open(stack.enter_context(trace_file(trace)), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    stack.callback(os.close, descriptor)
    return _OpenFile(descriptor, os.fstat(descriptor).st_size)
