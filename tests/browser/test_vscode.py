"""The way in which VS Code shows a notebook's outputs, imitated: VS Code itself is not run.

Imitated, after its sources and those of its Jupyter extension:

- All outputs are in one webview: a sandboxed frame of another origin than the page around it (VS Code).
- With no content policy, which is what VS Code has for outputs by default, and with a strict one: nothing fetched but
  from `https:`, scripts of the page's own and from `blob:`, frames of `data:` and `https:` alone, so that a worker made
  of a blob is refused, and so is a module in a `data:` address. VS Code has one of this kind as an experiment; that one
  has no `blob:` either, and no anywidget could load with it.
- HTML is put in with `innerHTML`, into an element without a shadow root; its scripts run afterwards, each as a copy
  that is appended and removed at once, and not at all where the workspace is not trusted.
- A widget is loaded from anywidget's own AMD module, the one that is installed, by `define`, with a stand-in for
  `@jupyter-widgets/base`; its ES module comes from a blob's address. The kernel's side is a real
  :class:`~hookattn.render.widget.Widget`, which answers messages and takes states as over a comm.
- The theme: the classes and the attribute of the body, and variables `--vscode-…`; the style sheet's rules for tables.
- Keys that reach the webview's window are handed on to VS Code, where they are shortcuts.

Not imitated: the widget manager of the Jupyter extension and its transport, scrolling and virtual outputs, trusted
types, what VS Code does with the keys, and the extension's white ground below widgets (the viewer has its own).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hookattn

pytest.importorskip("anywidget")

import anywidget

from hookattn.render.widget import Widget

pytestmark = pytest.mark.browser

HOST, WEBVIEW = "http://vscode.test", "http://webview.test"
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' https: http: data:; font-src 'self' https:; connect-src https:; child-src https: data:"
)
OUTER = f"""<!doctype html><meta charset="utf-8"><body tabindex="0">
<script>window.heard = []; addEventListener("message", ({{ data }}) => heard.push(data));</script>
<iframe src="{WEBVIEW}/index.html" style="width: 1200px; height: 860px"
 sandbox="allow-scripts allow-same-origin allow-forms allow-pointer-lock allow-downloads"></iframe>"""
INNER = """<!doctype html><html lang="en" style="--vscode-foreground: #cccccc; --vscode-editor-background: #1f1f1f">
<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="%s"><style>
body { color: var(--vscode-foreground); background: var(--vscode-editor-background); padding: 0; }
table, thead, tr, th, td, tbody { border: none !important; border-collapse: collapse; border-spacing: 0; }
table { width: 100%%; } th, td { padding: 4px 8px; } table, th, tr { text-align: left !important; }
tr:nth-child(even) { background-color: rgba(130, 130, 130, 0.08); }
</style></head>
<body class="vscode-dark" data-vscode-theme-kind="vscode-dark" style="overflow: auto"><div id="container"></div>
<script src="/host.js"></script><script src="/anywidget.js"></script></body></html>"""

# What VS Code, its renderer of HTML and its manager of widgets do.
JAVASCRIPT = """
addEventListener("keydown", ({ key, ctrlKey }) => parent.postMessage([key, ctrlKey], "*"));
function place() {
  const output = document.createElement("div");
  output.className = "output";
  document.getElementById("container").append(output);
  return output;
}
function html(text, trusted) {
  const element = document.createElement("div");
  element.innerHTML = text;
  place().append(element);
  for (const script of trusted ? [...element.querySelectorAll("script")] : []) {
    const copy = document.createElement("script");
    copy.text = script.innerText;
    if (script.type) copy.type = script.type;
    element.append(copy);
    copy.remove();
  }
}
class DOMWidgetModel {
  listeners = [];
  constructor(state) {
    this.state = state;
    this.initialize();
  }
  initialize() {}
  get(name) { return this.state[name]; }
  set(name, value) {
    this.state = { ...this.state, [name]: value };
    this.trigger(`change:${name}`);
  }
  on(name, heard, context) { this.listeners.push({ name, heard, context }); }
  once(name, heard, context) { this.on(name, heard, context); }
  off(name, heard, context) {
    const is = (given, own) => given === null || given === undefined || given === own;
    this.listeners = this.listeners.filter((l) => !(is(name, l.name) && is(heard, l.heard) && is(context, l.context)));
  }
  trigger(name, ...given) { for (const l of [...this.listeners]) if (l.name === name) l.heard.apply(l.context, given); }
  save_changes() { toKernel({ state: this.state.state }); }
  async send(content) {
    for (const [answer, buffers] of await toKernel({ content })) {
      const bytes = buffers.map((b) => new DataView(Uint8Array.from(atob(b), (c) => c.charCodeAt(0)).buffer));
      this.trigger("msg:custom", answer, bytes);
    }
  }
}
class DOMWidgetView {
  constructor(model) {
    this.model = model;
    this.el = document.createElement("div");
    this.el.className = (model.get("_dom_classes") ?? []).join(" ");
    this.$el = { empty: () => this.el.replaceChildren() };
  }
  remove() { this.el.remove(); }
}
function define(needs, factory) {
  if (needs.join() !== "@jupyter-widgets/base") throw new Error(`it needs ${needs}`);
  window.widgets = factory({ DOMWidgetModel, DOMWidgetView });
}
function widget(state) {
  window.model = new widgets.AnyModel(state);
  const view = new widgets.AnyView(model);
  place().append(view.el);
  view.render();
}
"""
REFUSED = "Content Security Policy directive"
"""What Chromium says of a worker that the policy refuses; the viewer then works on the page."""


class Shown:
    """A notebook's webview, in its host.

    Attributes:
        tab: the page around it.
        policy: the webview's content policy; empty: none.
        frame: the webview.
        kernel: the widget that answers, once one is shown.
    """

    def __init__(self, open_page: Callable[..., Any], policy: str, **options: Any) -> None:
        self.policy = policy
        self.tab = open_page(**options)
        self.kernel: Widget | None = None
        module = (Path(anywidget.__file__).parent / "nbextension" / "index.js").read_text("utf-8")
        files = {
            f"{HOST}/index.html": ("text/html", OUTER),
            f"{WEBVIEW}/index.html": ("text/html", INNER % policy),
            f"{WEBVIEW}/host.js": ("text/javascript", JAVASCRIPT),
            f"{WEBVIEW}/anywidget.js": ("text/javascript", module),
        }

        def answer(route: Any) -> None:
            kind, text = files[route.request.url]
            route.fulfill(status=200, headers={"Content-Type": f"{kind}; charset=utf-8"}, body=text)

        self.tab.route(lambda url: url in files, answer)
        self.tab.expose_function("toKernel", self._answered)
        self.tab.goto(f"{HOST}/index.html")
        self.tab.frame_locator("iframe").locator("#container").wait_for(state="attached")
        self.frame = next(frame for frame in self.tab.frames if frame.url.startswith(WEBVIEW))
        self.frame.wait_for_function("window.widgets !== undefined")

    def html(self, text: str, trusted: bool = True) -> None:
        """An output of HTML."""
        self.frame.evaluate("([text, trusted]) => html(text, trusted)", [text, trusted])

    def widget(self, kernel: Widget) -> Any:
        """An output that is a widget; returns its viewer."""
        self.kernel = kernel
        state = {name: x for name, x in kernel.get_state().items() if isinstance(x, str | int | dict | list | tuple)}
        self.frame.evaluate("(state) => widget(state)", json.loads(json.dumps(state, default=str)))
        return self.frame.locator(".ha")

    def heard(self) -> list[Any]:
        """Keys that got to VS Code."""
        return [key for key, _ in self.tab.evaluate("heard")]

    def worked_here(self) -> None:
        """Takes out of the page's problems that a worker was refused, as a strict policy has it."""
        said = [one for one in self.tab.problems if REFUSED in one and "worker" in one]
        assert bool(said) == bool(self.policy)
        self.tab.problems[:] = [one for one in self.tab.problems if one not in said]

    def _answered(self, message: dict[str, Any]) -> list[Any]:
        assert self.kernel is not None
        if "state" in message:
            self.kernel.set_state({"state": message["state"]})
            return []
        sent: list[Any] = []
        self.kernel.send = lambda content, buffers=None: sent.append(
            [content, [base64.b64encode(buffer).decode() for buffer in buffers or []]]
        )
        self.kernel._handle_custom_msg(message["content"], [])
        return sent


@pytest.fixture(params=["", POLICY], ids=["no policy", "strict"])
def shown(open_page: Callable[..., Any], request: pytest.FixtureRequest) -> Shown:
    """A notebook in the dark, on a system that is light."""
    return Shown(open_page, request.param, color_scheme="light")


@pytest.mark.parametrize("trusted", [True, False])
def test_a_trace_and_a_call_are_seen(shown: Shown, trace: hookattn.Trace, trusted: bool) -> None:
    shown.html(trace._repr_html_(), trusted)
    shown.html(trace[0]._repr_html_(), trusted)
    pictures = shown.frame.locator("img")
    assert pictures.count() == 2 + 4
    natural = pictures.evaluate_all(
        "all => all.map(one => one.decode().then(() => [one.naturalWidth, one.naturalHeight]))"
    )
    assert len(natural) == 6
    sizes = pictures.evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    assert all(width > 0 and height > 0 for width, height in sizes)
    assert shown.frame.get_by_text("Trace(2 calls of Layers)", exact=True).is_visible()
    # The text has the host's colour, whatever that is.
    assert (
        shown.frame.get_by_text("faithful: output").evaluate("e => getComputedStyle(e).color") == "rgb(204, 204, 204)"
    )


def test_the_widget_lives(shown: Shown, trace: hookattn.Trace) -> None:
    viewer = shown.widget(Widget(trace))
    viewer.locator("[data-view=overview] canvas").first.wait_for()
    assert viewer.count() == 1 and viewer.get_attribute("data-theme") == "dark"
    assert "2 layers × 4 heads" in viewer.locator(".figure").inner_text()
    viewer.get_by_role("tab", name="Matrix").click()
    viewer.locator(".plane canvas").first.wait_for()
    assert shown.kernel is not None
    shown.frame.wait_for_function("model.get('state').view === 'matrix'")
    assert shown.kernel.state["view"] == "matrix"
    shown.frame.evaluate("model.set('state', { view: 'matrix', layer: 0, heads: [2] })")
    viewer.locator("header", has_text="layer 0").wait_for()
    assert viewer.locator(".chips [aria-pressed=true]").all_inner_texts() == ["2"]
    shown.worked_here()


def test_it_follows_the_theme(shown: Shown, trace: hookattn.Trace) -> None:
    viewer = shown.widget(Widget(trace))
    viewer.locator(".figure canvas").first.wait_for()
    for kind, theme in (
        ("vscode-light", "light"),
        ("vscode-high-contrast", "dark"),
        ("vscode-high-contrast-light", "light"),
    ):
        extra = " vscode-high-contrast" if kind.endswith("contrast-light") else ""
        shown.frame.evaluate(
            """([kind, extra]) => {
              document.body.className = kind + extra;
              document.body.dataset.vscodeThemeKind = kind;
            }""",
            [kind, extra],
        )
        shown.frame.locator(f'.ha[data-theme="{theme}"]').wait_for(timeout=5_000)
    shown.worked_here()


def test_keys_go_where_they_are_pressed(shown: Shown, trace: hookattn.Trace) -> None:
    viewer = shown.widget(Widget(trace))
    viewer.locator(".figure canvas").first.wait_for()
    viewer.locator("h1").click()
    for key in ("d", "d", "x", "z", "ArrowDown", "3"):
        shown.tab.keyboard.press(key)
    viewer.locator("[data-view=matrix]").wait_for()
    assert shown.heard() == []
    shown.tab.keyboard.press("Control+s")
    assert shown.heard()[-1] == "s"
    shown.frame.evaluate("() => { document.body.tabIndex = 0; document.body.focus(); }")
    shown.tab.keyboard.press("4")
    assert shown.heard()[-1] == "4"
    assert viewer.locator("[data-view=matrix]").count() == 1
    shown.worked_here()


def test_beside_a_living_widget_its_page_stays_hidden(shown: Shown, trace: hookattn.Trace) -> None:
    kernel = Widget(trace)
    viewer = shown.widget(kernel)
    shown.html(kernel._fallback())
    viewer.locator(".figure canvas").first.wait_for()
    shown.tab.wait_for_timeout(4_000)
    assert shown.frame.locator("iframe").count() == 0 and not shown.frame.locator("[data-still]").is_visible()
    shown.worked_here()


def test_without_a_kernel_the_page_is_shown(open_page: Callable[..., Any], trace: hookattn.Trace) -> None:
    """A saved notebook that is opened: the widget does not come, and its page is a frame in the webview."""
    shown = Shown(open_page, "", color_scheme="light")
    shown.html(Widget(trace)._fallback())
    inside = shown.frame.frame_locator("iframe[title=hookattn]")
    inside.locator("[data-view=overview] canvas").first.wait_for(timeout=30_000)
    assert inside.locator(".ha").get_attribute("data-theme") == "dark"
    shown.frame.locator("[data-still]").wait_for(state="hidden", timeout=5_000)
    assert shown.frame.get_by_text("The widget is not running here").is_visible()


def test_where_a_policy_refuses_the_page_the_still_picture_stays(
    open_page: Callable[..., Any], trace: hookattn.Trace
) -> None:
    shown = Shown(open_page, POLICY, color_scheme="light")
    shown.html(Widget(trace)._fallback())
    shown.frame.locator("iframe[title=hookattn]").wait_for(timeout=10_000)
    assert shown.frame.locator("[data-still] img").first.is_visible()
    shown.frame.locator("iframe[title=hookattn]").wait_for(state="detached", timeout=45_000)
    assert shown.frame.locator("[data-still] img").first.is_visible()
    assert not shown.frame.get_by_text("The widget is not running here").is_visible()
    said, shown.tab.problems[:] = list(shown.tab.problems), []
    assert said and all(REFUSED in one or "dynamically imported module" in one for one in said)


def test_without_a_kernel_or_trust_the_still_picture_is(shown: Shown, trace: hookattn.Trace) -> None:
    shown.html(Widget(trace)._fallback(), trusted=False)
    shown.tab.wait_for_timeout(4_000)
    assert shown.frame.locator("[data-still] img").count() == 2 and shown.frame.locator("iframe").count() == 0
    assert shown.frame.locator("[data-still] img").first.is_visible()
