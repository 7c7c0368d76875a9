import { useEffect, useRef, useState } from "preact/hooks";
import { type App, current, focus, stored } from "../app";
import { domain, ramp } from "../colours";
import { type Frame, moved, within, zoomed } from "../data/frame";
import type { Axes } from "../data/labels";
import { at, extent, type Matrix as Numbers } from "../data/matrix";
import { type Pyramid, pyramid } from "../data/pool";
import { presented } from "../data/presented";
import { exact, number } from "../format";
import { Slices } from "../slices";
import type { Pool } from "../state";
import { axisRoom, Columns, Rows } from "../ui/axes";
import { useFrame } from "../ui/frame";
import { draw, levelFor } from "../ui/heatmap";
import { useLoaded, useWidth } from "../ui/hooks";
import { Legend } from "../ui/legend";
import { Notice } from "../ui/notice";
import { name } from "../ui/table";
import { Tip, type TipAt } from "../ui/tip";
import type { View } from "./index";

interface Made {
  matrix: Numbers;
  levels: Pyramid;
  /** Smallest and largest: of each level, where they differ, or of all. */
  extents: [number, number][];
  axes: Axes;
  field: string;
  pool: Pool;
  dropped: boolean;
}

const POOLED = { max: "largest", sum: "sum" };
const CELL = 28;

/** The longest side: what the window shows at once, beside the controls. */
function largest(): number {
  return Math.max(420, Math.min(1800, globalThis.innerHeight - 290));
}

function Matrix({ app }: { app: App }) {
  const state = app.state.value;
  const { batch, field, sink, filter } = state;
  const pool = field === "weights" ? state.pool : "max";
  const { call, axes } = current(app);
  const head = focus(state);
  const [ref, room] = useWidth();
  const canvas = useRef<HTMLCanvasElement>(null);
  const [tip, setTip] = useState<TipAt | null>(null);
  const [frame, setFrame] = useFrame(app);
  const drag = useRef<{ x: number; y: number; from: Frame | null; moved: boolean } | null>(null);
  const { value, error } = useLoaded(
    async (signal, show: (made: Made) => void) => {
      const make = async (whole: Numbers): Promise<Made> => {
        const matrix = presented(whole, field, sink, filter, axes);
        const levels = await pyramid(matrix, pool, new Slices(10, signal));
        // Nothing but scores is negative, and the largest of all is the largest of the coarsest level.
        const extents = pool === "sum" ? levels.map(extent) : [extent(field === "scores" ? matrix : levels.at(-1)!)];
        return { matrix, levels, extents, axes, field, pool, dropped: matrix !== whole };
      };
      const early = (part: Numbers) => void make(part).then(show, () => undefined);
      return make(await app.trace.head(call, field, batch, stored(call, head), early));
    },
    [app, call, head, batch, field, sink, filter, pool],
  );

  const layout = value === null ? null : place(value.matrix.rows, value.matrix.cols, value.axes, room, frame);
  const ratio = globalThis.devicePixelRatio || 1;
  const colours = ramp(domainOf(0).kind, app.dark.value);

  function domainOf(level: number) {
    const [low, high] = value?.extents[level] ?? value?.extents[0] ?? [0, 1];
    return domain(value?.field ?? field, state.scale, low, high);
  }

  const level =
    value === null || layout === null
      ? 0
      : levelFor(value.levels, layout.view, layout.width * ratio, layout.height * ratio);
  useEffect(() => {
    if (canvas.current === null || value === null || layout === null) return;
    canvas.current.width = Math.round(layout.width * ratio);
    canvas.current.height = Math.round(layout.height * ratio);
    draw(canvas.current, value.levels, layout.view, domainOf(level), colours);
  });

  if (error !== null) return <Notice error>{error}</Notice>;
  if (value === null || layout === null || room === 0)
    return (
      <div ref={ref} class="quiet">
        Reading head {head} …
      </div>
    );
  const { matrix } = value;
  const { left, top, width, height, view } = layout;
  const [k, q, keys, queries] = view;

  const cell = (event: PointerEvent | WheelEvent | MouseEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / width, (event.clientY - box.top) / height];
    const inside = x >= 0 && x < 1 && y >= 0 && y < 1;
    return { x, y, key: inside ? Math.floor(k + x * keys) : null, query: inside ? Math.floor(q + y * queries) : null };
  };
  const onMove = (event: PointerEvent) => {
    const held = drag.current;
    if (held !== null && (held.moved || Math.hypot(event.clientX - held.x, event.clientY - held.y) > 4)) {
      held.moved = true;
      setTip(null);
      return setFrame(
        moved(
          held.from,
          matrix.cols,
          matrix.rows,
          ((held.x - event.clientX) / width) * keys,
          ((held.y - event.clientY) / height) * queries,
        ),
      );
    }
    const { query, key, x, y } = cell(event);
    app.cursor.value = { query, key };
    if (query === null || key === null) return setTip(null);
    const size = 2 ** level;
    const pooled = value.levels[level]!;
    const there = at(pooled, Math.floor(query / size), Math.floor(key / size));
    const more = level === 0 ? "" : `\n${POOLED[value.pool]} of the ${size}×${size} numbers here: ${number(there)}`;
    const own = at(matrix, query, key);
    const lines = [
      `query ${name(value.axes.queries, query)}`,
      `key ${name(value.axes.keys, key)}`,
      `${value.field} ${told(value.field, own)}${more}`,
    ];
    setTip({ x: left + x * width, y: top + y * height, text: lines.join("\n") });
  };
  const cursor = app.cursor.value;
  const line = (i: number | null, first: number, count: number) =>
    i === null || i + 1 <= first || i >= first + count ? null : Math.max(0, i - first) / count;
  const [row, column] = [line(cursor.query ?? state.query, q, queries), line(cursor.key ?? state.key, k, keys)];
  const pooled = level > 0 ? `, ${POOLED[value.pool]} of ${2 ** level}×${2 ** level}` : "";
  const zoom = (factor: number) => setFrame(zoomed(frame, matrix.cols, matrix.rows, factor));
  return (
    <div ref={ref}>
      <div
        class="plane"
        style={{
          width: `${left + width + layout.spare}px`,
          height: `${top + height + 2}px`,
          touchAction: frame === null ? "auto" : "none",
        }}
        onPointerMove={onMove}
        onPointerLeave={() => {
          setTip(null);
          app.cursor.value = { query: null, key: null };
        }}
        onPointerDown={(event) => {
          drag.current = { x: event.clientX, y: event.clientY, from: frame, moved: false };
          if (frame !== null) event.currentTarget.setPointerCapture(event.pointerId);
        }}
        onPointerUp={(event) => {
          const { query, key } = cell(event);
          if (!drag.current?.moved && query !== null)
            app.set(query === state.query && key === state.key ? { query: null, key: null } : { query, key });
          drag.current = null;
        }}
        onWheel={(event) => {
          // A small matrix is all in view: there the wheel scrolls the page.
          const small = Math.max(matrix.rows, matrix.cols) <= 64 && frame === null;
          const { x, y, key } = cell(event);
          if (key === null || (small && !event.ctrlKey) || (frame === null && event.deltaY > 0)) return;
          event.preventDefault();
          setFrame(
            zoomed(frame, matrix.cols, matrix.rows, Math.exp(-Math.max(-100, Math.min(100, event.deltaY)) / 250), x, y),
          );
        }}
      >
        <canvas
          ref={canvas}
          style={{ left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` }}
          role="img"
          aria-label={`${value.field} of head ${head}, queries down, keys across`}
        />
        <svg width={left + width + layout.spare} height={top + height + 2}>
          <rect x={left - 0.5} y={top - 0.5} width={width + 1} height={height + 1} fill="none" stroke="var(--line)" />
          {row !== null && (
            <rect
              x={left}
              y={top + row * height}
              width={width}
              height={height / queries}
              fill="none"
              stroke="var(--cursor)"
              stroke-opacity={0.8}
            />
          )}
          {column !== null && (
            <rect
              x={left + column * width}
              y={top}
              width={width / keys}
              height={height}
              fill="none"
              stroke="var(--cursor)"
              stroke-opacity={0.8}
            />
          )}
          <Rows
            axis={value.axes.queries}
            first={q}
            count={queries}
            length={height}
            start={top}
            at={left}
            room={left}
            active={cursor.query}
            locked={state.query}
          />
          <Columns
            axis={value.axes.keys}
            first={k}
            count={keys}
            length={width}
            start={left}
            at={top}
            room={top}
            active={cursor.key}
            locked={state.key}
          />
          <text class="faint" x={0} y={12}>
            queries ↓ keys →
          </text>
        </svg>
        <Tip tip={tip} width={left + width} />
      </div>
      <div class="foot">
        <Legend
          domain={domainOf(level)}
          ramp={colours}
          dropped={value.dropped}
          title={`${value.field}, head ${head}${pooled}`}
        />
        <button type="button" aria-label="Closer" onClick={() => zoom(2)}>
          +
        </button>
        <button type="button" aria-label="Further away" onClick={() => zoom(0.5)}>
          −
        </button>
        <button type="button" onClick={() => setFrame(null)} disabled={frame === null}>
          All
        </button>
      </div>
    </div>
  );
}

function told(field: string, value: number): string {
  if (Number.isNaN(value)) return "left out";
  return field === "mask" ? (value ? "may attend" : "masked") : exact(value);
}

/** Where the matrix stands in the room there is; cells are square unless it is very flat or very tall. */
function place(rows: number, cols: number, axes: Axes, room: number, frame: Frame | null) {
  const most = largest();
  const view = within(frame, cols, rows);
  const left = Math.max(60, axisRoom(axes.queries, Math.min(150, room * 0.28)));
  const slanted = axisRoom(axes.keys, 130);
  const top = axes.keys.named ? slanted * 0.87 + 22 : 34;
  const spare = axes.keys.named ? Math.min(slanted * 0.5, 60) : 14;
  const width = Math.max(80, Math.min(cols * CELL, most, room - left - spare));
  const height = Math.max(Math.min(rows * CELL, CELL), Math.min((width / cols) * rows, most, 3 * width));
  return { left, top, width, height, spare, view };
}

export const matrix: View = {
  id: "matrix",
  label: "Matrix",
  help:
    "One head as a heatmap, queries down, keys across. Hover for the exact number, click to lock a cell, " +
    "wheel or pinch to zoom, drag to pan.",
  fields: (state) => [state.field],
  controls: ["layer", "field", "scale", "pool", "sink", "filter", "heads"],
  component: Matrix,
};
