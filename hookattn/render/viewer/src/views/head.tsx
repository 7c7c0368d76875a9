import { useMemo, useState } from "preact/hooks";
import { type App, current } from "../app";
import { look, type Look } from "../colours";
import { areShares, weightsOf } from "../data/kinds";
import { at, extent, type Matrix } from "../data/matrix";
import { axesOver, headsOver, nameOver, shownOver } from "../data/over";
import { presented } from "../data/presented";
import { absence, type Shown } from "../data/shown";
import { type Link, strongest } from "../data/strongest";
import { exact, number, percent, short } from "../format";
import { Slices } from "../slices";
import { useLoaded, useWidth } from "../ui/hooks";
import { Column, labelWidth, lineAt, Lines, rowHeight } from "../ui/lines";
import { Notice } from "../ui/notice";
import { name } from "../ui/table";
import { Tip, type TipAt } from "../ui/tip";
import type { View } from "./view";

/** Lines at once, and for one token; more are no longer told apart. */
const LINES = 2500;
const OF_ONE = 500;
const FLOOR = 0.01;
/** Numbers that are held at the same time: four heads of 4096 × 4096. */
const ROOM = 2 ** 26;
const CELL = 11;
const CELLS = 16;

function Head({ app }: { app: App }) {
  const state = app.state.value;
  const { batch, sink, filter, scale, over } = state;
  const [ref, room] = useWidth();
  const [tip, setTip] = useState<TipAt | null>(null);
  const { call, axes: named } = current(app);
  const field = weightsOf(call, state.field);
  const axes = axesOver(call, field, named);
  const most = Math.max(1, Math.floor(ROOM / (call.extents.T * call.extents.S)));
  const chosen = state.heads.slice(-most);
  // Over heads one matrix is made, and drawn as one head; of as many as there are, one after the other.
  const numbers = over === "one" ? chosen.toSorted((a, b) => a - b).join() : state.heads.join();
  const { value, error } = useLoaded(
    async (signal) => {
      const asked = numbers.split(",").map(Number);
      const groups = over === "one" ? asked.map((head) => [head]) : [asked];
      const shown = await Promise.all(groups.map((group) => shownOver(app.trace, call, field, batch, group, over)));
      const names = groups.map((group) => nameOver(call, group, over));
      const heads = groups.map((group) => headsOver(call, group, over)[0]!);
      const matrices = shown.map(({ matrix }) => presented(matrix, field, sink, filter, axes));
      // Shares are at most 1. Other weights are drawn against the largest of all, and what is below 0 by its size.
      const shares = areShares(call, field);
      const sizes = shares ? matrices : matrices.map(magnitudes);
      const largest = shares ? 1 : Math.max(...sizes.map((m) => extent(m)[1] || 0)) || 1;
      const found = await strongest(sizes, LINES, FLOOR * largest, new Slices(10, signal));
      const links = found.links.map((l) => ({ ...l, value: at(matrices[l.of]!, l.query, l.key) }));
      return { call, axes, field, heads, names, shown, matrices, shares, unit: Math.max(1, largest), links, share: found.share };
    },
    [app, call, field, batch, numbers, over, sink, filter],
  );
  const locked = { query: state.query, key: state.key };
  const cursor = app.cursor.value;
  const query = cursor.query ?? (cursor.key === null || locked.key !== null ? locked.query : null);
  const key = cursor.key ?? (cursor.query === null || locked.query !== null ? locked.key : null);
  const few = useMemo(
    () => (value === null ? [] : linksOf(value.matrices, value.unit, query, key)),
    [value, query, key],
  );
  if (error !== null) return <Notice error>{error}</Notice>;
  if (value === null || room === 0)
    return (
      <div ref={ref} class="quiet">
        Reading …
      </div>
    );
  const { heads, names, unit } = value;
  const { queries, keys } = value.axes;
  const width = Math.min(room, 1100);
  const narrow = width < 560;
  // Lines are what is to be seen: where there is little room, numbers and cells beside them take less.
  const cell = Math.min(CELL, Math.floor((narrow ? 36 : 400) / Math.min(heads.length, CELLS)));
  const cells = heads.length === 1 ? (narrow ? 38 : 58) : Math.min(heads.length, CELLS) * cell + 8;
  const label = Math.min(190, Math.max(60, (width - 2 * cells) * (narrow ? 0.26 : 0.3)));
  const [wide1, wide2] = [labelWidth(queries, label), labelWidth(keys, label)];
  const gap = Math.min(460, Math.max(70, width - 2 * cells - wide1 - wide2));
  const left = cells + wide1;
  const right = left + gap;
  // A query stands beside its own key where both count the same positions.
  const shift =
    value.call.site.kind === "self" && queries.labels.length < keys.labels.length
      ? queries.positions.map((p) => p - keys.positions[0]!)
      : null;
  const aligned = shift !== null && shift.every((p) => p >= 0 && p < keys.labels.length);
  const count = Math.max(queries.labels.length, keys.labels.length);
  const height = rowHeight(count);
  const top = 26;
  const to = (s: number) => top + (s + 0.5) * height;
  const from = (t: number) => to(aligned ? shift[t]! : t);
  const find = (event: PointerEvent | MouseEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top - top) / height);
    const side = event.clientX - box.left < (left + right) / 2 ? "query" : "key";
    const index = side === "query" && aligned ? shift.indexOf(row) : row;
    const there = index >= 0 && index < (side === "query" ? queries : keys).labels.length;
    return { side, index: there ? index : null } as const;
  };
  const one = query !== null || key !== null;
  const shown = one ? few : value.links;
  const ofLine = (l: Link) =>
    `${name(queries, l.query)} → ${name(keys, l.key)}\n${names[l.of]}: ${value.field} ${exact(l.value)}`;
  return (
    <div ref={ref} style={{ position: "relative" }}>
      <svg
        width={right + wide2 + cells}
        height={top + count * height + 6}
        role="img"
        aria-label={`Lines from queries to keys, as strong as the ${value.field}, ${names.join(", ")}`}
        onPointerMove={(event) => {
          const { side, index } = find(event);
          app.cursor.value = { query: side === "query" ? index : null, key: side === "key" ? index : null };
          const box = event.currentTarget.getBoundingClientRect();
          const [px, py] = [event.clientX - box.left, event.clientY - box.top];
          const line = lineAt(shown, px, py, { left: left + 3, right: right - 3, from, to });
          setTip(line === null ? null : { x: px, y: py, text: ofLine(line) });
        }}
        onPointerLeave={() => {
          setTip(null);
          app.cursor.value = { query: null, key: null };
        }}
        onClick={(event) => {
          const { side, index } = find(event);
          // The sink is no key that other views have.
          if (side === "key" && index !== null && index === keys.sink) return;
          app.set({ [side]: index === locked[side] ? null : index });
        }}
      >
        <text class="faint" x={left - 5} y={12} text-anchor="end">
          queries
        </text>
        <text class="faint" x={right + 5} y={12}>
          keys
        </text>
        <Column
          axis={queries}
          x={left}
          side="end"
          width={wide1}
          height={height}
          y={from}
          active={query}
          locked={locked.query}
        />
        <Column
          axis={keys}
          x={right}
          side="start"
          width={wide2}
          height={height}
          y={to}
          active={key}
          locked={locked.key}
        />
        <Lines
          {...{ links: shown, heads, look, scale, unit, from, to }}
          least={one ? 1e-4 : FLOOR}
          left={left + 3}
          right={right - 3}
        />
        {query !== null && key === null && (
          <Cells links={few} {...{ unit, heads, look, cell, digits: narrow ? 2 : 4 }} x={right + wide2 + 4} at={(l) => to(l.key)} height={height} />
        )}
        {key !== null && query === null && (
          <Cells links={few} {...{ unit, heads, look, cell, digits: narrow ? 2 : 4 }} x={cells - 4} end at={(l) => from(l.query)} height={height} />
        )}
      </svg>
      <Tip tip={tip} width={right + wide2 + cells} />
      {over === "one" && chosen.length < state.heads.length && (
        <Notice>
          Of the {state.heads.length} heads chosen, the last {chosen.length} are drawn: more of this length do not fit
          into memory.
        </Notice>
      )}
      <div class="readout quiet">
        {query !== null && key !== null
          ? `${name(queries, query)} → ${name(keys, key)}: ${pair(value, query, key)}`
          : query !== null
            ? `from query ${name(queries, query)}: ${several(heads, few, (l) => `key ${name(keys, l.key)}`)}`
            : key !== null
              ? `to key ${name(keys, key)}: ${several(heads, few, (l) => `query ${name(queries, l.query)}`)}`
              : `${value.links.length} lines, which carry ${percent(value.share)} of ` +
                `${value.shares ? "the attention" : "the size of all weights"} of ` +
                `${over !== "one" ? `the ${names[0]}` : heads.length === 1 ? "this head" : "these heads"}; ` +
                (unit > 1 ? `the strongest line is ${number(unit)}; ` : "") +
                (value.links.some((l) => l.value < 0) ? "dotted lines are negative; " : "") +
                "hover over a token for all of its own, click to lock it"}
      </div>
    </div>
  );
}

function pair(
  { names, matrices, shown }: { names: readonly string[]; matrices: readonly Matrix[]; shown: readonly Shown[] },
  query: number,
  key: number,
): string {
  return names
    .map((name, i) => {
      const value = at(matrices[i]!, query, key);
      return `${name} ${Number.isNaN(value) ? absence(shown[i]!, query, key) : number(value)}`;
    })
    .join(" · ");
}

/** Lines named in the readout. */
const NAMED = 5;

/** The strongest of some links, with their numbers. */
function several(heads: readonly number[], links: readonly Link[], other: (link: Link) => string): string {
  if (links.length === 0) return "nothing";
  const told = links.slice(0, NAMED).map((l) => `${other(l)} ${short(l.value)}${heads.length > 1 ? ` (head ${heads[l.of]})` : ""}`);
  return told.join(", ") + (links.length > NAMED ? ", …" : "");
}

/** The links of one query, of one key, or of the pair; the strongest, should there be very many. */
function linksOf(matrices: readonly Matrix[], unit: number, query: number | null, key: number | null): Link[] {
  const links: Link[] = [];
  for (const [of, matrix] of matrices.entries()) {
    const rows = query === null ? [0, key === null ? 0 : matrix.rows] : [query, query + 1];
    const cols = key === null ? [0, query === null ? 0 : matrix.cols] : [key, key + 1];
    for (let t = rows[0]!; t < Math.min(rows[1]!, matrix.rows); t++) {
      for (let s = cols[0]!; s < Math.min(cols[1]!, matrix.cols); s++) {
        const value = at(matrix, t, s);
        if (Math.abs(value) > 1e-4 * unit) links.push({ of, query: t, key: s, value });
      }
    }
  }
  return links.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, OF_ONE);
}

function magnitudes(matrix: Matrix): Matrix {
  return { ...matrix, data: matrix.data.map(Math.abs) };
}

/** The weight of each head beside a token: a number for one head, cells as strong as the weight for several. */
function Cells(props: {
  links: readonly Link[];
  /** The weight that is drawn strongest. */
  unit: number;
  heads: readonly number[];
  look(head: number): Look;
  x: number;
  end?: boolean;
  at(link: Link): number;
  height: number;
  /** How wide the cell of one head is, and how many digits a number has. */
  cell: number;
  digits: number;
}) {
  const { links, heads, x, end, height, cell, digits } = props;
  if (heads.length === 1) {
    const free = new Set<number>();
    return (
      <g>
        {links.map((l) => {
          const y = props.at(l);
          const slot = Math.round(y / 14);
          // Rows lower than a line of text: the strongest of those that would overlap.
          if (height < 14 && [slot - 1, slot, slot + 1].some((s) => free.has(s))) return null;
          free.add(slot);
          return (
            <text key={y} class="faint" x={x} y={y} text-anchor={end ? "end" : "start"} dominant-baseline="central">
              {l.value.toFixed(digits)}
            </text>
          );
        })}
      </g>
    );
  }
  const size = Math.min(CELL - 1, Math.max(2, height - 2));
  return (
    <g>
      {links
        .filter((l) => l.of < CELLS)
        .map((l) => (
          <rect
            key={`${l.of} ${l.query} ${l.key}`}
            x={end ? x - (heads.slice(0, CELLS).length - l.of) * cell : x + l.of * cell}
            y={props.at(l) - size / 2}
            width={Math.max(1, cell - 1)}
            height={size}
            fill={props.look(heads[l.of]!).colour}
            fill-opacity={Math.max(0.05, Math.abs(l.value) / props.unit).toFixed(3)}
            stroke={l.value < 0 ? "var(--text)" : "none"}
            stroke-dasharray="1 2"
          />
        ))}
    </g>
  );
}

export const head: View = {
  id: "head",
  label: "Heads",
  help:
    "Lines from each query (left) to the keys it attends to (right), as strong as the weight, a colour a head. " +
    "Hover over a token for its own lines, click to lock it.",
  fields: () => ["weights"],
  controls: ["layer", "weights", "filter", "heads", "over", "scale", "sink"],
  shows: "heads",
  component: Head,
};
