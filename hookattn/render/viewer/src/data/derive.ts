/**
 * Scores and weights of one head from a kernel's arguments: scores = softcap(scale·q·kᵀ) + bias; weights = softmax
 * over S of scores where mask, else 0, with the sink in the denominator; a row with nothing to attend to is 0. As in
 * docs/trace-format.md.
 */
import type { Numbers } from "./dtypes";

/** What some rows of a head are made of. All matrices have these rows, but for k, which has all keys. */
export interface Terms {
  rows: number;
  keys: number;
  field: "scores" | "weights";
  /** T × D and S × D; or the scores themselves, T × S, where these are stored. */
  of: { q: Numbers; k: Numbers } | { scores: Numbers };
  scale: number | Numbers;
  softcap: number | null;
  bias: Numbers | null;
  mask: Numbers | null;
  /** One learned logit a row, or one for all rows, or none. */
  sinks: Numbers | null;
}

/**
 * T × S. Sums are made in double precision, results kept in float32, or float64 if q has it; weights are of scores that
 * were kept so. What is masked for both of two rows is not computed. It names nothing outside of itself: a worker is made
 * of its text.
 */
export function derived(terms: Terms): Float32Array | Float64Array {
  const { rows, keys, of, scale, softcap, bias, mask, sinks } = terms;
  const first = "q" in of ? of.q : of.scores;
  const wide = first instanceof Float64Array;
  const out = wide ? new Float64Array(rows * keys) : new Float32Array(rows * keys);
  const soft = terms.field === "weights";
  const depth = "q" in of ? first.length / rows : 0;
  // In doubles, and with room for the rows and columns that are computed beside the last.
  const doubles = (x: Numbers, more: number) => {
    const made = new Float64Array(x.length + more);
    made.set(x);
    return made;
  };
  const q = doubles(first, depth);
  const k = "q" in of ? doubles(of.k, 3 * depth) : q;
  const both = [new Float64Array(keys + 3), new Float64Array(keys + 3)] as const;
  const [upper, lower] = both;

  /** Products of two rows with all keys from `from` to `to`: eight sums at a time share what they read. */
  const products = (t: number, from: number, to: number) => {
    const [one, two] = [t * depth, (t + 1) * depth];
    for (let s = from; s < to; s += 4) {
      let a = 0;
      let b = 0;
      let c = 0;
      let d = 0;
      let e = 0;
      let f = 0;
      let g = 0;
      let h = 0;
      let i = s * depth;
      let j = i + depth;
      let l = j + depth;
      let m = l + depth;
      for (let n = 0; n < depth; n++) {
        const x = q[one + n]!;
        const y = q[two + n]!;
        const u = k[i++]!;
        const v = k[j++]!;
        const w = k[l++]!;
        const z = k[m++]!;
        a += x * u;
        b += x * v;
        c += x * w;
        d += x * z;
        e += y * u;
        f += y * v;
        g += y * w;
        h += y * z;
      }
      upper[s] = a;
      upper[s + 1] = b;
      upper[s + 2] = c;
      upper[s + 3] = d;
      lower[s] = e;
      lower[s + 1] = f;
      lower[s + 2] = g;
      lower[s + 3] = h;
    }
  };

  /** A row of scores made of products, and of weights made of these. */
  const finish = (t: number, row: Float64Array, from: number, to: number) => {
    const at = t * keys;
    let top = -Infinity;
    for (let s = from; s < to; s++) {
      if (soft && mask !== null && !mask[at + s]) continue;
      let x: number;
      if (depth > 0) {
        x = row[s]! * (typeof scale === "number" ? scale : scale[at + s]!);
        if (softcap !== null) x = softcap * Math.tanh(x / softcap);
        if (bias !== null) x += bias[at + s]!;
        if (!wide) x = Math.fround(x);
      } else x = q[at + s]!;
      row[s] = x;
      if (x > top) top = x;
    }
    if (!soft) return out.set(row.subarray(0, keys), at);
    if (top === -Infinity) return;
    const sink = sinks === null ? -Infinity : sinks[sinks.length === 1 ? 0 : t]!;
    // The largest logit is taken off, so that no exponential overflows; it cancels out.
    const base = Math.max(top, sink);
    let total = Math.exp(sink - base);
    for (let s = from; s < to; s++) {
      if (mask === null || mask[at + s]) total += row[s] = Math.exp(row[s]! - base);
      else row[s] = 0;
    }
    for (let s = from; s < to; s++) out[at + s] = row[s]! / total;
  };

  for (let t = 0; t < rows; t += 2) {
    const many = Math.min(2, rows - t);
    let [from, to] = [0, keys];
    if (soft && mask !== null) {
      const hidden = (s: number) => !mask[t * keys + s] && !(many === 2 && mask[(t + 1) * keys + s]);
      while (from < to && hidden(from)) from++;
      while (to > from && hidden(to - 1)) to--;
    }
    if (depth > 0) products(t, from, to);
    for (let i = 0; i < many; i++) finish(t + i, both[i]!, from, to);
  }
  return out;
}
