/**
 * The viewer of hookattn traces, as one ES module.
 *
 *     import { mount, embedded, served } from "./hookattn-viewer.js";
 *     mount(element, embedded(), { link: true });          // a trace inside the page
 *     mount(element, await served("/trace"), { theme: "dark" });
 *
 *     const trace = await Trace.open(embedded());          // the numbers without the page: one head at a time
 *     const { rows, cols, data } = await trace.head(trace.calls[0], "weights", 0, 3);
 *     const { queries, keys } = axesOf(trace, trace.calls[0], 0);   // what its rows and columns are called
 *
 * The default export is the front end of a notebook widget, in anywidget's protocol.
 */
import { effect } from "@preact/signals";
import { h, render } from "preact";
import { type App, open } from "./app";
import { variables } from "./colours";
import { message, ViewerError } from "./errors";
import { find } from "./find";
import type { Findings } from "./findings";
import type { Options, Scores } from "./options";
import { asked, type WidgetModel } from "./source/widget";
import type { Source } from "./source/source";
import { decode, encode, type State } from "./state";
import { darkness } from "./theme";
import { caption } from "./ui/caption";
import { toPng, toSvg } from "./ui/export";
import { Shell } from "./ui/shell";
import style from "./ui/style.css";
import { VIEWS } from "./views/index";

export { Trace } from "./data/trace";
export { axesOf } from "./data/labels";
export { shownOver } from "./data/over";
export { headline, headSentence, pairSentence } from "./data/sentences";
export { isSpecial, marksOf, readPieces } from "./pieces";
export { rangeOf } from "./scale";
export { Slices } from "./slices";
export { embedded } from "./source/embedded";
export { served } from "./source/served";
export { readable, segments } from "./tokens";
export type { Source, Options, Scores, State };

export interface Viewer {
  /** The selection; null until the trace is open. */
  readonly state: State | null;
  /** What is found of the heads so far; null until the trace is open. */
  readonly findings: Findings | null;
  /** Resolves when the trace is open and drawn, or its error is. */
  readonly ready: Promise<void>;
  set(state: Partial<State>): void;
  destroy(): void;
  /** What the view in front has drawn, under a title that says what it is. */
  svg(): string;
  png(): Promise<Blob>;
}

/** Show a trace in `el`. Errors are shown there too. */
export function mount(el: HTMLElement, source: Source, options: Options = {}): Viewer {
  const shadow = el.shadowRoot ?? el.attachShadow({ mode: "open" });
  const sheet = document.createElement("style");
  sheet.textContent = variables() + style;
  const root = document.createElement("div");
  shadow.replaceChildren(sheet, root);
  root.addEventListener("keydown", keep);
  const theme = darkness(el.ownerDocument, options.theme);
  let app: App | null = null;
  let gone = false;
  let stop = () => {};
  const pending: Partial<State> = { ...options.state, ...(options.link ? decode(location.hash) : {}) };
  const onHash = () => app?.set(decode(location.hash));
  if (options.link) addEventListener("hashchange", onHash);

  function onState(state: State): void {
    if (options.link) history.replaceState(null, "", `#${encode(state)}`);
    options.onState?.(state);
  }

  render(h("div", { class: "ha", "data-theme": theme.dark.value ? "dark" : "light" }, "Opening the trace …"), root);
  const ready = open(source, { ...options, state: pending, onState }, theme.dark, VIEWS)
    .then((opened) => {
      if (gone) return;
      if (opened.trace.calls.length === 0) throw new ViewerError(empty(opened));
      const views = VIEWS.filter((v) => !v.absent?.(opened));
      app = opened;
      app.set(pending);
      render(h(Shell, { app, views }), root);
      stop = findIn(app);
    })
    .catch((error: unknown) => {
      const notice = h("div", { class: "notice error", role: "alert" }, message(error));
      if (!gone) render(h("div", { class: "ha", "data-theme": theme.dark.value ? "dark" : "light" }, notice), root);
    });

  const figure = () => {
    const found = root.querySelector<HTMLElement>(".figure");
    if (found === null) throw new ViewerError("Nothing is drawn yet: wait for `ready`.");
    return found;
  };
  const title = () => caption(app!, VIEWS.find((view) => view.id === app!.state.value.view)!);
  return {
    get state() {
      return app?.state.value ?? null;
    },
    get findings() {
      return app?.findings.value ?? null;
    },
    ready,
    set(state) {
      if (app === null) Object.assign(pending, state);
      else app.set(state);
    },
    destroy() {
      gone = true;
      stop();
      theme.stop();
      removeEventListener("hashchange", onHash);
      render(null, root);
      shadow.replaceChildren();
    },
    svg: () => toSvg(figure(), title()),
    png: async () => toPng(figure(), title()),
  };
}

/** Keys without a modifier that are pressed in the viewer are the viewer's, those too that it has no use for: to a
 * notebook around it two times `d` mean to delete the cell. What has Ctrl, Alt or Meta goes on: saving, say. */
function keep(event: KeyboardEvent): void {
  if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
}

/** Measures the heads of the trace, and those of the second one once it is shown alone. */
function findIn(app: App): () => void {
  const stops = [find(app)];
  let begun = false;
  const follow = effect(() => {
    if (begun || app.other === null || app.state.value.side !== "b") return;
    begun = true;
    const { scores: _, ...options } = app.options;
    stops.push(find({ ...app, trace: app.other, findings: app.otherFindings, options }));
  });
  return () => [follow, ...stops].forEach((stop) => stop());
}

function empty({ trace }: App): string {
  const skipped = trace.document.skipped.map((s) => `${s.path || "the model itself"}: ${s.reason}`);
  return ["There is no attention call in this trace.", ...skipped].join("\n");
}

export default {
  render({ model, el }: { model: WidgetModel; el: HTMLElement }): () => void {
    const source = asked(model, "trace", { name: String(model.get("_name")), size: Number(model.get("_size")) });
    const second = (model.get("_compare") ?? {}) as { name?: string; size?: number };
    const compare =
      second.size === undefined ? null : asked(model, "compare", { name: second.name ?? "", size: second.size });
    const options = (model.get("options") ?? {}) as Options;
    const viewer = mount(el, source, {
      ...options,
      ...(compare && { compare }),
      state: (model.get("state") ?? {}) as Partial<State>,
      onState(state) {
        model.set("state", state);
        model.save_changes();
      },
    });
    const follow = () => viewer.set((model.get("state") ?? {}) as Partial<State>);
    model.on("change:state", follow);
    return () => {
      model.off("change:state", follow);
      source.close();
      compare?.close();
      viewer.destroy();
    };
  },
};
