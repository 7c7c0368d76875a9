/**
 * What one head does, measured: the cheap measures of `hookattn.analyze`, with their names. All of it is one pass over the
 * weights, so that a head is read once and let go.
 */
import type { Numbers } from "./dtypes";

/** What counts in some rows of a call and a batch entry; it is the same for all its heads. */
export interface Context {
  /** The queries of the rows. */
  rows: Int32Array;
  /** For each row the key that its query is at; −1: at none. Null: queries and keys are of two sequences. */
  at: Int32Array | null;
  /** 1 where a query counts: it may attend to something, and is no padding. */
  counts: Uint8Array;
  /** How many keys each query may attend to; null where no mask was kept. */
  allowed: Int32Array | null;
  /** The first key that is no padding. */
  first: number;
  /** The keys related to each row: those of row r are from `start[r]` to `start[r + 1]`. Null: there are no tokens. */
  duplicate: Related | null;
  induction: Related | null;
}

export interface Related {
  start: Int32Array;
  key: Int32Array;
}

/** In the order in which `measure` returns them: the names of `hookattn.analyze`. */
export const NAMES = [
  "induction",
  "duplicate_token",
  "previous_token",
  "next_token",
  "self_token",
  "local_mass(window=2)",
  "first_token",
  "learned_sink",
  "normalised_entropy",
  "entropy",
  "mean_distance",
] as const;
export type Name = (typeof NAMES)[number];

/** How many numbers there are for each measure: the sum, how many rows it is of, and the row, key and weight of the pair
 * that shows it best. The last group is of no measure: in place of its sum stands how many rows are no distribution. */
export const STRIDE = 5;

/**
 * Sums over some rows of one head. It names nothing outside of itself: a worker is made of its text.
 *
 * `data`: weights of the rows, one after the other, S columns each. Returns 12 groups of five numbers.
 */
export function measure(data: Numbers, S: number, c: Context): Float64Array {
  const out = new Float64Array(60);
  for (let m = 0; m < 12; m++) out[5 * m + 2] = -1;
  const best = new Float64Array(12).fill(-1);
  const add = (m: number, value: number) => {
    out[5 * m]! += value;
    out[5 * m + 1]!++;
  };
  // A pair says more in a row that may look elsewhere: the one key of the first row weighs 1 in any head.
  const show = (m: number, t: number, key: number, weight: number, n: number) => {
    // Nor does the first key, where heads rest attention that has nowhere to go, say much but of attention to it.
    const worth = weight * (1 - 1 / Math.max(n, 1)) * (key === c.first && m !== 6 ? 0.5 : 1);
    if (worth > best[m]!) {
      best[m] = worth;
      out[5 * m + 2] = t;
      out[5 * m + 3] = key;
      out[5 * m + 4] = weight;
    }
  };
  for (let r = 0; r < c.rows.length; r++) {
    const t = c.rows[r]!;
    if (c.counts[r] === 0) continue;
    const from = r * S;
    const n = c.allowed === null ? S : c.allowed[r]!;
    const p = c.at === null ? -1 : c.at[r]!;
    let sum = 0;
    let entropy = 0;
    let far = 0;
    let below = false;
    for (let s = 0; s < S; s++) {
      const w = data[from + s]!;
      if (w > 0) {
        sum += w;
        entropy -= w * Math.log(w);
        far += w * Math.abs(p - s);
      } else if (w < 0) below = true;
    }
    if (below || sum > 1.02) out[55]!++;
    add(9, entropy);
    add(7, Math.max(0, 1 - sum));
    add(6, data[from + c.first]!);
    show(6, t, c.first, data[from + c.first]!, n);
    if (c.allowed !== null && n > 1) add(8, entropy / Math.log(n));
    if (c.at !== null) {
      const near = (offset: number) => {
        const key = p + offset;
        return p >= 0 && key >= 0 && key < S ? data[from + key]! : 0;
      };
      const [before, own, after] = [near(-1), near(0), near(1)];
      add(2, before);
      add(3, after);
      add(4, own);
      add(5, before + own + after);
      const shows = (m: number, offset: number, weight: number) => {
        if (weight <= 0) return;
        show(m, t, p + offset, weight, n);
        show(5, t, p + offset, weight, n);
      };
      shows(2, -1, before);
      shows(3, 1, after);
      shows(4, 0, own);
      if (sum > 0) add(10, far / sum);
    }
    for (let m = 0; m < 2; m++) {
      const related = m === 0 ? c.induction : c.duplicate;
      if (related === null) continue;
      const [start, end] = [related.start[r]!, related.start[r + 1]!];
      if (end === start) continue;
      let mass = 0;
      for (let i = start; i < end; i++) {
        const w = data[from + related.key[i]!]!;
        mass += w;
        show(m, t, related.key[i]!, w, n);
      }
      add(m, mass);
    }
  }
  return out;
}

/** The sums of some rows and of others; of the pairs the better one. */
export function joined(a: Float64Array, b: Float64Array): Float64Array {
  const out = a.slice();
  for (let m = 0; m < out.length; m += STRIDE) {
    out[m]! += b[m]!;
    out[m + 1]! += b[m + 1]!;
    if (b[m + 2]! >= 0 && (out[m + 2]! < 0 || b[m + 4]! > out[m + 4]!)) out.set(b.subarray(m + 2, m + 5), m + 2);
  }
  return out;
}
