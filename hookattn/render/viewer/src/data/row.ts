/** One query of one head: its scores, mask and weights over all keys, and the denominator of their softmax. */
import { type Call, kvHead } from "./call";
import { weightsSet } from "./edits";
import { hasApplied } from "./kinds";
import type { Matrix } from "./matrix";
import { firstKey } from "./presented";
import type { Trace } from "./trace";

export interface Row {
  /** Over all S keys. */
  readonly scores: ArrayLike<number>;
  readonly weights: ArrayLike<number>;
  /** What met the values, where that is not the weights. */
  readonly applied: ArrayLike<number> | null;
  /** Which of them may be attended to. */
  readonly allowed: Uint8Array;
  /** Which weights an edit has set; null: none. */
  readonly edited: ((key: number) => boolean) | null;
  /** The learned logit that joins the softmax, or null. */
  readonly sink: number | null;
  /** The logarithm of the softmax's denominator, the sink in it; −∞ where nothing may be attended to. */
  readonly lse: number;
  /** The first key that any query of the head may attend to: where heads rest attention that has nowhere to go. */
  readonly first: number;
}

/** `head` counted among those stored. Needs scores, mask and weights. */
export async function readRow(trace: Trace, call: Call, batch: number, head: number, query: number): Promise<Row> {
  const [scores, weights, applied, mask, sinks] = await Promise.all([
    trace.row(call, "scores", batch, head, query),
    trace.row(call, "weights", batch, head, query),
    hasApplied(call) ? trace.row(call, "applied", batch, head, query) : null,
    trace.row(call, "mask", batch, head, query),
    // A trace without them may hold weights that say all the same.
    "sinks" in call.fields ? trace.sinks(call, batch, head) : null,
  ]);
  const keys = call.extents.S;
  const allowed = Uint8Array.from({ length: keys }, (_, s) => (mask === null || mask.data[s] ? 1 : 0));
  const sink = sinks === null ? null : sinks[sinks.length > 1 ? query : 0]!;
  return {
    scores: scores!.data,
    weights: weights!.data,
    applied: applied?.data ?? null,
    allowed,
    edited: weightsSet(call, batch, call.headNumbers[head]!, query),
    sink,
    lse: logSum(scores!.data, allowed, sink),
    // The mask of all queries is as large as a head: mostly this one's tells.
    first: allowed[0] ? 0 : firstKey(await trace.head(call, "mask", batch, head)),
  };
}

function logSum(scores: ArrayLike<number>, allowed: Uint8Array, sink: number | null): number {
  if (!allowed.includes(1)) return -Infinity;
  let top = sink ?? -Infinity;
  for (let s = 0; s < allowed.length; s++) if (allowed[s]) top = Math.max(top, scores[s]!);
  let total = sink === null ? 0 : Math.exp(sink - top);
  for (let s = 0; s < allowed.length; s++) if (allowed[s]) total += Math.exp(scores[s]! - top);
  return top + Math.log(total);
}

/** Keys listed at once: those that weigh most. */
const MOST = 100;

/** The keys that are listed: all, or those that weigh most and the one that was asked for, in their order. */
export function listed({ weights }: Row, asked: number | null): number[] {
  const all = Array.from({ length: weights.length }, (_, s) => s);
  if (all.length <= MOST) return all;
  const kept = new Set(all.toSorted((a, b) => Math.abs(weights[b]!) - Math.abs(weights[a]!) || a - b).slice(0, MOST));
  if (asked !== null) kept.add(asked);
  return [...kept].sort((a, b) => a - b);
}

/** From q and k to the score, and from the weight to the output, for some keys of a row. */
export interface Steps {
  /** 1 × D. */
  readonly q: Matrix;
  /** A row for each listed key: keys × D. */
  readonly k: Matrix;
  readonly product: Matrix;
  /** A number for each listed key: scale·q·k; after the soft-cap; the bias. Null where the call has none. */
  readonly scaled: Float64Array;
  readonly capped: Float64Array | null;
  readonly bias: Float64Array | null;
  /** What these give, less the score that is in the trace: the largest difference over the listed keys. */
  readonly apart: number;
  /** null where v is not in the trace. */
  readonly values: Values | null;
}

export interface Values {
  /** weight·v, keys × E, of what met the values; its sum over all keys, 1 × E. */
  readonly weighted: Matrix;
  readonly output: Matrix;
  /** The largest difference of that sum from what the kernel returned; null where that is not in the trace. */
  readonly apart: number | null;
}

/** Needs q, k, scores and weights. */
export async function readSteps(
  trace: Trace,
  call: Call,
  batch: number,
  head: number,
  query: number,
  row: Row,
  keys: readonly number[],
): Promise<Steps> {
  const [q, k, v, bias, returned, scale] = await Promise.all([
    trace.row(call, "q", batch, head, query),
    trace.head(call, "k", batch, head),
    trace.has(call, "v") ? trace.optional(call, "v", batch, head) : null,
    "bias" in call.fields ? trace.row(call, "bias", batch, head, query) : null,
    "output" in call.fields ? trace.row(call, "output", batch, head, query) : null,
    trace.scale(call, batch, head, [[query, query + 1]]),
  ]);
  const chosen = rowsOf(k, keys);
  const product = { ...chosen, data: chosen.data.map((x, i) => x * q!.data[i % chosen.cols]!) };
  const scaled = Float64Array.from(keys, (s, n) => {
    let sum = 0;
    for (let i = n * product.cols; i < (n + 1) * product.cols; i++) sum += product.data[i]!;
    return sum * (typeof scale === "number" ? scale : scale.data[s]!);
  });
  const cap = call.softcap;
  const capped = cap === null ? null : scaled.map((x) => cap * Math.tanh(x / cap));
  const added = bias === null ? null : Float64Array.from(keys, (s) => bias.data[s]!);
  let apart = 0;
  keys.forEach((s, n) => {
    const made = (capped ?? scaled)[n]! + (added?.[n] ?? 0);
    apart = Math.max(apart, Math.abs(made - row.scores[s]!));
  });
  const values = v === null ? null : valuesOf(v, keys, row, returned);
  return { q: q!, k: chosen, product, scaled, capped, bias: added, apart, values };
}

function valuesOf(v: Matrix, keys: readonly number[], row: Row, returned: Matrix | null): Values {
  const listed = rowsOf(v, keys);
  const sum = output(v, row);
  const apart = returned === null ? null : sum.data.map((x, e) => Math.abs(x - returned.data[e]!));
  return {
    weighted: { ...listed, data: listed.data.map((x, i) => x * met(row)[keys[Math.floor(i / v.cols)]!]!) },
    output: sum,
    apart: apart === null ? null : Math.max(...apart),
  };
}

function rowsOf({ cols, data }: Matrix, keys: readonly number[]): { rows: number; cols: number; data: Float64Array } {
  const out = new Float64Array(keys.length * cols);
  keys.forEach((s, n) => out.set(data.subarray(s * cols, (s + 1) * cols), n * cols));
  return { rows: keys.length, cols, data: out };
}

/** What the values were multiplied with. */
function met({ weights, applied }: Row): ArrayLike<number> {
  return applied ?? weights;
}

function output(v: Matrix, row: Row): { rows: number; cols: number; data: Float64Array } {
  const sum = new Float64Array(v.cols);
  const weights = met(row);
  for (let s = 0; s < v.rows; s++) for (let e = 0; e < v.cols; e++) sum[e]! += weights[s]! * v.data[s * v.cols + e]!;
  return { rows: 1, cols: v.cols, data: sum };
}

/** The group of k and v that a head reads, in words, where heads share them. */
export function groupOf(call: Call, head: number): string | null {
  return call.extents.G < call.extents.H || call.kv_heads !== null
    ? `k and v of group ${kvHead(call, head)} of ${call.extents.G}`
    : null;
}
