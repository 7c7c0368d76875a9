/** Two traces side by side: which calls belong together, how far their heads are apart, where their tokens differ. */
import type { Findings } from "../findings";
import type { Slices } from "../slices";
import { matches } from "../state";
import { type Call, where } from "./call";
import { type Axes, type Axis } from "./labels";
import type { Matrix } from "./matrix";
import type { Trace } from "./trace";

/** The call of another trace at the same place: step, stack, kind, layer, and which one of those that share them. */
export function twinOf(trace: Trace, other: Trace, call: Call): Call | null {
  const here = (of: Trace) => matches(of, { ...call.site, step: call.step });
  return here(other)[here(trace).indexOf(call)] ?? null;
}

/** What is found of the heads of another trace, at the places of their twins. */
export function fromTwins(trace: Trace, other: Trace, findings: Findings): Findings {
  const heads = trace.calls.map((call) => {
    const twin = twinOf(trace, other, call);
    return call.headNumbers.map((number) => findings.heads[twin?.index ?? -1]?.[twin!.headNumbers.indexOf(number)] ?? null);
  });
  return { ...findings, heads };
}

/** Why two calls have no difference, number by number; or null. */
export function misfit(one: Call, other: Call): string | null {
  const size = ({ extents: { T, S } }: Call) => `${T} queries and ${S} keys`;
  if (size(one) !== size(other)) return `${where(one)} has ${size(one)} in A, and ${size(other)} in B`;
  if (String(one.queries) !== String(other.queries)) return `of ${where(one)}, A and B hold different queries`;
  return null;
}

/**
 * B − A, as exact as the two are; NaN where neither has a number. `zero`: what is masked in one of them alone is 0 there,
 * as a weight is; else there is no difference.
 */
export function difference(a: Matrix, b: Matrix, zero: boolean): Matrix {
  const wide = a.data instanceof Float64Array || b.data instanceof Float64Array;
  const data = new (wide ? Float64Array : Float32Array)(a.data.length);
  for (let i = 0; i < data.length; i++) {
    const [x, y] = [a.data[i]!, b.data[i]!];
    data[i] = zero && (x === x || y === y) ? (y || 0) - (x || 0) : y - x;
  }
  return { rows: a.rows, cols: a.cols, data };
}

export interface Distance {
  /**
   * ½ Σ |p − q| over the keys, the mean over the rows; what goes to no key (a sink) is one key more. NaN: no row, or
   * weights that are no shares.
   */
  variation: number;
  /** The largest |p − q|. */
  largest: number;
}

/** How far apart the weights of two heads are, in the rows where either mask lets something through; as `compare`. */
export async function distance(
  a: Matrix,
  b: Matrix,
  masks: readonly (Matrix | null)[],
  slices: Slices,
  shares = true,
): Promise<Distance> {
  let [sum, largest, count] = [0, 0, 0];
  for (let t = 0; t < a.rows; t++) {
    const [from, to] = [t * a.cols, (t + 1) * a.cols];
    if (masks.some((mask) => mask !== null && !mask.data.subarray(from, to).some((x) => x > 0))) continue;
    let [apart, p, q] = [0, 0, 0];
    for (let i = from; i < to; i++) {
      const by = Math.abs(a.data[i]! - b.data[i]!);
      apart += by;
      if (by > largest) largest = by;
      p += a.data[i]!;
      q += b.data[i]!;
    }
    const rest = shares ? Math.abs(Math.max(0, 1 - p) - Math.max(0, 1 - q)) : 0;
    sum += (apart + rest) / 2;
    largest = Math.max(largest, rest);
    count++;
    await slices.turn();
  }
  return count === 0 ? { variation: NaN, largest: NaN } : { variation: shares ? sum / count : NaN, largest };
}

/** The axes of the difference: where the names differ, both. */
export function merged(a: Axes, b: Axes): Axes {
  return { queries: joined(a.queries, b.queries), keys: joined(a.keys, b.keys) };
}

function joined(a: Axis, b: Axis): Axis {
  const edited = a.edited && b.edited ? a.edited.map((x, i) => x || (b.edited![i] ?? 0)) : (a.edited ?? b.edited);
  if (!a.named || !b.named) return { ...a, edited };
  const labels = a.labels.map((label, i) => {
    const other = b.labels[i];
    return other === undefined || other.raw === label.raw ? label : { ...label, text: `${label.text} → ${other.text}` };
  });
  return { ...a, labels, edited };
}

/** The entries of which both traces have a name, and not the same. */
export function differing(a: Axis, b: Axis): { position: number; a: string; b: string }[] {
  if (!a.named || !b.named) return [];
  const both = Math.min(a.labels.length, b.labels.length);
  return a.labels
    .slice(0, both)
    .map((label, i) => ({ position: a.positions[i]!, a: label, b: b.labels[i]! }))
    .filter((pair) => pair.a.raw !== pair.b.raw)
    .map((pair) => ({ ...pair, a: pair.a.text, b: pair.b.text }));
}
