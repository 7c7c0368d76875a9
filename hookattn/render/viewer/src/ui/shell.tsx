import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { type App, current } from "../app";
import { message } from "../errors";
import { where } from "../data/call";
import { fieldOf } from "../data/kinds";
import { encode } from "../state";
import type { View } from "../views/view";
import { caption, fileName } from "./caption";
import { Controls } from "./controls";
import { download, toPng, toSvg } from "./export";
import { KEYS, keyName, press } from "./keyboard";
import { Badge, Edits, Notice, Notices } from "./notice";
import { Table } from "./table";

/** The page around a view. */
export function Shell({ app, views }: { app: App; views: readonly View[] }) {
  const state = app.state.value;
  const view = views.find((v) => v.id === state.view)!;
  const { call } = current(app);
  const ids = views.map((v) => v.id);
  const fields = view.fields(state).map((field) => fieldOf(call, field));
  const unfit = view.unfit?.(call) ?? null;
  const missing = fields.find((field) => !app.trace.has(call, field));
  const figure = useRef<HTMLDivElement>(null);
  const help = useRef<HTMLDialogElement>(null);
  const { model } = app.trace.document;
  const onKey = (event: KeyboardEvent) => {
    if (help.current?.open) return; // what is behind it waits, and Escape closes it
    if (event.key === "?") help.current?.showModal();
    else if (!press(app, event, ids)) return;
    event.preventDefault();
  };
  const page = app.options.link === true;
  // In a page of its own keys need no click first: what nothing else has the focus for is meant for the viewer.
  const late = useRef(onKey);
  late.current = onKey;
  // Before the page is painted: who opens it may press one at once.
  useLayoutEffect(() => {
    if (!page) return;
    const listen = (event: KeyboardEvent) => event.target === document.body && late.current(event);
    document.addEventListener("keydown", listen);
    return () => document.removeEventListener("keydown", listen);
  }, [page]);
  return (
    <div
      class="ha"
      data-theme={app.dark.value ? "dark" : "light"}
      data-page={page}
      tabIndex={-1}
      onKeyDown={onKey}
    >
      <header class="top">
        <h1 dir="auto">{app.trace.source.name}</h1>
        {model.class && <span class="quiet">{model.class}</span>}
        <span class="quiet">{where(call)}</span>
        <button
          class="plain"
          title="The certificates of all calls"
          onClick={() => app.set({ view: "certificates" })}
        >
          <Badge call={call} />
        </button>
        <Edits call={call} />
      </header>
      <p class="caption">{caption(app, view).join(" · ")}</p>
      <div class="bar">
      <div class="tabs" role="tablist" aria-label="Views">
        {views.map((v) => (
          <button
            key={v.id}
            type="button"
            role="tab"
            aria-selected={v.id === view.id}
            title={v.help}
            onClick={() => app.set({ view: v.id })}
          >
            {v.label}
          </button>
        ))}
      </div>
      <Controls app={app} view={view} />
      </div>
      <Notices app={app} call={call} fields={fields} />
      <div class="figure" ref={figure} role="tabpanel" aria-label={`${view.label}: ${view.help}`} data-view={view.id}>
        {unfit !== null ? (
          <Notice>{unfit}</Notice>
        ) : missing !== undefined ? (
          <Notice error>{app.trace.lacks(missing, call).message}</Notice>
        ) : (
          <view.component app={app} />
        )}
      </div>
      <div aria-live="polite">{!view.ownTable && app.trace.has(call, fieldOf(call, state.field)) && <Table app={app} />}</div>
      <Foot app={app} view={view} figure={() => figure.current!} help={() => help.current?.showModal()} />
      <dialog class="help" ref={help}>
        <p>{view.help}</p>
        <table>
          {KEYS.map((k) => (
            <tr key={k.does}>
              <td>
                {(k.keys.length > 4 ? [k.keys[0]!, "…", k.keys.at(-1)!] : k.keys).map((key) => (
                  <kbd key={key}>{keyName(key)}</kbd>
                ))}
              </td>
              <td>{k.does}</td>
            </tr>
          ))}
        </table>
        {!page && <p>Keys go to the viewer once it was clicked, or was reached with Tab.</p>}
        <form method="dialog">
          <button>Close</button>
        </form>
      </dialog>
    </div>
  );
}

function Foot({ app, view, figure, help }: { app: App; view: View; figure(): HTMLElement; help(): void }) {
  const [told, tell] = useState("");
  const act = (work: () => Promise<string>) => () => {
    work().then(tell, (error: unknown) => tell(message(error)));
  };
  const named = (ending: string) => `${fileName(app, view)}.${ending}`;
  const title = () => caption(app, view);
  return (
    <div class="foot">
      <button
        onClick={act(async () => download(new Blob([toSvg(figure(), title())], { type: "image/svg+xml" }), named("svg")))}
      >
        SVG
      </button>
      <button onClick={act(async () => download(await toPng(figure(), title()), named("png")))}>
        PNG
      </button>
      {app.options.link && (
        <button
          onClick={act(async () => copy(`${location.href.replace(/#.*$/, "")}#${encode(app.state.value)}`))}
        >
          Copy link
        </button>
      )}
      <button onClick={help}>
        Keys <kbd>?</kbd>
      </button>
      <span class="quiet" role="status">
        {told}
      </span>
    </div>
  );
}

async function copy(text: string): Promise<string> {
  // Not there in a page that is not secure, or in a frame without the permission.
  if (!("clipboard" in navigator)) return "The address of the page is the link to this selection.";
  await navigator.clipboard.writeText(text);
  return "The link to this selection is in the clipboard.";
}
