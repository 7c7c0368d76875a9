/**
 * The weights of several heads, summed, from q and k: what a mean over heads takes, without a matrix for each of them.
 * Masked entries are not computed at all. It needs nothing from outside: it is sent to a worker as text. Scores and
 * weights are rounded to float32 as derive.ts keeps them, where q is of 32 bits.
 */
type Floats = Float32Array | Float64Array | Uint8Array;

/** T S, from q (H T D), k (one S D after the other, of which each head reads the one that `reads` says) and the mask. */
export function summed(
  q: Floats,
  k: Floats,
  mask: ArrayLike<number> | null,
  reads: readonly number[],
  T: number,
  S: number,
  scale: number,
): Float64Array {
  const D = q.length / (reads.length * T);
  const wide = q instanceof Float64Array;
  const sum = new Float64Array(T * S);
  const query = new Float64Array(D);
  const row = new Float64Array(S);
  for (let h = 0; h < reads.length; h++) {
    const first = reads[h]! * S * D;
    for (let t = 0; t < T; t++) {
      const at = t * S;
      for (let d = 0; d < D; d++) query[d] = q[(h * T + t) * D + d]!;
      let top = -Infinity;
      for (let s = 0; s < S; s++) {
        if (mask !== null && !mask[at + s]) continue;
        // Four sums: each addition would wait for the one before.
        let x = 0;
        let y = 0;
        let z = 0;
        let w = 0;
        let d = 0;
        let i = first + s * D;
        for (; d + 3 < D; d += 4, i += 4) {
          x += query[d]! * k[i]!;
          y += query[d + 1]! * k[i + 1]!;
          z += query[d + 2]! * k[i + 2]!;
          w += query[d + 3]! * k[i + 3]!;
        }
        for (; d < D; d++, i++) x += query[d]! * k[i]!;
        x = (x + y + z + w) * scale;
        row[s] = x = wide ? x : Math.fround(x);
        if (x > top) top = x;
      }
      if (top === -Infinity) continue;
      let total = 0;
      for (let s = 0; s < S; s++) if (mask === null || mask[at + s]) total += row[s] = Math.exp(row[s]! - top);
      for (let s = 0; s < S; s++) if (mask === null || mask[at + s]) sum[at + s]! += wide ? row[s]! / total : Math.fround(row[s]! / total);
    }
  }
  return sum;
}
