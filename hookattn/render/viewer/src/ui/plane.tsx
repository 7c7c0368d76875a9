/** A matrix on the screen: its canvas, the names along it, the cursor that views share, and how it is moved. */
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import type { App } from "../app";
import { type Domain, type Ramp } from "../colours";
import { type Frame, moved, within, zoomed } from "../data/frame";
import type { Axes } from "../data/labels";
import type { Pyramid } from "../data/pool";
import { axisRoom, Columns, Rows } from "./axes";
import { draw, levelFor } from "./heatmap";
import { Tip, type TipAt } from "./tip";

const CELL = 28;

/** Where a matrix stands: the room of its names, its size on the screen, and the part of it that is in view. */
export interface Layout {
  left: number;
  top: number;
  width: number;
  height: number;
  spare: number;
  view: Frame;
}

/**
 * A matrix of `rows` × `cols` in `room` pixels, no side longer than `most`; cells are square unless it is very flat or
 * very tall.
 */
export function place(
  rows: number,
  cols: number,
  axes: Axes,
  room: number,
  most: number,
  frame: Frame | null,
): Layout {
  const view = within(frame, cols, rows);
  const left = Math.max(60, axisRoom(axes.queries, Math.min(150, room * 0.28)));
  const slanted = axisRoom(axes.keys, 130);
  const top = axes.keys.named ? slanted * 0.87 + 22 : 34;
  const spare = axes.keys.named ? Math.min(slanted * 0.5, 60) : 14;
  const width = Math.max(80, Math.min(cols * CELL, most, room - left - spare));
  const height = Math.max(Math.min(rows * CELL, CELL), Math.min((width / cols) * rows, most, 3 * width));
  return { left, top, width, height, spare, view };
}

/** The level of a pyramid that a layout shows: with pixels of the screen, not of the page. */
export function levelOf(levels: Pyramid, { view, width, height }: Layout): number {
  const ratio = globalThis.devicePixelRatio || 1;
  return levelFor(levels, view, width * ratio, height * ratio);
}

export function Plane(props: {
  app: App;
  levels: Pyramid;
  axes: Axes;
  layout: Layout;
  frame: Frame | null;
  setFrame(frame: Frame | null): void;
  domain: Domain;
  ramp: Ramp;
  label: string;
  /** What is said of a cell under the pointer. */
  told(query: number, key: number): string;
}) {
  const { app, levels, axes, layout, frame, setFrame, domain, ramp, label } = props;
  const { left, top, width, height, spare, view } = layout;
  const { rows, cols } = levels[0]!;
  const [k, q, keys, queries] = view;
  const state = app.state.value;
  const canvas = useRef<HTMLCanvasElement>(null);
  const [tip, setTip] = useState<TipAt | null>(null);
  const drag = useRef<{ x: number; y: number; from: Frame | null; moved: boolean } | null>(null);
  useLayoutEffect(() => {
    const ratio = globalThis.devicePixelRatio || 1;
    canvas.current!.width = Math.round(width * ratio);
    canvas.current!.height = Math.round(height * ratio);
    draw(canvas.current!, levels, view, domain, ramp);
  });

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
      const [byKeys, byQueries] = [
        ((held.x - event.clientX) / width) * keys,
        ((held.y - event.clientY) / height) * queries,
      ];
      return setFrame(moved(held.from, cols, rows, byKeys, byQueries));
    }
    const { query, key, x, y } = cell(event);
    app.cursor.value = { query, key };
    if (query === null || key === null) return setTip(null);
    setTip({ x: left + x * width, y: top + y * height, text: props.told(query, key) });
  };
  const cursor = app.cursor.value;
  const line = (i: number | null, first: number, count: number) =>
    i === null || i + 1 <= first || i >= first + count ? null : Math.max(0, i - first) / count;
  const [row, column] = [line(cursor.query ?? state.query, q, queries), line(cursor.key ?? state.key, k, keys)];
  const outline = { fill: "none", stroke: "var(--cursor)", "stroke-opacity": 0.8 };
  return (
    <div
      class="plane"
      style={{
        width: `${left + width + spare}px`,
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
        if (!drag.current?.moved && query !== null) {
          // The sink is no key that other views have.
          const picked = key === axes.keys.sink ? null : key;
          app.set(query === state.query && picked === state.key ? { query: null, key: null } : { query, key: picked });
        }
        drag.current = null;
      }}
      onWheel={(event) => {
        // A small matrix is all in view: there the wheel scrolls the page.
        const small = Math.max(rows, cols) <= 64 && frame === null;
        const { x, y, key } = cell(event);
        if (key === null || (small && !event.ctrlKey) || (frame === null && event.deltaY > 0)) return;
        event.preventDefault();
        setFrame(zoomed(frame, cols, rows, Math.exp(-Math.max(-100, Math.min(100, event.deltaY)) / 250), x, y));
      }}
    >
      <canvas
        ref={canvas}
        style={{ left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` }}
        role="img"
        aria-label={label}
      />
      <svg width={left + width + spare} height={top + height + 2}>
        <rect x={left - 0.5} y={top - 0.5} width={width + 1} height={height + 1} fill="none" stroke="var(--line)" />
        {row !== null && <rect x={left} y={top + row * height} width={width} height={height / queries} {...outline} />}
        {column !== null && <rect x={left + column * width} y={top} width={width / keys} height={height} {...outline} />}
        <Rows
          axis={axes.queries}
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
          axis={axes.keys}
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
  );
}

/** Closer, further away, all: for who has no wheel. */
export function ZoomButtons({
  frame,
  rows,
  cols,
  setFrame,
}: {
  frame: Frame | null;
  rows: number;
  cols: number;
  setFrame(frame: Frame | null): void;
}) {
  const zoom = (factor: number) => setFrame(zoomed(frame, cols, rows, factor));
  return (
    <>
      <button aria-label="Closer" onClick={() => zoom(2)}>
        +
      </button>
      <button aria-label="Further away" onClick={() => zoom(0.5)}>
        −
      </button>
      <button onClick={() => setFrame(null)} disabled={frame === null}>
        All
      </button>
    </>
  );
}
