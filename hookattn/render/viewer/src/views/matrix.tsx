import { type App, current, focus, stored } from "../app";
import { domain, ramp } from "../colours";
import type { Axes } from "../data/labels";
import { at, extent, type Matrix as Numbers } from "../data/matrix";
import { type Pyramid, pyramid } from "../data/pool";
import { presented } from "../data/presented";
import { exact, number } from "../format";
import { Slices } from "../slices";
import type { Pool } from "../state";
import { useFrame } from "../ui/frame";
import { useLoaded, useWidth } from "../ui/hooks";
import { Legend } from "../ui/legend";
import { Notice } from "../ui/notice";
import { levelOf, place, Plane, ZoomButtons } from "../ui/plane";
import { name } from "../ui/table";
import type { View } from "./view";

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
  const [frame, setFrame] = useFrame(app);
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

  if (error !== null) return <Notice error>{error}</Notice>;
  if (value === null || room === 0)
    return (
      <div ref={ref} class="quiet">
        Reading head {head} …
      </div>
    );
  const { matrix, levels } = value;
  const layout = place(matrix.rows, matrix.cols, value.axes, room, largest(), frame);
  const level = levelOf(levels, layout);
  const size = 2 ** level;
  const [low, high] = value.extents[level] ?? value.extents[0]!;
  const scaling = domain(value.field, state.scale, low, high);
  const colours = ramp(scaling.kind, app.dark.value);
  const pooled = `${POOLED[value.pool]} of ${size}×${size}`;
  const of = (query: number, key: number) => {
    const there = at(levels[level]!, Math.floor(query / size), Math.floor(key / size));
    const more = level === 0 ? "" : `\n${POOLED[value.pool]} of the ${size}×${size} numbers here: ${number(there)}`;
    return [
      `query ${name(value.axes.queries, query)}`,
      `key ${name(value.axes.keys, key)}`,
      `${value.field} ${told(value.field, at(matrix, query, key))}${more}`,
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
        label={`${value.field} of head ${head}, queries down, keys across`}
        told={of}
      />
      <div class="foot">
        <Legend
          domain={scaling}
          ramp={colours}
          dropped={value.dropped}
          title={`${value.field}, head ${head}${level > 0 ? `, ${pooled}` : ""}`}
        />
        <ZoomButtons {...moving} />
      </div>
    </div>
  );
}

function told(field: string, value: number): string {
  if (Number.isNaN(value)) return "left out";
  return field === "mask" ? (value ? "may attend" : "masked") : exact(value);
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
