/** Tokens through the layers as a graph: the input on the left, all attention in grey, a token's paths over it. */
import { useMemo, useState } from "preact/hooks";
import type { App } from "../app";
import type { Call } from "../data/call";
import type { Axes } from "../data/labels";
import { at, type Matrix } from "../data/matrix";
import type { Paths } from "../data/paths";
import type { Link, Strongest } from "../data/strongest";
import { exact, number } from "../format";
import { Column, labelWidth, rowHeight } from "./lines";
import { name } from "./table";
import { Tip, type TipAt } from "./tip";

const NUMBERS = 58;
const TOP = 38;
/** Beside the names, which may be wider than is reckoned. */
const MARGIN = 12;

export interface Graph {
  readonly calls: readonly Call[];
  readonly axes: Axes;
  /** A of each call: see data/rollout.ts. */
  readonly layers: readonly Matrix[];
  /** The strongest of their entries. */
  readonly behind: Strongest;
}

export function Drawing({ app, graph, paths, room }: { app: App; graph: Graph; paths: Paths; room: number }) {
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
                part > 0.002 && (
                  <circle key={`${l} ${i}`} cx={x(l)} cy={y(i)} r={(1.2 + 4 * Math.sqrt(part)).toFixed(2)} />
                )
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
        <Column
          axis={keys}
          x={left - 6}
          side="end"
          width={wide1}
          height={height}
          y={y}
          active={key}
          locked={state.key}
        />
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
