/** One matrix for the heads that are looked at: that of one, or the mean or the largest over several. */
import { Lru, once } from "../lru";
import { Slices } from "../slices";
import type { Over } from "../state";
import type { Call } from "./call";
import type { Axes, Axis } from "./labels";
import { mayBeNegative, normalizerOf } from "./kinds";
import type { Matrix } from "./matrix";
import { type Shown, shownHead, shownRow } from "./shown";
import type { Trace } from "./trace";

const CACHE = 160 * 2 ** 20;
const kept = new WeakMap<Trace, Lru<Promise<Shown>>>();

/**
 * The heads, by their numbers in the model, that go into what is drawn: the last that is chosen, or all that are chosen; all
 * of the layer where only one is.
 */
export function headsOver(call: Call, heads: readonly number[], over: Over): readonly number[] {
  const last = heads.at(-1) ?? call.headNumbers[0] ?? 0;
  if (over === "one") return [last];
  return (heads.length > 1 ? heads : call.headNumbers).toSorted((a, b) => a - b);
}

/** “head 3”, “mean of heads 0, 2, 5”, “largest of all 12 heads”. */
export function nameOver(call: Call, heads: readonly number[], over: Over): string {
  const of = headsOver(call, heads, over);
  if (over === "one" || of.length === 1) return `head ${of[0]}`;
  const all = of.length === call.headNumbers.length;
  return `${over === "mean" ? "mean" : "largest"} of ${all ? `all ${of.length} heads` : `heads ${of.join(", ")}`}`;
}

/**
 * A field over heads, chosen as `headsOver` has them: the mean, or the largest, of weights that may be below 0 the
 * farthest from 0. An entry is masked, NaN, where it is in all of them; where it is in some, the mean of weights counts
 * their 0, and that of scores is of the others.
 *
 * `show` is called with the first rows of a large head, the others NaN, where there is only one.
 */
export function keysOver(
  trace: Trace,
  call: Call,
  field: string,
  batch: number,
  heads: readonly number[],
  over: Over,
  show?: (part: Shown) => void,
): Promise<Shown> {
  const of = headsOver(call, heads, over);
  let cache = kept.get(trace);
  if (cache === undefined) kept.set(trace, (cache = new Lru(CACHE)));
  const key = [call.index, field, batch, of.length > 1 && over, ...of].join(" ");
  const read = (i: number, alone: boolean) => shownHead(trace, call, field, batch, i, alone ? show : undefined);
  const weight = ({ matrix, whole }: Shown) => matrix.data.byteLength + (matrix === whole ? 0 : whole.data.byteLength);
  return once(cache, key, () => all(call, field, of, over, read), weight);
}

/** The same; weights of a call with sinks have a column more, of what goes to the sink: `sinkOf`, named by `axesOver`. */
export async function shownOver(...asked: Parameters<typeof keysOver>): Promise<Shown> {
  const [trace, call, field, batch, heads, over, show] = asked;
  if (!hasSink(call, field)) return keysOver(trace, call, field, batch, heads, over, show);
  return withSink(await keysOver(trace, call, field, batch, heads, over));
}

/** One query of what `shownOver` gives. */
export async function rowOver(
  trace: Trace,
  call: Call,
  field: string,
  batch: number,
  heads: readonly number[],
  over: Over,
  query: number,
): Promise<Shown> {
  const of = headsOver(call, heads, over);
  const shown = await all(call, field, of, over, (i) => shownRow(trace, call, field, batch, i, query));
  return hasSink(call, field) ? withSink(shown) : shown;
}

async function all(
  call: Call,
  field: string,
  of: readonly number[],
  over: Over,
  read: (head: number, alone: boolean) => Promise<Shown>,
): Promise<Shown> {
  const place = (head: number) => Math.max(0, call.headNumbers.indexOf(head));
  if (of.length === 1) return read(place(of[0]!), true);
  const far = field !== "scores" && mayBeNegative(call, field);
  const slices = new Slices();
  let made: { rows: number; cols: number; data: Float64Array } | null = null;
  let counts = new Uint16Array(0);
  let masks = false;
  // One after the other: together, the heads of a long context do not fit into memory.
  for (const head of of) {
    const shown = await read(place(head), false);
    const { rows, cols, data } = shown.matrix;
    made ??= { rows, cols, data: new Float64Array(rows * cols) };
    if (counts.length === 0) counts = new Uint16Array(made.data.length);
    masks ||= shown.masks;
    const sum = made.data;
    for (let row = 0; row < rows; row++) {
      for (let i = row * cols; i < (row + 1) * cols; i++) {
        const x = data[i]!;
        if (x !== x) continue; // masked
        if (over === "mean" || counts[i] === 0) sum[i]! += x;
        else if (far ? Math.abs(x) > Math.abs(sum[i]!) : x > sum[i]!) sum[i] = x;
        counts[i]!++;
      }
      if (row % 64 === 0) await slices.turn();
    }
  }
  const { rows, cols, data } = made!;
  for (let i = 0; i < data.length; i++) {
    if (counts[i] === 0) data[i] = NaN;
    else if (over === "mean") data[i]! /= field === "scores" ? counts[i]! : of.length;
  }
  const matrix: Matrix = { rows, cols, data };
  return { matrix, whole: matrix, masks };
}

/** Whether a part of the attention goes to no key: to a learned logit, or to the one more of softmax1. */
export function hasSink(call: Call, field: string): boolean {
  return field === "weights" && (call.fields["sinks"] != null || normalizerOf(call) === "softmax1");
}

/** With a column more: what the weights of a row lack of 1. Where a row may attend to nothing, there is none. */
function withSink({ matrix, whole, masks }: Shown): Shown {
  const made = wider(matrix, sinkOf(matrix));
  return { matrix: made, whole: whole === matrix ? made : wider(whole, sinkOf(matrix)), masks };
}

/** Of each row, what its weights lack of 1. */
export function sinkOf({ rows, cols, data }: Matrix): Float64Array {
  return Float64Array.from({ length: rows }, (_, t) => {
    let [sum, count] = [0, 0];
    for (let i = t * cols; i < (t + 1) * cols; i++) {
      const x = data[i]!;
      if (x === x) [sum, count] = [sum + x, count + 1];
    }
    return count === 0 ? NaN : Math.max(0, 1 - sum);
  });
}

function wider({ rows, cols, data }: Matrix, column: Float64Array): Matrix {
  const out = new Float64Array(rows * (cols + 1));
  for (let t = 0; t < rows; t++) {
    out.set(data.subarray(t * cols, (t + 1) * cols), t * (cols + 1));
    out[t * (cols + 1) + cols] = column[t]!;
  }
  return { rows, cols: cols + 1, data: out };
}

/** The names of rows and columns, with that of the sink where there is a column of it. */
export function axesOver(call: Call, field: string, axes: Axes): Axes {
  if (!hasSink(call, field)) return axes;
  const known = sunk.get(axes);
  if (known !== undefined) return known;
  const { keys } = axes;
  const made: Axis = {
    ...keys,
    labels: [...keys.labels, { text: "sink", raw: "" }],
    positions: [...keys.positions, (keys.positions.at(-1) ?? -1) + 1],
    segments: keys.segments && Uint8Array.from([...keys.segments, 2]),
    edited: keys.edited && Uint8Array.from([...keys.edited, 0]),
    sink: keys.labels.length,
  };
  const both = { ...axes, keys: made };
  sunk.set(axes, both);
  return both;
}

const sunk = new WeakMap<Axes, Axes>();
