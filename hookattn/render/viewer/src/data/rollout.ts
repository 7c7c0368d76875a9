/**
 * Attention through the layers (Abnar & Zuidema 2020, “Quantifying Attention Flow in Transformers”), as
 * hookattn/analyze/tables/rollout.py computes it: A = (1 − residual)·W + residual·I for each layer, W its weights over all
 * heads, each row over its sum; a row that is padding, or attends to nothing, stays itself.
 */
import { ViewerError } from "../errors";
import type { Slices } from "../slices";
import { type Call, where } from "./call";
import type { Matrix } from "./matrix";
import type { Trace } from "./trace";

export const RESIDUAL = 0.5;
/** Numbers of all layers together: what fits into the memory of a page. */
const MOST = 2 ** 25;
/** Heads that are read at the same time: while one comes, others are summed. */
const AT_ONCE = 6;

/** Why the calls are no layers that follow on each other, or null. */
export function refusal(trace: Trace, calls: readonly Call[]): string | null {
  const first = calls[0]!;
  for (const call of calls) {
    const why = unfit(call, first);
    if (why !== null) return `Rollout and flow go through layers of self-attention; ${where(call)} is none: ${why}.`;
    if (!trace.has(call, "weights")) return trace.lacks("weights", call).message;
  }
  const numbers = calls.length * first.extents.T ** 2;
  return numbers > MOST
    ? `${calls.length} layers of ${first.extents.T} × ${first.extents.T} weights are more than a page can follow; ` +
        "hookattn.analyze.rollout does it in Python."
    : null;
}

function unfit(call: Call, first: Call): string | null {
  const { B, T, S } = call.extents;
  if (call.site.kind.startsWith("cross")) return "it is cross-attention";
  if (call.queries !== null) return "query rows were left out; trace again without queries=";
  if (T !== S) return `it has ${T} queries and ${S} keys; of a generation show step 0, or a trace that is stitched`;
  if (B === first.extents.B && T === first.extents.T) return null;
  return `it has ${B} × ${T} tokens, and ${where(first)} has ${first.extents.B} × ${first.extents.T}`;
}

/** A of each call, T × T: row i is what token i is made of. */
export async function mixing(trace: Trace, calls: readonly Call[], batch: number, slices: Slices): Promise<Matrix[]> {
  const sums = calls.map(({ extents: { T, S } }) => new Float64Array(T * S));
  const heads = calls.flatMap((call, l) => call.headNumbers.map((_, head) => ({ call, head, sum: sums[l]! })));
  let next = 0;
  const lane = async () => {
    while (next < heads.length) {
      const { call, head, sum } = heads[next++]!;
      const { data } = await trace.head(call, "weights", batch, head);
      for (let i = 0; i < sum.length; i++) sum[i]! += data[i]!;
      await slices.turn();
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, lane));
  const layers: Matrix[] = [];
  for (const [l, call] of calls.entries()) layers.push(await mix(trace, call, batch, sums[l]!));
  return layers;
}

function maskHeads(trace: Trace, call: Call): number {
  return trace.entries.get(call.fields["mask"] ?? "")?.shape.at(-3) ?? 1;
}

/** Which queries may attend to anything, and which keys anything may attend to; null: all. */
async function touched(trace: Trace, call: Call, batch: number): Promise<[Uint8Array, Uint8Array] | null> {
  const { T, H } = call.extents;
  if (call.fields["mask"] === null) return null;
  const own = call.fields["mask"] === undefined;
  const queries = new Uint8Array(T);
  const keys = new Uint8Array(T);
  for (let head = 0; head < (own ? H : maskHeads(trace, call)); head++) {
    const { data } = await trace.head(call, own ? "weights" : "mask", batch, head);
    for (let t = 0, i = 0; t < T; t++) for (let s = 0; s < T; s++, i++) if (data[i]) queries[t] = keys[s] = 1;
  }
  return [queries, keys];
}

/** `sum`: the weights of all heads. */
async function mix(trace: Trace, call: Call, batch: number, sum: Float64Array): Promise<Matrix> {
  const { T } = call.extents;
  const data = new Float32Array(T * T);
  const seen = await touched(trace, call, batch);
  for (let i = 0; i < T; i++) {
    const row = sum.subarray(i * T, (i + 1) * T);
    const all = row.reduce((a, b) => a + b, 0);
    if (!Number.isFinite(all))
      throw new ViewerError(`${where(call)} has weights that are not finite: nothing flows.`);
    if (row.some((x) => x < 0))
      throw new ViewerError(`${where(call)} has weights below 0, and a flow divides what is shared out.`);
    const still = all === 0 || (seen !== null && !(seen[0][i] && seen[1][i]));
    for (let j = 0; j < T; j++) data[i * T + j] = still ? 0 : ((1 - RESIDUAL) * row[j]!) / all;
    data[i * T + i]! += still ? 1 : RESIDUAL;
  }
  return { rows: T, cols: T, data };
}

/**
 * A row of the product of all layers takes one vector times each matrix, from the last layer down: T² a layer, not T³.
 * What each token of each level has of token `query` of the last one: levels 0 (the input) to L, T each; level 0 is the
 * row of the rollout.
 */
export function sharesOf(layers: readonly Matrix[], query: number): Float64Array[] {
  const T = layers[0]!.rows;
  const levels = [Float64Array.from({ length: T }, (_, i) => (i === query ? 1 : 0))];
  for (const { data } of layers.toReversed()) {
    const above = levels[0]!;
    const below = new Float64Array(T);
    for (let i = 0; i < T; i++) {
      if (above[i] === 0) continue;
      for (let j = 0; j < T; j++) below[j]! += above[i]! * data[i * T + j]!;
    }
    levels.unshift(below);
  }
  return levels;
}

/** What each token of each level has of input token `key`: levels 0 to L, T each; level L: a column of the rollout. */
export function reachOf(layers: readonly Matrix[], key: number): Float64Array[] {
  const T = layers[0]!.rows;
  const levels = [Float64Array.from({ length: T }, (_, j) => (j === key ? 1 : 0))];
  for (const { data } of layers) {
    const below = levels.at(-1)!;
    levels.push(
      Float64Array.from({ length: T }, (_, i) => {
        let sum = 0;
        for (let j = 0; j < T; j++) sum += data[i * T + j]! * below[j]!;
        return sum;
      }),
    );
  }
  return levels;
}
