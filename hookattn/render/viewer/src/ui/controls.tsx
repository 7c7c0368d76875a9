import type { ComponentChildren } from "preact";
import { type App, current, focus } from "../app";
import { look } from "../colours";
import { editsOfHead, tell } from "../data/edits";
import { fieldOf, hasApplied, weightsOf } from "../data/kinds";
import { measures } from "../options";
import { type Field, type Filter, matches, type Over, type Pool, type Scale, type Sink, type State, type Thumbs } from "../state";
import { Menu } from "./menu";
import { Named, Segments, Slider } from "./inputs";
import { Player } from "./player";
import type { ControlName, View } from "../views/view";

interface ControlProps {
  app: App;
  view: View;
}

export function Controls({ app, view }: ControlProps) {
  const of = (names: readonly ControlName[]) =>
    names.map((name) => {
      const Control = CONTROLS[name];
      return <Control key={name} app={app} view={view} />;
    });
  const display = DISPLAY.filter((name) => view.controls.includes(name) && (ofWeights(app, view) || !OF_WEIGHTS.has(name)));
  return (
    <div class="controls" role="group" aria-label="What is shown">
      <Stack app={app} />
      <Player app={app} />
      <Batch app={app} />
      {of(view.controls.filter((name) => !DISPLAY.includes(name)))}
      {display.length > 0 && (
        <Menu name="Display" told={displayed(app, display)}>
          {of(display)}
        </Menu>
      )}
    </div>
  );
}

/** The layers of the stack and kind in view. */
export function layers(app: App, state: State): (number | null)[] {
  const calls = app.trace.calls.filter(
    (c) => c.step === state.step && c.site.stack === state.stack && c.site.kind === state.kind,
  );
  return distinct(calls.map((c) => c.site.layer)).sort((a, b) => (a ?? -1) - (b ?? -1));
}

function distinct<T>(values: T[]): T[] {
  return [...new Set(values)];
}

function Stack({ app }: { app: App }) {
  const state = app.state.value;
  const names = distinct(app.trace.calls.map((c) => JSON.stringify([c.site.stack, c.site.kind])));
  if (names.length < 2) return null;
  return (
    <Named name="Attention">
      <select
        value={JSON.stringify([state.stack, state.kind])}
        onChange={(event) => {
          const [stack, kind] = JSON.parse(event.currentTarget.value) as [string, string];
          app.set({ stack, kind, nth: 0, query: null, key: null, zoom: null });
        }}
      >
        {names.map((name) => (
          <option key={name} value={name}>
            {(JSON.parse(name) as string[]).join(" · ")}
          </option>
        ))}
      </select>
    </Named>
  );
}

function Batch({ app }: { app: App }) {
  const { call } = current(app);
  const entries = Array.from({ length: call.extents.B }, (_, b) => b);
  return (
    <Slider
      name="Batch"
      values={entries}
      value={app.state.value.batch}
      text={String}
      pick={(batch) => app.set({ batch })}
    />
  );
}

function Layer({ app }: { app: App }) {
  const state = app.state.value;
  const same = matches(app.trace, state);
  return (
    <>
      <Slider
        name="Layer"
        values={layers(app, state)}
        value={state.layer}
        text={(l) => (l === null ? "–" : String(l))}
        pick={(layer) => app.set({ layer, nth: 0 })}
      />
      {same.length > 1 && (
        <Named name="Module">
          <select value={state.nth} onChange={(event) => app.set({ nth: Number(event.currentTarget.value) })}>
            {same.map((c, i) => (
              <option key={c.index} value={i}>
                {c.site.path || "the model itself"}
              </option>
            ))}
          </select>
        </Named>
      )}
    </>
  );
}

/** Click: this head alone. With ctrl, cmd or shift, or by “all”: several. */
function Heads({ app }: { app: App }) {
  const state = app.state.value;
  const { call } = current(app);
  const all = state.heads.length === call.headNumbers.length;
  const one = focus(state);
  const pick = (head: number, more: boolean) => {
    if (!more) return app.set({ heads: [head] });
    const rest = state.heads.filter((h) => h !== head);
    app.set({ heads: rest.length === state.heads.length ? [...rest, head] : rest.length > 0 ? rest : [head] });
  };
  return (
    <div class="control" role="group" aria-label="Heads">
      <span class="name">Heads</span>
      <div class="chips">
        {call.headNumbers.map((head) => {
          const edits = editsOfHead(call, head).map(tell);
          const told = edits.length > 0 ? `, edited: ${edits.join("; ")}` : "";
          return (
            <button
              key={head}
              type="button"
              class={head === one && state.heads.length > 1 ? "chip focus" : "chip"}
              aria-pressed={state.heads.includes(head)}
              aria-label={`Head ${head}${told}`}
              title={`Head ${head}${told}: click to see it alone, ctrl-click to add or remove it`}
              style={{ borderBottomColor: state.heads.includes(head) ? look(head).colour : "var(--line)" }}
              onClick={(event) => pick(head, event.ctrlKey || event.metaKey || event.shiftKey)}
            >
              {head}
              {told !== "" && <span class="mark">✎</span>}
            </button>
          );
        })}
        {call.headNumbers.length > 1 && (
          <button
            class="all"
            onClick={() => app.set({ heads: all ? [one] : [...call.headNumbers.filter((h) => h !== one), one] })}
          >
            &nbsp;{all ? "one" : "all"}&nbsp;
          </button>
        )}
      </div>
    </div>
  );
}

function FieldControl({ app }: { app: App }) {
  const { call } = current(app);
  const of: [Field, string, string?][] = [
    ["weights", "weights"],
    ...(hasApplied(call) ? [APPLIED] : []),
    ["scores", "scores"],
    ["mask", "mask"],
  ];
  const value = fieldOf(call, app.state.value.field);
  return <Segments name="Field" value={value} of={of} pick={(field) => app.set({ field })} />;
}

const APPLIED: [Field, string, string] = [
  "applied",
  "applied",
  "What met the values: the weights as the model changed them after the softmax",
];

/** For a view of weights alone, where there are two kinds of them. */
function WeightsControl({ app }: { app: App }) {
  const { call } = current(app);
  if (!hasApplied(call)) return null;
  const of: [Field, string, string?][] = [["weights", "weights", "As the softmax made them"], APPLIED];
  const value = weightsOf(call, app.state.value.field);
  return <Segments name="Weights" value={value} of={of} pick={(field) => app.set({ field })} />;
}

/** What has a meaning for weights alone is not there while another field is shown. */
function ofWeights(app: App, view: View): boolean {
  const { field } = app.state.value;
  return field === "weights" || field === "applied" || !view.controls.includes("field");
}

/** How what is chosen is drawn: in one menu, the same in all views. */
const DISPLAY: readonly ControlName[] = ["over", "scale", "sink", "pool", "thumbs"];
const OF_WEIGHTS: ReadonlySet<ControlName> = new Set(["scale", "sink", "pool"]);

const OVERS: [Over, string, string][] = [
  ["one", "one", "Each head as it is; where one matrix is shown, that of the last head chosen"],
  ["mean", "mean", "The mean over the heads chosen, or over all of the layer where only one is"],
  ["max", "max", "The largest over the heads chosen, or over all of the layer where only one is"],
];

/** What differs from how a page opens, so that the closed menu says it. */
function displayed(app: App, names: readonly ControlName[]): string {
  const { over, scale, sink, pool, thumbs } = app.state.value;
  const said: Partial<Record<ControlName, string | false>> = {
    over: over !== "one" && `${over} of heads`,
    scale: scale === "log" && "log",
    sink: sink !== "show" && `first key ${sink === "drop" ? "dropped" : "renormalised"}`,
    pool: pool === "sum" && "sums",
    thumbs: thumbs === "lines" && "lines",
  };
  return names
    .map((name) => said[name])
    .filter(Boolean)
    .join(", ");
}

function OverControl({ app }: { app: App }) {
  return <Segments name="Heads" value={app.state.value.over} of={OVERS} pick={(over) => app.set({ over })} />;
}

function ThumbsControl({ app }: { app: App }) {
  const of: [Thumbs, string][] = [
    ["matrix", "matrices"],
    ["lines", "lines"],
  ];
  return <Segments name="Thumbnails" value={app.state.value.thumbs} of={of} pick={(thumbs) => app.set({ thumbs })} />;
}

function ScaleControl({ app }: ControlProps) {
  const of: [Scale, string][] = [
    ["linear", "linear"],
    ["log", "log"],
  ];
  return <Segments name="Scale" value={app.state.value.scale} of={of} pick={(scale) => app.set({ scale })} />;
}

function PoolControl({ app }: ControlProps) {
  const of: [Pool, string, string][] = [
    ["max", "largest", "Where a pixel covers several numbers, it shows the largest"],
    ["sum", "sum", "Where a pixel covers several numbers, it shows their sum"],
  ];
  return <Segments name="Pooled" value={app.state.value.pool} of={of} pick={(pool) => app.set({ pool })} />;
}

function SinkControl({ app }: ControlProps) {
  const of: [Sink, string, string][] = [
    ["show", "shown", "All weights as they are"],
    ["drop", "dropped", "Without the first key that is attended to"],
    ["renormalise", "renormalised", "Without it, and each row's other weights made to sum to one"],
  ];
  return <Segments name="First key" value={app.state.value.sink} of={of} pick={(sink) => app.set({ sink })} />;
}

function FilterControl({ app }: { app: App }) {
  const { axes } = current(app);
  if (axes.queries.segments === null || axes.keys.segments === null) return null;
  const of: [Filter, string, string][] = [
    ["all", "all", "Both sentences"],
    ["AA", "A→A", "Within the first sentence"],
    ["AB", "A→B", "From the first sentence to the second"],
    ["BA", "B→A", "From the second sentence to the first"],
    ["BB", "B→B", "Within the second sentence"],
  ];
  return <Segments name="Pair" value={app.state.value.filter} of={of} pick={(filter) => app.set({ filter })} />;
}

function SortControl({ app }: { app: App }) {
  const state = app.state.value;
  const known = measures(app.options.scores);
  if (known.length === 0) return null;
  const chosen = known.find(([name]) => name === state.sort)?.[1];
  return (
    <>
      <Named name="Order">
        <select
          value={state.sort}
          title={chosen?.description}
          onChange={(event) => app.set({ sort: event.currentTarget.value, least: null })}
        >
          <option value="layer">by layer</option>
          {known.map(([name]) => (
            <option key={name} value={name}>
              by {name}
            </option>
          ))}
        </select>
      </Named>
      {chosen !== undefined && (
        <Named name={`at least${chosen.unit ? ` (${chosen.unit})` : ""}`}>
          <input
            type="number"
            step="any"
            style={{ width: "90px" }}
            value={state.least ?? ""}
            onInput={(event) =>
              app.set({ least: event.currentTarget.value === "" ? null : Number(event.currentTarget.value) })
            }
          />
        </Named>
      )}
    </>
  );
}

const CONTROLS: Readonly<Record<ControlName, (props: ControlProps) => ComponentChildren>> = {
  layer: Layer,
  heads: Heads,
  over: OverControl,
  thumbs: ThumbsControl,
  field: FieldControl,
  weights: WeightsControl,
  scale: ScaleControl,
  pool: PoolControl,
  sink: SinkControl,
  filter: FilterControl,
  sort: SortControl,
};
