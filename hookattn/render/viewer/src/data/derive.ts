/**
 * Scores and weights of one head from a kernel's arguments: scores = softcap(scale·q·kᵀ) + bias; weights = softmax
 * over S of scores where mask, else −∞, with the sink in the denominator; a row with nothing to attend to is 0. As in
 * docs/trace-format.md.
 */
import type { Slices } from "../slices";
import { at, type Matrix } from "./matrix";

export interface Parts {
  q: Matrix;
  k: Matrix;
  scale: number | Matrix;
  softcap: number | null;
  bias: Matrix | null;
}

/** T S from q (T D) and k (S D). Sums are made in double precision, results kept in float32, or float64 if q has it. */
export async function scores({ q, k, scale, softcap, bias }: Parts, slices: Slices): Promise<Matrix> {
  const [rows, cols, depth] = [q.rows, k.rows, q.cols];
  const data = like(q, rows * cols);
  const query = new Float64Array(depth);
  for (let t = 0; t < rows; t++) {
    for (let d = 0; d < depth; d++) query[d] = at(q, t, d);
    for (let s = 0; s < cols; s++) {
      let sum = 0;
      for (let d = 0, i = s * depth; d < depth; d++, i++) sum += query[d]! * k.data[i]!;
      sum *= typeof scale === "number" ? scale : at(scale, t, s);
      if (softcap !== null) sum = softcap * Math.tanh(sum / softcap);
      data[t * cols + s] = bias === null ? sum : sum + at(bias, t, s);
    }
    await slices.turn();
  }
  return { rows, cols, data };
}

/** Softmax of `scores` where `mask` is not 0. `sinks`: one learned logit a row, or one for all rows, or none. */
export async function weights(
  scores: Matrix,
  mask: Matrix | null,
  sinks: ArrayLike<number> | null,
  slices: Slices,
): Promise<Matrix> {
  const { rows, cols } = scores;
  const data = like(scores, rows * cols);
  for (let t = 0, row = 0; t < rows; t++, row += cols) {
    let top = -Infinity;
    for (let i = row; i < row + cols; i++) {
      if ((mask === null || mask.data[i]) && scores.data[i]! > top) top = scores.data[i]!;
    }
    if (top > -Infinity) {
      const sink = sinks === null ? -Infinity : sinks[sinks.length === 1 ? 0 : t]!;
      // The largest logit is taken off, so that no exponential overflows; it cancels out.
      const base = Math.max(top, sink);
      let total = Math.exp(sink - base);
      for (let i = row; i < row + cols; i++)
        if (mask === null || mask.data[i]) total += Math.exp(scores.data[i]! - base);
      for (let i = row; i < row + cols; i++) {
        data[i] = mask === null || mask.data[i] ? Math.exp(scores.data[i]! - base) / total : 0;
      }
    }
    await slices.turn();
  }
  return { rows, cols, data };
}

function like({ data }: Matrix, length: number): Float32Array | Float64Array {
  return data instanceof Float64Array ? new Float64Array(length) : new Float32Array(length);
}
