import { type App, current, focus, stored } from "../app";
import { domain, ramp } from "../colours";
import type { Axes } from "../data/labels";
import { fieldOf, mayBeNegative } from "../data/kinds";
import { at, extent, type Matrix as Numbers } from "../data/matrix";
import { type Pooling, pooling, type Pyramid, pyramid } from "../data/pool";
import { presented } from "../data/presented";
import { type Shown, shownHead } from "../data/shown";
import { exact, number } from "../format";
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
  /** With the numbers of what is masked, or left out. */
  whole: Numbers;
  /** Whether masked entries are told apart. */
  masks: boolean;
  levels: Pyramid;
  /** Smallest and largest: of each level, where they differ, or of all. */
  extents: [number, number][];
  axes: Axes;
  field: string;
  pool: Pooling;
  dropped: boolean;
}

const POOLED = { max: "largest", sum: "sum", far: "farthest from 0" };

/** The longest side: what the window shows at once, beside the controls. */
function largest(): number {
  return Math.max(420, Math.min(1800, globalThis.innerHeight - 290));
}

function Matrix({ app }: { app: App }) {
  const state = app.state.value;
  const { batch, sink, filter } = state;
  const { call, axes } = current(app);
  const field = fieldOf(call, state.field);
  const ofWeights = field === "weights" || field === "applied";
  const pool: Pooling = ofWeights && state.pool === "sum" ? "sum" : pooling(call, field);
  const head = focus(state);
  const [ref, room] = useWidth();
  const [frame, setFrame] = useFrame(app);
  const { value, error } = useLoaded(
    async (signal, show: (made: Made) => void) => {
      const make = async ({ matrix: read, whole, masks }: Shown): Promise<Made> => {
        const matrix = presented(read, field, sink, filter, axes);
        const levels = await pyramid(matrix, pool, new Slices(10, signal));
        // Where nothing is negative, the largest of all is the largest of the coarsest level.
        const every = mayBeNegative(call, field) ? matrix : levels.at(-1)!;
        const extents = pool === "sum" ? levels.map(extent) : [extent(every)];
        return { matrix, whole, masks, levels, extents, axes, field, pool, dropped: matrix !== read };
      };
      const early = (part: Shown) => void make(part).then(show, () => undefined);
      return make(await shownHead(app.trace, call, field, batch, stored(call, head), early));
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
        label={`${value.field} of head ${head}, queries down, keys across`}
        told={of}
      />
      <div class="foot">
        <Legend
          domain={scaling}
          ramp={colours}
          dropped={value.dropped || value.masks}
          blank={value.masks ? (value.dropped ? "masked or left out" : "masked") : "left out"}
          title={`${value.field}, head ${head}${level > 0 ? `, ${pooled}` : ""}`}
        />
        <ZoomButtons {...moving} />
      </div>
    </div>
  );
}

function told({ field, matrix, whole, masks }: Made, query: number, key: number): string {
  const value = at(matrix, query, key);
  if (Number.isNaN(value)) {
    const hidden = at(whole, query, key);
    return masks && !Number.isNaN(hidden) ? `masked (without the mask ${exact(hidden)})` : "left out";
  }
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
