import { type App, current, focus, stored } from "../app";
import { type Domain, domain, ramp } from "../colours";
import { type Call, where } from "../data/call";
import { type Axes, axesOf } from "../data/labels";
import { fieldOf } from "../data/kinds";
import { at, extent, type Matrix } from "../data/matrix";
import { difference, differing, merged, misfit, twinOf } from "../data/pairs";
import { type Pyramid, pyramid } from "../data/pool";
import { firstOf, presented } from "../data/presented";
import { absence, type Shown, shownHead } from "../data/shown";
import type { Trace } from "../data/trace";
import { exact } from "../format";
import { joined, rangeOf } from "../scale";
import { Slices } from "../slices";
import { placeOf } from "../state";
import { Distances } from "../ui/distances";
import { useFrame } from "../ui/frame";
import { useLoaded, useWidth } from "../ui/hooks";
import { Legend } from "../ui/legend";
import { Badge, Edits, Notice } from "../ui/notice";
import { levelOf, place, Plane, ZoomButtons } from "../ui/plane";
import { name, strongest, Tabular } from "../ui/table";
import type { View } from "./view";

const GAP = 18;
/** Tokens that differ, named one by one; more are counted. */
const NAMED = 30;

interface Side {
  matrix: Matrix;
  levels: Pyramid;
}

function Compare({ app }: { app: App }) {
  const other = app.other!;
  const state = app.state.value;
  const { batch, sink, filter } = state;
  const { call, axes } = current(app);
  const field = fieldOf(call, state.field);
  const [ref, room] = useWidth();
  const [frame, setFrame] = useFrame(app);
  const twin = twinOf(app.trace, other, call);
  const asked = focus(state);
  const head = twin === null ? asked : common(call, twin, state.heads);
  const missing = twin === null ? null : absent(other, twin, field, head);
  const { value, error } = useLoaded(async (signal) => {
    if (twin === null || missing !== null) return null;
    const last = Math.min(batch, twin.extents.B - 1);
    const others = axesOf(other, twin, last, [head]);
    const [a, b] = await Promise.all([
      shownHead(app.trace, call, field, batch, stored(call, head)),
      shownHead(other, twin, field, last, stored(twin, head)),
    ]);
    const slices = new Slices(10, signal);
    const side = async (matrix: Matrix, pool: "max" | "far" = "max"): Promise<Side> => ({
      matrix,
      levels: await pyramid(matrix, pool, slices),
    });
    const range = async (shown: Shown, { matrix }: Side) => rangeOf(matrix, firstOf(shown.matrix, field, sink), slices);
    const first = await side(presented(a.matrix, field, sink, filter, axes));
    const second = await side(presented(b.matrix, field, sink, filter, others));
    const reason = misfit(call, twin);
    const apart = reason === null ? await side(difference(first.matrix, second.matrix, field !== "scores"), "far") : null;
    return {
      axes,
      others,
      first,
      second,
      apart,
      range: joined([await range(a, first), await range(b, second)]),
      reason,
      field,
      left: first.matrix !== a.matrix || second.matrix !== b.matrix,
      a,
      b,
    };
  }, [app, call, twin, missing, head, batch, field, sink, filter]);
  if (twin === null) return <Alone app={app} other={other} />;
  if (missing !== null) return <Notice error>{missing}</Notice>;
  if (error !== null) return <Notice error>{error}</Notice>;
  if (value === null || room === 0)
    return (
      <div ref={ref} class="quiet">
        Reading head {head} …
      </div>
    );
  const { others, first, second, apart, reason } = value;
  const columns = room > 2000 ? 4 : room > 620 ? 2 : 1;
  const width = Math.floor((room - (columns - 1) * GAP) / columns);
  const most = Math.max(260, Math.min(900, globalThis.innerHeight * 0.55));
  const dark = app.dark.value;
  const { low, high, end } = value.range;
  const shared = domain(value.field, state.scale, low, high, value.field === "scores" ? Infinity : end);
  const told = (query: number, key: number) => {
    const cell = (side: Side, of: Shown) => shown(at(side.matrix, query, key), value.field, absence(of, query, key));
    const there = query < second.matrix.rows && key < second.matrix.cols;
    const here = query < first.matrix.rows && key < first.matrix.cols;
    return [
      here && `A: ${name(value.axes.queries, query)} → ${name(value.axes.keys, key)}: ${cell(first, value.a)}`,
      there && `B: ${name(others.queries, query)} → ${name(others.keys, key)}: ${cell(second, value.b)}`,
      apart !== null && `B − A: ${cell(apart, value.a)}`,
    ]
      .filter(Boolean)
      .join("\n");
  };
  const plane = (label: string, side: Side, of: Axes, scaling: Domain) => (
    <Plane
      app={app}
      levels={side.levels}
      axes={of}
      layout={place(side.matrix.rows, side.matrix.cols, of, width, most, frame)}
      frame={frame}
      setFrame={setFrame}
      domain={scaling}
      ramp={ramp(scaling.kind, dark)}
      label={`${value.field} of head ${head}, ${label}, queries down, keys across`}
      told={told}
    />
  );
  const titled = (label: string, of: Trace, c: Call) => (
    <div class="title">
      <span class="label">
        {label}: {of.source.name}
      </span>{" "}
      <Badge call={c} short /> <Edits call={c} />
    </div>
  );
  const far = apart === null ? 0 : Math.max(...extent(apart.matrix).map((x) => Math.abs(x) || 0));
  const between: Domain = { kind: "diverging", scale: "linear", low: -(far || 1), high: far || 1, clipped: false };
  const level = apart && levelOf(apart.levels, place(apart.matrix.rows, apart.matrix.cols, axes, width, most, frame));
  return (
    <div ref={ref}>
      {uneven(app, other)}
      {head !== asked && (
        <Notice>
          B, {other.source.name}, has no head {asked} of {where(twin)}: shown is head {head}, which both have.
        </Notice>
      )}
      {reason !== null && <Notice>There is no difference to draw: {reason}.</Notice>}
      <Tokens app={app} a={value.axes} b={others} />
      <div class="panels" style={{ gap: `${GAP}px` }}>
        <div style={{ width: `${width}px` }}>
          {titled("A", app.trace, call)}
          {plane("A", first, value.axes, shared)}
        </div>
        <div style={{ width: `${width}px` }}>
          {titled("B", other, twin)}
          {plane("B", second, others, shared)}
        </div>
        {apart !== null && (
          <div style={{ width: `${width}px` }} data-side="difference">
            <div class="title">
              <span class="label">B − A{far === 0 ? ": no difference" : ""}</span>
            </div>
            {plane("B − A", apart, merged(value.axes, others), between)}
          </div>
        )}
        <div style={{ width: `${Math.min(width, 420)}px` }}>
          <Distances app={app} other={other} />
        </div>
      </div>
      <div class="foot">
        <Legend
          domain={shared}
          ramp={ramp(shared.kind, dark)}
          dropped={value.left || value.a.masks || value.b.masks}
          blank={value.a.masks || value.b.masks ? (value.left ? "masked or left out" : "masked") : "left out"}
          {...(value.field === "mask" && { choice: "may attend" })}
          title={`${value.field}, head ${head}, A and B`}
        />
        {apart !== null && (
          <Legend
            domain={between}
            ramp={ramp("diverging", dark)}
            dropped={false}
            title={`B − A${level ? `, the largest of ${2 ** level}×${2 ** level}` : ""}`}
          />
        )}
        <ZoomButtons frame={frame} setFrame={setFrame} rows={first.matrix.rows} cols={first.matrix.cols} />
      </div>
      {apart !== null && (
        <Differences app={app} head={head} sides={[first, second, apart]} axes={merged(value.axes, others)} />
      )}
    </div>
  );
}

/** The cells of the selection, or of all, in which the two differ most. */
function Differences({ app, head, sides, axes }: { app: App; head: number; sides: readonly [Side, Side, Side]; axes: Axes }) {
  const state = app.state.value;
  const { query, key } = state;
  const apart = sides[2].matrix;
  const { value: pairs } = useLoaded(
    async (signal) => {
      const sizes = { ...apart, data: apart.data.map(Math.abs) };
      return (await strongest(sizes, query, key, new Slices(10, signal))).filter((pair) => pair.value > 0);
    },
    [apart, query, key],
  );
  if (pairs === null) return null;
  const of = query !== null ? `, query ${name(axes.queries, query)}` : "";
  return (
    <div aria-live="polite">
      <Tabular
        summary={`Head ${head}${of}: where A and B differ most`}
        columns={["query", "key", "A", "B", "B − A"]}
        rows={pairs.map((pair) => [
          name(axes.queries, pair.query),
          name(axes.keys, pair.key),
          ...sides.map(({ matrix }) => at(matrix, pair.query, pair.key)),
        ])}
      />
    </div>
  );
}

function shown(value: number, field: string, absent: string): string {
  return Number.isNaN(value) ? absent : field === "mask" ? "may attend" : exact(value);
}

/** The head that is compared: the last one chosen that both have, else the first that both have. */
function common(call: Call, twin: Call, chosen: readonly number[]): number {
  const both = call.headNumbers.filter((h) => twin.headNumbers.includes(h));
  return chosen.findLast((h) => both.includes(h)) ?? both[0] ?? chosen.at(-1) ?? 0;
}

/** Why the second trace cannot show this head: it was not kept, or the field was not captured. */
function absent(other: Trace, twin: Call, field: string, head: number): string | null {
  if (!other.has(twin, field)) return `B, ${other.source.name}: ${other.lacks(field, twin).message}`;
  if (twin.headNumbers.includes(head)) return null;
  return `B, ${other.source.name}, has no head ${head} of ${where(twin)}: it has ${twin.headNumbers.join(", ")}.`;
}

function Alone({ app, other }: { app: App; other: Trace }) {
  const { call } = current(app);
  const known = [...new Set(other.calls.map(({ site }) => `${site.stack} ${site.kind}`))];
  const steps = new Set(other.calls.map((c) => c.step)).size;
  const both = app.trace.calls.find((c) => twinOf(app.trace, other, c) !== null);
  return (
    <Notice>
      B, {other.source.name}, has nothing to compare with {where(call)}. It has {other.calls.length} calls in{" "}
      {steps === 1 ? "one step" : `${steps} steps`}: {known.join(", ")} attention.{" "}
      {both !== undefined && (
        <button onClick={() => app.set({ ...placeOf(app.trace, both), query: null, key: null, zoom: null })}>
          Show {where(both)}, which both have
        </button>
      )}
    </Notice>
  );
}

/** What is in one trace alone. */
function uneven(app: App, other: Trace) {
  const lonely = app.trace.calls.filter((c) => twinOf(app.trace, other, c) === null).length;
  const more = other.calls.filter((c) => twinOf(other, app.trace, c) === null).length;
  if (lonely === 0 && more === 0) return null;
  return (
    <Notice>
      {lonely} of the {app.trace.calls.length} calls of A have no counterpart in B, and {more} of the{" "}
      {other.calls.length} of B none in A.
    </Notice>
  );
}

/** The tokens that are not the same in both. */
function Tokens({ app, a, b }: { app: App; a: Axes; b: Axes }) {
  const own = current(app).call.site.kind === "self";
  const found = [...differing(a.keys, b.keys), ...(own ? [] : differing(a.queries, b.queries))];
  if (found.length === 0) return null;
  return (
    <div class="readout quiet">
      {found.length === 1 ? "One token differs" : `${found.length} tokens differ`}:{" "}
      {found.slice(0, NAMED).map((pair) => (
        <span key={pair.position} class="token">
          {pair.position} <b>{pair.a}</b> → <b>{pair.b}</b>
        </span>
      ))}
      {found.length > NAMED && "…"}
    </div>
  );
}

export const compare: View = {
  id: "compare",
  label: "Compare",
  help:
    "The same head in two traces, and their difference. One cursor for all; the list says which heads are far apart, " +
    "and chooses one.",
  fields: (state) => [state.field],
  controls: ["layer", "field", "scale", "sink", "filter", "heads"],
  ownTable: true,
  absent: (app) => (app.other === null ? "There is no second trace." : null),
  component: Compare,
};
