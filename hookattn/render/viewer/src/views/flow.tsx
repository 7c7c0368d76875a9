import { useMemo, useState } from "preact/hooks";
import type { App } from "../app";
import type { Call } from "../data/call";
import { type Axes, axesOf } from "../data/labels";
import { at, type Matrix } from "../data/matrix";
import { flowsToAll, type Paths, pathsOf, toAll } from "../data/paths";
import { mixing, refusal, RESIDUAL } from "../data/rollout";
import { type Link, type Strongest, strongest } from "../data/strongest";
import { exact, number, percent } from "../format";
import { Slices } from "../slices";
import type { Through } from "../state";
import { useLoaded, useWidth } from "../ui/hooks";
import { Segments } from "../ui/inputs";
import { Column, labelWidth, rowHeight } from "../ui/lines";
import { Notice } from "../ui/notice";
import { QueryControl, queryOf } from "../ui/query";
import { name, Tabular } from "../ui/table";
import { Tip, type TipAt } from "../ui/tip";
import type { View } from "./index";

const NUMBERS = 58;
const TOP = 38;
/** Beside the names, which may be wider than is reckoned. */
const MARGIN = 12;
/** Lines of all attention, behind the paths. */
const BEHIND = 1200;
const LEAST = 0.02;
/** Input tokens in the table. */
const ROWS = 100;

interface Graph {
  calls: readonly Call[];
  axes: Axes;
  layers: Matrix[];
  behind: Strongest;
}

function Flow({ app }: { app: App }) {
  const { step, stack, kind } = app.state.value;
  const calls = app.trace.calls.filter((c) => c.step === step && c.site.stack === stack && c.site.kind === kind);
  const why = refusal(app.trace, calls);
  return why === null ? <Layers app={app} calls={calls} /> : <Notice>{why}</Notice>;
}

function Layers({ app, calls }: { app: App; calls: readonly Call[] }) {
  const { batch, key: locked, through } = app.state.value;
  const [ref, room] = useWidth();
  const { value: graph, error } = useLoaded<Graph>(
    async (signal) => {
      const slices = new Slices(10, signal);
      const layers = await mixing(app.trace, calls, batch, slices);
      const axes = axesOf(app.trace, calls[0]!, batch);
      return { calls, axes, layers, behind: await strongest(layers, BEHIND, LEAST, slices) };
    },
    [app, calls[0], calls.length, batch],
  );
  const query = app.cursor.value.query ?? queryOf(app);
  const key = app.cursor.value.key ?? locked;
  const found = useLoaded(
    async (signal) => (graph === null ? null : { graph, through, ...(await pathsOf(graph.layers, through, query, key, signal)) }),
    [graph, through, query, key],
  );
  const many = graph !== null && through === "flow" && !flowsToAll(graph.layers);
  const all = useLoaded(
    async (signal) =>
      graph === null || through === "rollout" || many
        ? null
        : { graph, query, values: await toAll(graph.layers, query, signal) },
    [graph, through, query],
  );
  const path = found.value?.graph === graph ? found.value : null;
  const known = path?.through === "flow" && all.value?.graph === graph && all.value.query === path.query;
  const paths = path !== null && known ? { ...path, values: all.value!.values } : path;
  if (error !== null || found.error !== null) return <Notice error>{error ?? found.error}</Notice>;
  return (
    <div ref={ref}>
      <div class="controls">
        <Segments<Through>
          name="Through the layers"
          value={through}
          of={[
            ["rollout", "rollout", "Products of the layers: what a token is made of"],
            ["flow", "maximum flow", "The most that can go from one token to another, where each edge bounds it"],
          ]}
          pick={(next) => app.set({ through: next })}
        />
        <QueryControl app={app} />
      </div>
      {graph === null || paths === null || room === 0 ? (
        <div class="quiet">Following {calls.length} layers …</div>
      ) : (
        <>
          <div class="readout" aria-live="polite">
            {told(graph, paths, paths.through)}
          </div>
          <Drawing app={app} graph={graph} paths={paths} room={room} />
          <div class="readout quiet">{remarks(graph, paths, many)}</div>
          <Table graph={graph} paths={paths} through={paths.through} />
        </>
      )}
    </div>
  );
}

function told({ axes }: Graph, { query, key, total }: Paths, through: Through): string {
  const from = name(axes.queries, query);
  if (key === null) return `What ${from} is made of after the last layer, by rollout. Choose an input token for its paths.`;
  const to = name(axes.keys, key);
  return through === "rollout"
    ? `Of ${from} after the last layer, ${exact(total)} comes from input ${to}, by rollout, on these paths.`
    : `At most ${exact(total)} flows between ${from} after the last layer and input ${to}; one way that it can go.`;
}

function remarks({ calls }: Graph, { values, lines }: Paths, many: boolean): string {
  const layers = new Set(calls.map((c) => c.site.layer));
  const whole = calls[0]!.site.layers;
  const parts = [
    `Lines carry ${percent(lines.share)} of it; grey ones are the mean over the heads, with ${RESIDUAL} of each token ` +
      `past the attention, where that is at least ${LEAST}.`,
  ];
  if (whole !== null && layers.size < whole) parts.push(`Only ${layers.size} of ${whole} layers are in this trace.`);
  if (calls.some((c) => c.heads !== null)) parts.push("Not all heads were kept: the mean is over those that were.");
  if (many) parts.push("The flow is computed for one input token at a time: there are too many.");
  else if (values.includes(null)) parts.push("The flow to the other input tokens is being computed …");
  return parts.join(" ");
}

function Drawing({ app, graph, paths, room }: { app: App; graph: Graph; paths: Paths; room: number }) {
  const [tip, setTip] = useState<TipAt | null>(null);
  const state = app.state.value;
  const { queries, keys } = graph.axes;
  const { query, key, values, total, nodes, lines } = paths;
  const depth = graph.layers.length;
  const count = keys.labels.length;
  const most = Math.max(44, Math.min(170, room * 0.19));
  const [wide1, wide2] = [labelWidth(keys, most), labelWidth(queries, most)];
  const left = NUMBERS + MARGIN + wide1 + 6;
  const span = Math.max(60, Math.min(room - left - wide2 - MARGIN - 14, depth * 190));
  const right = left + span;
  const height = rowHeight(count);
  const width = right + wide2 + MARGIN + 14;
  const x = (level: number) => left + (span * level) / depth;
  const y = (i: number) => TOP + (i + 0.5) * height;
  const largest = values.reduce<number>((a, b) => Math.max(a, b ?? 0), 1e-12);
  const point = (event: PointerEvent | MouseEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const row = Math.floor((py - TOP) / height);
    const i = row >= 0 && row < count ? row : null;
    return { px, py, i, side: px < left - 4 ? "key" : px > right + 4 ? "query" : null } as const;
  };
  const line = (from: Link) => `M${x(from.of + 1)} ${y(from.query)}L${x(from.of)} ${y(from.key)}`;
  const behind = useMemo(
    () =>
      graph.behind.links.map((l) => (
        <path key={`${l.of} ${l.query} ${l.key}`} d={line(l)} stroke-width={(0.4 + 1.2 * l.value).toFixed(2)} />
      )),
    [graph, left, span],
  );
  const along = useMemo(
    () =>
      lines.links.map((l) => {
        const part = Math.min(1, l.value / (total || 1));
        return (
          <path
            key={`${l.of} ${l.query} ${l.key}`}
            class="path"
            data-value={l.value}
            d={line(l)}
            stroke-width={(1 + 5 * part).toFixed(2)}
            stroke-opacity={Math.max(0.2, part ** 0.4).toFixed(3)}
          />
        );
      }),
    [lines, left, span],
  );
  return (
    <div class="plane" style={{ width: `${width}px`, height: `${TOP + count * height + 4}px`, touchAction: "auto" }}>
      <svg
        style={{ pointerEvents: "auto" }}
        width={width}
        height={TOP + count * height + 4}
        role="img"
        aria-label={`Tokens through ${depth} layers, the input on the left; lines as strong as what they carry`}
        onPointerMove={(event) => {
          const { px, py, i, side } = point(event);
          app.cursor.value = { query: side === "query" ? i : null, key: side === "key" ? i : null };
          const level = Math.max(0, Math.min(depth, Math.round(((px - left) / span) * depth)));
          setTip(i === null || side !== null ? null : { x: px, y: py, text: atNode(graph, paths, level, i) });
        }}
        onPointerLeave={() => {
          setTip(null);
          app.cursor.value = { query: null, key: null };
        }}
        onClick={(event) => {
          const { i, side } = point(event);
          if (side !== null && i !== null) app.set({ [side]: state[side] === i ? null : i });
        }}
      >
        <LevelNames graph={graph} x={x} room={span / depth} />
        <g stroke="var(--muted)" stroke-opacity={0.2}>
          {behind}
        </g>
        <g stroke="var(--accent)" stroke-linecap="round">
          {along}
        </g>
        <g fill="var(--accent)">
          {nodes.map((level, l) =>
            Array.from(level, (mass, i) => {
              const part = mass / (total || 1);
              return (
                part > 0.002 && <circle key={`${l} ${i}`} cx={x(l)} cy={y(i)} r={(1.2 + 4 * Math.sqrt(part)).toFixed(2)} />
              );
            }),
          )}
        </g>
        {values.map(
          (value, i) =>
            value !== null && (
              <rect
                key={i}
                x={0}
                y={y(i) - Math.min(16, height - 1) / 2}
                width={((NUMBERS - 6) * value) / largest}
                height={Math.min(16, Math.max(1, height - 1))}
                fill="var(--hover)"
              />
            ),
        )}
        {height >= 14 &&
          values.map((value, i) => (
            <text key={i} class="faint" x={2} y={y(i)} dominant-baseline="central">
              {value === null ? "" : value.toFixed(4)}
            </text>
          ))}
        <Column axis={keys} x={left - 6} side="end" width={wide1} height={height} y={y} active={key} locked={state.key} />
        <Column
          axis={queries}
          x={right + 8}
          side="start"
          width={wide2}
          height={height}
          y={y}
          active={query}
          locked={state.query}
        />
      </svg>
      <Tip tip={tip} width={width} />
    </div>
  );
}

function LevelNames({ graph, x, room }: { graph: Graph; x(level: number): number; room: number }) {
  const stride = Math.max(1, Math.ceil(22 / room));
  return (
    <g class="faint" text-anchor="middle">
      <text class="faint" x={x(0)} y={26} text-anchor="end">
        input
      </text>
      <text class="faint" x={(x(0) + x(graph.calls.length)) / 2} y={11}>
        after layer
      </text>
      {graph.calls.map(
        (call, l) =>
          (graph.calls.length - 1 - l) % stride === 0 && (
            <text
              key={call.index}
              class={unsure(call) ? undefined : "faint"}
              x={x(l + 1)}
              y={26}
              font-weight={unsure(call) ? 700 : 400}
            >
              {call.site.layer ?? l}
              {unsure(call) && (call.certificate?.status === "unfaithful" ? " ✗" : " ?")}
            </text>
          ),
      )}
    </g>
  );
}

function unsure(call: Call): boolean {
  return call.certificate?.status !== "faithful";
}

/** What is told of a token of a level: what passes through it, and what it is made of. */
function atNode({ axes, layers, calls }: Graph, { nodes }: Paths, level: number, i: number): string {
  const place = level === 0 ? "input" : `after layer ${calls[level - 1]!.site.layer ?? level - 1}`;
  const lines = [`${name(axes.keys, i)}, ${place}`, `on these paths: ${exact(nodes[level]![i]!)}`];
  if (level > 0) {
    const layer = layers[level - 1]!;
    const order = axes.keys.labels.map((_, j) => j).sort((a, b) => at(layer, i, b) - at(layer, i, a));
    const parts = order.slice(0, 3).filter((j) => at(layer, i, j) > 0);
    lines.push("it is made of:", ...parts.map((j) => `${number(at(layer, i, j))} ${name(axes.keys, j)}`));
  }
  return lines.join("\n");
}

function Table({ graph, paths, through }: { graph: Graph; paths: Paths; through: Through }) {
  const { axes } = graph;
  const rows = paths.values
    .map((value, j) => ({ value, j }))
    .filter((row): row is { value: number; j: number } => row.value !== null)
    .sort((a, b) => b.value - a.value || a.j - b.j);
  const what = through === "rollout" ? "rollout" : "maximum flow";
  const best = rows[0];
  const first = best === undefined ? "" : `, most from ${name(axes.keys, best.j)}: ${exact(best.value)}`;
  return (
    <Tabular
      summary={`${name(axes.queries, paths.query)} after the last layer, ${what}${first}`}
      columns={["input", what]}
      rows={rows.slice(0, ROWS).map(({ value, j }) => [name(axes.keys, j), value])}
    />
  );
}

export const flow: View = {
  id: "flow",
  label: "Flow",
  help:
    "Attention through the layers, input on the left: what a token of the last layer is made of (rollout), or the most " +
    "that can flow to an input token (maximum flow). Click a token on the right (↑ ↓) or an input on the left (← →) " +
    "for its paths.",
  fields: () => ["weights"],
  controls: [],
  ownTable: true,
  component: Flow,
};
