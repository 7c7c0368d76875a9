"""The widget: what the kernel answers, what its output carries, and a notebook that nobody runs any more."""

from __future__ import annotations

import base64
import gc
import gzip
import os
import re
import sys
import webbrowser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hookattn
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import RenderError

pytest.importorskip("anywidget")

from hookattn.render import page_size, show
from hookattn.render.html_page import page, page_pieces
from hookattn.render.html_shell import viewer_module
from hookattn.render.widget import Widget
from tests.render.test_html_page import contents


@pytest.fixture(scope="module")
def trace() -> hookattn.Trace:
    ids = example_tokens(0, length=8)
    with torch.no_grad():
        return hookattn.trace(load_pretrained(), ids, tokens=[[f"t{i}" for i in ids[0].tolist()]])


def asked(widget: Widget, content: Any) -> list[tuple[dict[str, Any], list[bytes]]]:
    """What the widget answers to a message of the front end."""
    sent: list[tuple[dict[str, Any], list[bytes]]] = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers or []))
    widget._handle_custom_msg(content, [])
    return sent


def test_the_kernel_answers_with_bytes(trace: hookattn.Trace, tmp_path: Path) -> None:
    path = Path(trace.save(tmp_path / "a.safetensors"))
    widget, data = Widget(path), path.read_bytes()
    shown = widget.get_state()  # what the front end is handed
    assert shown["_size"] == len(data) and shown["_name"] == "a.safetensors"
    for start, end in ((0, 8), (100, 5000), (len(data), len(data)), (0, len(data))):
        answer = asked(widget, {"kind": "read", "id": "x-1", "start": start, "end": end})
        assert answer == [({"id": "x-1", "kind": "bytes"}, [data[start:end]])]
    path.unlink()  # it reads on
    assert widget.read(0, 8) == data[:8]


def test_a_second_trace_is_read_beside_the_first(trace: hookattn.Trace, tmp_path: Path) -> None:
    first, second = (Path(t.save(tmp_path / f"{t.calls[-1].site.layer}.safetensors")) for t in (trace, trace[:1]))
    widget = Widget(first, compare=second)
    assert widget.get_state()["_compare"] == {"name": second.name, "size": second.stat().st_size}
    assert Widget(first).get_state()["_compare"] == {}
    answer = asked(widget, {"kind": "read", "id": 1, "of": "compare", "start": 3, "end": 900})
    assert answer == [({"id": 1, "kind": "bytes"}, [second.read_bytes()[3:900]])]
    ((content, _),) = asked(widget, {"kind": "read", "id": 1, "of": "other", "start": 0, "end": 8})
    assert content["message"] == "of='other': expected one of trace, compare."
    text = Path(widget.save_page(tmp_path / "a.html")).read_text("utf-8")
    assert text == page(first, compare=second, state={})


def test_what_cannot_be_read_is_said(trace: hookattn.Trace, tmp_path: Path) -> None:
    path = Path(trace.save(tmp_path / "a.safetensors"))
    widget = Widget(path)
    size = path.stat().st_size
    for start, end in ((-1, 3), (3, 2), (0, size + 1), (None, 3), (0.5, 3), (0, 10**30)):
        ((content, buffers),) = asked(widget, {"kind": "read", "id": 1, "start": start, "end": end})
        assert content["kind"] == "error" and "there are none such" in content["message"] and not buffers
    os.truncate(path, 100)
    ((content, _),) = asked(widget, {"kind": "read", "id": 1, "start": 50, "end": 200})
    assert content["message"] == f"the trace file was cut to 100 of {size} bytes; show it again."
    for other in ({"kind": "write"}, "text", {}, None):
        assert asked(widget, other) == []
    widget.close()
    ((content, _),) = asked(widget, {"kind": "read", "id": 1, "start": 0, "end": 8})
    assert "closed" in content["message"]


def test_a_trace_in_memory_is_in_a_temporary_file_as_long_as_the_widget(trace: hookattn.Trace) -> None:
    before = _open_traces()  # of other tests
    widget = Widget(trace)
    (target,) = _open_traces() - before
    assert target.exists() and widget.read(0, target.stat().st_size) == target.read_bytes()
    assert torch.equal(hookattn.load(target)[0].weights, trace[0].weights)
    widget.close()
    del widget
    gc.collect()
    assert not target.parent.exists()


def _open_traces() -> set[Path]:
    return {Path(t) for link in Path("/proc/self/fd").iterdir() if (t := _target(link)).endswith("trace.safetensors")}


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_the_selection_is_observed_and_set(trace: hookattn.Trace) -> None:
    widget, seen = Widget(trace, state={"layer": 1}, theme="dark"), []
    assert widget.state == {"layer": 1} and widget.options == {"theme": "dark"}
    widget.observe(lambda change: seen.append(change["new"]), names="state")
    widget.set_state({"state": {"layer": 0, "heads": [2]}})  # as the front end does
    widget.state = {"layer": 1}
    assert seen == [{"layer": 0, "heads": [2]}, {"layer": 1}]
    state = widget.get_state()
    assert state["_esm"] == viewer_module() and {"_size", "_name", "options", "state"} <= set(state)
    with pytest.raises(RenderError, match="theme"):
        Widget(trace, theme="pink")


def test_the_saved_page_begins_with_the_selection(trace: hookattn.Trace, tmp_path: Path) -> None:
    widget = Widget(trace, theme="light")
    widget.state = {"layer": 1, "heads": [3]}
    text = Path(widget.save_page(tmp_path / "a.html")).read_text("utf-8")
    assert text == page(trace, theme="light", state={"layer": 1, "heads": [3]})


def displayed(widget: Widget, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    widget._ipython_display_()
    return shown


def test_the_output_carries_the_page(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    widget = Widget(trace)
    first, second = displayed(widget, monkeypatch)
    assert first["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    assert "text/html" not in first and first["text/plain"] == "Widget(Trace(2 calls of InductionTransformer))"
    packed = re.search(r'<script type="application/x-hookattn-page">([^<]*)</script>', second["text/html"])
    assert packed is not None
    text = gzip.decompress(base64.b64decode(packed[1])).decode("utf-8")
    assert text == page(trace) and contents(text)[0]["tokens"] == trace.tokens
    # Where no script runs, what stands outside of them is seen: the still picture.
    bare = re.sub(r"<script.*?</script>", "", second["text/html"], flags=re.S)
    assert trace._repr_html_() in bare and "hidden" not in bare.partition(trace._repr_html_())[0]
    assert len(displayed(Widget(trace, page=False), monkeypatch)) == 1


def test_a_trace_too_large_for_the_notebook_says_so(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_size, "ROOM", 10)
    monkeypatch.setattr("hookattn.render.widget.ROOM", 10)
    _, second = displayed(Widget(trace), monkeypatch)
    assert "a page of this trace would take" in second["text/html"] and "hookattn view FILE" in second["text/html"]


# ------------------------------------------------------------------------------------------------ what show() picks


def test_show_makes_a_widget_in_a_notebook(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    shown = show(trace, state={"layer": 1})
    assert isinstance(shown, Widget) and shown.state == {"layer": 1}
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "hookattn.render.widget")
    with pytest.raises(RenderError, match=r"needs the package anywidget.*hookattn\[view\]"):
        show(trace)


def test_show_opens_a_page_elsewhere(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(webbrowser, "open", opened.append)
    path = Path(show(trace, theme="dark"))
    assert opened == [path.as_uri()] and path.read_text("utf-8") == page(trace, theme="dark")
    with pytest.raises(RenderError, match="theme"):
        show(trace, theme="pink")


def test_show_serves_what_is_too_large(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    served: list[Any] = []
    monkeypatch.setattr(page_size, "ROOM", 10)
    monkeypatch.setitem(page_pieces.__kwdefaults__, "limit", 10)
    monkeypatch.setattr("hookattn.render.server.serve", lambda given, **options: served.append((given, options)))
    assert show(trace, theme="dark") is None
    assert served == [(trace, {"theme": "dark"})]


def test_show_leaves_nothing_behind_where_there_is_no_page(
    trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RenderError, match="theme"):
        show(trace, theme="pink")
    assert not list(tmp_path.iterdir())
