/**
 * What a head did over the steps of a generation, as one matrix: the rows of each step below those of the step before.
 * Where steps do not go on from each other, the sheet of a call is the call alone.
 */
import type { Slices } from "../slices";
import type { Over } from "../state";
import type { Call } from "./call";
import { crosses } from "./keytokens";
import { type Axes, type Axis, axesOf } from "./labels";
import { keysOver } from "./over";
import type { Shown } from "./shown";
import type { Trace } from "./trace";

export interface Sheet {
  readonly calls: readonly Call[];
  /** Which query of which call a row is. */
  readonly rows: readonly { readonly call: Call; readonly query: number }[];
  /** Position of the first column; a column is a position, whichever keys a step still had. */
  readonly first: number;
  readonly axes: Axes;
}

/** Steps that are read at the same time. */
const AT_ONCE = 16;

/** The calls that go on from each other, this one among them, in the order of their steps; mostly it alone. */
export function generation(trace: Trace, call: Call): readonly Call[] {
  const runs = new Map<number, Call[]>();
  for (const c of trace.calls) {
    if (c.site.path !== call.site.path || c.site.kind !== call.site.kind) continue;
    const run = runs.get(c.step);
    if (run === undefined) runs.set(c.step, [c]);
    else run.push(c);
  }
  const nth = runs.get(call.step)!.indexOf(call);
  const calls = [...runs]
    .sort(([a], [b]) => a - b)
    .map(([, run]) => run[nth])
    .filter((c) => c !== undefined);
  const goesOn = (c: Call, i: number) =>
    c.extents.B === call.extents.B &&
    String(c.headNumbers) === String(call.headNumbers) &&
    (crosses(c.site) ? c.extents.S === call.extents.S : c.place.certain) &&
    (i === 0 || position(c, 0) > position(calls[i - 1]!, calls[i - 1]!.extents.T - 1));
  return calls.length > 1 && calls.every(goesOn) ? calls : [call];
}

function position(call: Call, query: number): number {
  return (crosses(call.site) ? call.before : call.past) + (call.queries?.[query] ?? query);
}

/** `heads`: those whose edits are marked. */
export function sheetOf(trace: Trace, call: Call, batch: number, heads: readonly number[]): Sheet {
  const calls = generation(trace, call);
  const rows = calls.flatMap((c) => Array.from({ length: c.extents.T }, (_, query) => ({ call: c, query })));
  const own = axesOf(trace, call, batch, heads);
  if (calls.length === 1) return { calls, rows, first: call.place.first, axes: own };
  if (crosses(call.site)) {
    const all = calls.map((c) => axesOf(trace, c, batch, heads).queries);
    return { calls, rows, first: call.place.first, axes: { keys: own.keys, queries: joined(all) } };
  }
  const first = Math.min(...calls.map((c) => c.place.first));
  const end = Math.max(...calls.map((c) => c.place.first + c.extents.S));
  // The last step mostly has the keys of all; what it has dropped is taken from the steps that still had it.
  const keys = axis(end - first);
  let least = end;
  for (const c of calls.toReversed()) {
    if (c.place.first >= least) continue;
    least = c.place.first;
    const from = axesOf(trace, c, batch, heads).keys;
    from.positions.forEach((p, i) => {
      if (keys.labels[p - first] !== undefined) return;
      keys.labels[p - first] = from.labels[i]!;
      keys.positions[p - first] = p;
      keys.segments![p - first] = from.segments?.[i] ?? 2;
    });
    keys.named ||= from.named;
  }
  const queries = axis(rows.length);
  rows.forEach((row, i) => {
    const p = position(row.call, row.query);
    queries.labels[i] = keys.labels[p - first] ?? { text: String(p), raw: String(p) };
    queries.positions[i] = p;
    queries.segments![i] = keys.segments![p - first] ?? 2;
  });
  queries.named = keys.named;
  for (const made of [keys, queries]) if (made.segments!.includes(2)) made.segments = null;
  return { calls, rows, first, axes: { queries, keys } };
}

function axis(length: number): Axis {
  return { labels: Array(length), positions: Array(length), segments: new Uint8Array(length), edited: null, named: false };
}

function joined(axes: readonly Axis[]): Axis {
  return {
    labels: axes.flatMap((a) => a.labels),
    positions: axes.flatMap((a) => a.positions),
    segments: null,
    edited: null,
    named: axes.every((a) => a.named),
  };
}

/** The row of a query of a call; −1: it is not in the sheet. */
export function rowOf(sheet: Sheet, call: Call, query: number): number {
  return sheet.rows.findIndex((row) => row.call === call && row.query === query);
}

/** The column of a key of a call, and back: the key of a column; −1 where the call does not have it. */
export function columnOf(sheet: Sheet, call: Call, key: number): number {
  return key + call.place.first - sheet.first;
}

export function keyOf(sheet: Sheet, call: Call, column: number): number {
  const key = column + sheet.first - call.place.first;
  return key < call.extents.S ? Math.max(-1, key) : -1;
}

/** A head of a sheet, by its number in the model. What the mask hides is NaN, and so are keys that a step did not have. */
export async function readSheet(
  trace: Trace,
  sheet: Sheet,
  field: string,
  batch: number,
  heads: readonly number[],
  over: Over,
  slices: Slices,
  show?: (part: Shown) => void,
): Promise<Shown> {
  const read = (call: Call, early?: (part: Shown) => void) => keysOver(trace, call, field, batch, heads, over, early);
  if (sheet.calls.length === 1) return read(sheet.calls[0]!, show);
  const cols = sheet.axes.keys.labels.length;
  const data = new Float32Array(sheet.rows.length * cols).fill(NaN);
  let row = 0;
  for (let i = 0; i < sheet.calls.length; i += AT_ONCE) {
    const calls = sheet.calls.slice(i, i + AT_ONCE);
    const parts = await Promise.all(calls.map((call) => read(call)));
    parts.forEach(({ matrix }, n) => {
      const at = columnOf(sheet, calls[n]!, 0);
      for (let t = 0; t < matrix.rows; t++, row++)
        data.set(matrix.data.subarray(t * matrix.cols, (t + 1) * matrix.cols), row * cols + at);
    });
    await slices.turn();
  }
  const whole = { rows: sheet.rows.length, cols, data };
  return { matrix: whole, whole, masks: true };
}
