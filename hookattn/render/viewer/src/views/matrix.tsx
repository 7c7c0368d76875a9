import { type App, current } from "../app";
import { domain, ramp } from "../colours";
import type { Axes } from "../data/labels";
import { fieldOf } from "../data/kinds";
import { at, type Matrix as Numbers } from "../data/matrix";
import { axesOver, nameOver, shownOver } from "../data/over";
import { type Pooling, pooling, type Pyramid, pyramid } from "../data/pool";
import { firstOf, presented } from "../data/presented";
import { absence, type Shown } from "../data/shown";
import { exact, number } from "../format";
import { type Range, rangeOf } from "../scale";
import { Slices } from "../slices";
import { useFrame } from "../ui/frame";
import { useLoaded, useWidth } from "../ui/hooks";
import { Legend } from "../ui/legend";
import { Notice } from "../ui/notice";
import { levelOf, place, Plane, ZoomButtons } from "../ui/plane";
import { name } from "../ui/table";
import type { View } from "./view";

interface Made {
  matrix: Numbers;
  shown: Shown;
  levels: Pyramid;
  /** What the colours are of: of each level, where they differ, or of all. */
  ranges: Range[];
  axes: Axes;
  field: string;
  pool: Pooling;
  dropped: boolean;
  /** Which heads. */
  what: string;
}

const POOLED = { max: "largest", sum: "sum", far: "farthest from 0" };

/** The longest side: what the window shows at once, beside the controls. */
function largest(): number {
  return Math.max(420, Math.min(1800, globalThis.innerHeight - 290));
}

function Matrix({ app }: { app: App }) {
  const state = app.state.value;
  const { batch, sink, filter, over } = state;
  const { call, axes: named } = current(app);
  const field = fieldOf(call, state.field);
  const axes = axesOver(call, field, named);
  const ofWeights = field === "weights" || field === "applied";
  const pool: Pooling = ofWeights && state.pool === "sum" ? "sum" : pooling(call, field);
  const heads = state.heads.join();
  const [ref, room] = useWidth();
  const [frame, setFrame] = useFrame(app);
  const { value, error } = useLoaded(
    async (signal, show: (made: Made) => void) => {
      const slices = new Slices(10, signal);
      const what = nameOver(call, state.heads, over);
      const make = async (shown: Shown): Promise<Made> => {
        const matrix = presented(shown.matrix, field, sink, filter, axes);
        const levels = await pyramid(matrix, pool, slices);
        const first = firstOf(shown.matrix, field, sink);
        const ranges = [];
        for (const [i, level] of (pool === "sum" ? levels : [matrix]).entries())
          ranges.push(await rangeOf(level, first && first >> i, slices, (axes.keys.sink ?? matrix.cols) >> i));
        return { matrix, shown, levels, ranges, axes, field, pool, dropped: matrix !== shown.matrix, what };
      };
      const early = (part: Shown) => void make(part).then(show, () => undefined);
      return make(await shownOver(app.trace, call, field, batch, state.heads, over, early));
    },
    [app, call, heads, over, batch, field, sink, filter, pool],
  );

  if (error !== null) return <Notice error>{error}</Notice>;
  if (value === null || room === 0)
    return (
      <div ref={ref} class="quiet">
        Reading {nameOver(call, state.heads, over)} …
      </div>
    );
  const { matrix, levels } = value;
  const layout = place(matrix.rows, matrix.cols, value.axes, room, largest(), frame);
  const level = levelOf(levels, layout);
  const size = 2 ** level;
  const { low, high, end } = value.ranges[level] ?? value.ranges[0]!;
  const scaling = domain(value.field, state.scale, low, high, value.field === "scores" ? Infinity : end);
  const colours = ramp(scaling.kind, app.dark.value);
  const pooled = `${POOLED[value.pool]} of ${size}×${size}`;
  const of = (query: number, key: number) => {
    const there = at(levels[level]!, Math.floor(query / size), Math.floor(key / size));
    const more = level === 0 ? "" : `\n${POOLED[value.pool]} of the ${size}×${size} numbers here: ${number(there)}`;
    return [
      `query ${name(value.axes.queries, query)}`,
      `key ${name(value.axes.keys, key)}`,
      `${value.field} ${told(value, query, key)}${more}`,
    ].join("\n");
  };
  const moving = { frame, setFrame, rows: matrix.rows, cols: matrix.cols };
  return (
    <div ref={ref}>
      <Plane
        app={app}
        levels={levels}
        axes={value.axes}
        layout={layout}
        frame={frame}
        setFrame={setFrame}
        domain={scaling}
        ramp={colours}
        label={`${value.field} of ${value.what}, queries down, keys across`}
        told={of}
      />
      <div class="foot">
        <Legend
          domain={scaling}
          ramp={colours}
          dropped={value.dropped || value.shown.masks}
          blank={value.shown.masks ? (value.dropped ? "masked or left out" : "masked") : "left out"}
          {...(value.field === "mask" && { choice: "may attend" })}
          title={`${value.field}, ${value.what}${level > 0 ? `, ${pooled}` : ""}`}
        />
        <ZoomButtons {...moving} />
      </div>
    </div>
  );
}

function told({ field, matrix, shown, axes }: Made, query: number, key: number): string {
  const value = at(matrix, query, key);
  if (key === axes.keys.sink && !Number.isNaN(value)) return `${exact(value)}, what the row's weights lack of 1`;
  if (!Number.isNaN(value)) return field === "mask" ? "may attend" : exact(value);
  const why = absence(shown, query, key);
  return why === "masked" && field === "scores" && shown.whole !== shown.matrix
    ? `masked (without the mask ${exact(at(shown.whole, query, key))})`
    : why;
}

export const matrix: View = {
  id: "matrix",
  label: "Matrix",
  help:
    "One head, or the mean or the largest of several, as a heatmap, queries down, keys across. Hover for the exact number, click to lock a cell, " +
    "wheel or pinch to zoom, drag to pan.",
  fields: (state) => [state.field],
  controls: ["layer", "field", "filter", "heads", "over", "scale", "pool", "sink"],
  component: Matrix,
};
