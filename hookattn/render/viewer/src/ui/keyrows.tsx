/** Keys as rows, with columns of numbers: bars, heatmaps of components, anything of one number a key. */
import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { domain, ramp } from "../colours";
import type { Axis } from "../data/labels";
import type { Matrix } from "../data/matrix";
import { whole } from "../data/frame";
import { number } from "../format";
import { HATCHED, Hatching } from "./hatch";
import { draw } from "./heatmap";
import { Column as Labels, labelWidth } from "./lines";
import { Tip, type TipAt } from "./tip";

export const ROW = 19;
const GAP = 16;
/** Beside the names, which may be wider than is reckoned. */
const MARGIN = 10;
/** Above the rows: a title; with a strip, its title and itself too. */
const TITLE = 20;
const STRIP = 34;

/** Signed components: a row for each listed key, or one; colours run from −most to +most. */
export interface Heat {
  readonly matrix: Matrix;
  readonly most: number;
}

export interface KeyColumn {
  readonly title: string;
  /** The width that it needs, and that it can use. */
  readonly least: number;
  readonly most: number;
  readonly heat?: Heat;
  /** One row of components above the others. */
  readonly strip?: { readonly title: string; readonly heat: Heat };
  /** In SVG; `y` is the middle of the n-th row. */
  draw?(x: number, width: number, y: (n: number) => number): ComponentChildren;
  /** What is told where the pointer is at component `d` of a heatmap. */
  tell?(n: number, d: number): string;
}

interface Props {
  /** The names of all keys, and which of them are listed. */
  axis: Axis;
  keys: readonly number[];
  columns: readonly KeyColumn[];
  room: number;
  dark: boolean;
  active: number | null;
  locked: number | null;
  label: string;
  /** What is told beside the pointer of a key that it is at; null: nothing. */
  tell(n: number): string | null;
  onHover(key: number | null): void;
  onPick(key: number): void;
}

/** As many columns beside each other as there is room for; the others go below, with the names again. */
export function KeyRows(props: Props) {
  const { axis, keys, columns, room } = props;
  const names: Axis = {
    ...axis,
    labels: keys.map((s) => axis.labels[s]!),
    positions: keys.map((s) => axis.positions[s]!),
  };
  const side = labelWidth(names, Math.max(56, Math.min(170, room * 0.24))) + MARGIN;
  return (
    <>
      {lines(columns, room - side - 2).map((line) => (
        <Line key={line[0]!.title} {...props} names={names} side={side} line={line} />
      ))}
    </>
  );
}

function lines(columns: readonly KeyColumn[], room: number): KeyColumn[][] {
  const made: KeyColumn[][] = [];
  let left = 0;
  for (const column of columns) {
    left -= column.least + GAP;
    if (left < 0 || made.length === 0) {
      made.push([]);
      left = room - column.least - GAP;
    }
    made.at(-1)!.push(column);
  }
  return made;
}

/** How wide each column is: what it needs, and its part of what is left. */
function widths(line: readonly KeyColumn[], room: number): number[] {
  const spare = room - line.reduce((sum, c) => sum + c.least + GAP, 0);
  const wanted = line.reduce((sum, c) => sum + c.most - c.least, 0);
  const part = wanted > 0 ? Math.max(0, Math.min(1, spare / wanted)) : 0;
  return line.map((c) => Math.floor(c.least + (c.most - c.least) * part));
}

function Line(props: Props & { names: Axis; side: number; line: readonly KeyColumn[] }) {
  const { keys, names, side, line, room, dark } = props;
  const [tip, setTip] = useState<TipAt | null>(null);
  const wide = widths(line, room - side - 2);
  const left = wide.map((_, i) => side + 8 + wide.slice(0, i).reduce((sum, w) => sum + w + GAP, 0));
  const head = TITLE + (line.some((c) => c.strip !== undefined) ? STRIP : 0);
  const height = head + keys.length * ROW + 4;
  const width = Math.min(room, left.at(-1)! + wide.at(-1)! + GAP - 8);
  const y = (n: number) => head + (n + 0.5) * ROW;
  const placeOf = (key: number | null) => (key === null ? -1 : keys.indexOf(key));
  const at = (event: PointerEvent | MouseEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const n = Math.floor((py - head) / ROW);
    const column = left.findIndex((x, i) => px >= x && px < x + wide[i]!);
    return { px, py, n: n >= 0 && n < keys.length ? n : null, column };
  };
  return (
    <div
      class="plane"
      style={{ width: `${width}px`, height: `${height}px`, touchAction: "auto" }}
      onPointerMove={(event) => {
        const { px, py, n, column } = at(event);
        props.onHover(n === null ? null : keys[n]!);
        const heat = line[column]?.heat;
        const d = heat === undefined ? 0 : Math.floor(((px - left[column]!) / wide[column]!) * heat.matrix.cols);
        const told = n === null ? null : (line[column]?.tell?.(n, d) ?? props.tell(n));
        setTip(told === null ? null : { x: px, y: py, text: told });
      }}
      onPointerLeave={() => {
        setTip(null);
        props.onHover(null);
      }}
      onClick={(event) => {
        const { n } = at(event);
        if (n !== null) props.onPick(keys[n]!);
      }}
    >
      {line.map((column, i) => [
        column.heat && (
          <HeatMap key={column.title} heat={column.heat} dark={dark} x={left[i]!} y={head} width={wide[i]!} row={ROW} />
        ),
        column.strip && (
          <HeatMap
            key={column.strip.title}
            heat={column.strip.heat}
            dark={dark}
            x={left[i]!}
            y={TITLE - 2}
            width={wide[i]!}
            row={12}
          />
        ),
      ])}
      <svg
        width={width}
        height={height}
        role="img"
        aria-label={`${props.label}: ${line.map((c) => c.title).join(", ")}`}
      >
        <Hatching />
        {[props.active, props.locked].map((key, i) => {
          const n = placeOf(key);
          return (
            n >= 0 && (
              <rect
                key={i}
                x={1}
                y={y(n) - ROW / 2}
                width={width - 2}
                height={ROW}
                rx={3}
                fill="none"
                stroke={i === 0 ? "var(--cursor)" : "var(--accent)"}
              />
            )
          );
        })}
        <Labels axis={names} x={side} side="end" width={side - MARGIN} height={ROW} y={y} active={null} locked={null} />
        {line.map((column, i) => (
          <g key={column.title}>
            <Title x={left[i]!} y={head - 7} heat={column.heat} text={column.title} />
            {column.strip && <Title x={left[i]!} y={TITLE - 7} heat={column.strip.heat} text={column.strip.title} />}
            {column.draw?.(left[i]!, wide[i]!, y)}
          </g>
        ))}
      </svg>
      <Tip tip={tip} width={width} />
    </div>
  );
}

function Title({ x, y, heat, text }: { x: number; y: number; heat: Heat | undefined; text: string }) {
  return (
    <text class="faint" x={x} y={y}>
      {text}
      {heat && ` ± ${number(heat.most)}`}
    </text>
  );
}

/** Components across, of which the strongest of those that share a pixel is drawn. */
function HeatMap(props: { heat: Heat; dark: boolean; x: number; y: number; width: number; row: number }) {
  const { heat, dark, x, y, width, row } = props;
  const canvas = useRef<HTMLCanvasElement>(null);
  const { matrix, most } = heat;
  useLayoutEffect(() => {
    const ratio = globalThis.devicePixelRatio || 1;
    const element = canvas.current!;
    element.width = Math.round(width * ratio);
    element.height = Math.round(matrix.rows * row * ratio);
    const shown = narrowed(matrix, element.width);
    draw(
      element,
      [shown],
      whole(shown.cols, shown.rows),
      domain("", "linear", -most || -1, most),
      ramp("diverging", dark),
    );
  }, [matrix, most, dark, width, row]);
  const style = { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${matrix.rows * row}px` };
  return <canvas ref={canvas} style={style} aria-hidden="true" />;
}

function narrowed({ rows, cols, data }: Matrix, most: number): Matrix {
  if (cols <= most) return { rows, cols, data };
  const out = new Float64Array(rows * most);
  for (let i = 0; i < data.length; i++) {
    const to = Math.floor(i / cols) * most + Math.floor(((i % cols) * most) / cols);
    if (Math.abs(data[i]!) > Math.abs(out[to]!)) out[to] = data[i]!;
  }
  return { rows, cols: most, data: out };
}

const NUMBER = 62;

/** A column of numbers with a bar each, from zero to either side. Null: hatched, there is none. */
export function bars(title: string, values: readonly (number | null)[], colour: string): KeyColumn {
  const low = values.reduce<number>((least, x) => Math.min(least, x ?? 0), 0);
  const high = values.reduce<number>((most, x) => Math.max(most, x ?? 0), 0);
  const span = high - low || 1;
  return {
    title,
    least: NUMBER + 20,
    most: NUMBER + 90,
    draw: (x, width, y) => {
      const scale = (width - NUMBER) / span;
      const zero = x + NUMBER - low * scale;
      return (
        <g>
          <line x1={zero} x2={zero} y1={y(0) - ROW / 2} y2={y(values.length - 1) + ROW / 2} stroke="var(--line)" />
          {values.map((value, n) =>
            value === null ? (
              <Masked key={n} x={x} y={y(n)} width={width} />
            ) : (
              <g key={n}>
                <rect
                  x={Math.min(zero, zero + value * scale)}
                  y={y(n) - 5}
                  width={Math.abs(value * scale)}
                  height={10}
                  fill={colour}
                />
                <text x={x + NUMBER - 8} y={y(n)} text-anchor="end" dominant-baseline="central" class="faint">
                  {number(value)}
                </text>
              </g>
            ),
          )}
        </g>
      );
    },
  };
}

/** What stands in the place of a number that a mask hides, as in any view. */
function Masked({ x, y, width }: { x: number; y: number; width: number }) {
  return <rect x={x} y={y - 6} width={width} height={12} fill={HATCHED} />;
}

/** A square for each key: filled where it may be attended to, hatched where it is masked. */
export function maskColumn(allowed: readonly boolean[]): KeyColumn {
  return {
    title: "mask",
    least: 30,
    most: 30,
    draw: (x, _, y) => (
      <g stroke="var(--muted)">
        {allowed.map((may, n) => (
          <g key={n}>
            <rect x={x + 6.5} y={y(n) - 5.5} width={11} height={11} fill={may ? "var(--muted)" : HATCHED} />
          </g>
        ))}
      </g>
    ),
  };
}
