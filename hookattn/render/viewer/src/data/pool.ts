/**
 * Matrices made smaller for the screen: the largest, the sum, or what is farthest from zero of what falls together,
 * never the mean. NaN is left out.
 */
import type { Slices } from "../slices";
import type { Pool } from "../state";
import type { Call } from "./call";
import { mayBeNegative } from "./kinds";
import { type Matrix, thereOf } from "./matrix";

/** `far`: what is farthest from zero, of either sign. */
export type Pooling = Pool | "far";

/** Level i has cells of 2^i × 2^i entries; level 0 is the matrix itself. */
export type Pyramid = readonly Matrix[];

/** Entries a side of the last level: fewer than any picture has pixels. */
const SMALLEST = 128;

export async function pyramid(matrix: Matrix, pool: Pooling, slices: Slices): Promise<Pyramid> {
  const levels = [matrix];
  for (let last = matrix; Math.max(last.rows, last.cols) > SMALLEST;)
    levels.push((last = await half(last, pool, slices)));
  return levels;
}

async function half(matrix: Matrix, pool: Pooling, slices: Slices): Promise<Matrix> {
  const { rows, cols, data } = matrix;
  const there = Math.floor(thereOf(matrix) / 2);
  const [r, c] = [Math.ceil(rows / 2), Math.ceil(cols / 2)];
  const out = new Float32Array(r * c);
  const how = HOWS.indexOf(pool);
  for (let y = 0; y < r; y++) {
    if (matrix.there !== undefined && y >= there) return { rows: r, cols: c, data: out, there };
    const top = 2 * y * cols;
    const below = 2 * y + 1 < rows ? top + cols : -1;
    for (let x = 0; x < c; x++) {
      const i = 2 * x;
      const wide = i + 1 < cols;
      let v = data[top + i]!;
      if (wide) v = join(v, data[top + i + 1]!, how);
      if (below >= 0) {
        v = join(v, data[below + i]!, how);
        if (wide) v = join(v, data[below + i + 1]!, how);
      }
      out[y * c + x] = v;
    }
    if (y % 64 === 0) await slices.turn();
  }
  return { rows: r, cols: c, data: out };
}

/** By their numbers, which cost nothing to tell apart. */
const HOWS: readonly Pooling[] = ["max", "sum", "far"];

function join(a: number, b: number, how: number): number {
  if (a !== a) return b; // NaN
  if (b !== b) return a;
  if (how === 1) return a + b;
  return (how === 0 ? a > b : Math.abs(a) > Math.abs(b)) ? a : b;
}

/** How a field is pooled where its largest numbers are looked for: weights of either sign by what is farthest from 0. */
export function pooling(call: Call, field: string): "max" | "far" {
  return field !== "scores" && mayBeNegative(call, field) ? "far" : "max";
}

/** At most `rows` × `cols`, the largest of what falls together, or what is farthest from zero. */
export async function poolTo(
  matrix: Matrix,
  rows: number,
  cols: number,
  slices: Slices,
  pool: "max" | "far" = "max",
): Promise<Matrix> {
  const [r, c] = [Math.min(rows, matrix.rows), Math.min(cols, matrix.cols)];
  if (r === matrix.rows && c === matrix.cols) return matrix;
  const data = new Float32Array(r * c).fill(NaN);
  const column = Uint32Array.from({ length: matrix.cols }, (_, s) => Math.floor((s * c) / matrix.cols));
  const how = HOWS.indexOf(pool);
  for (let t = 0; t < matrix.rows; t++) {
    const to = Math.floor((t * r) / matrix.rows) * c;
    for (let s = 0, i = t * matrix.cols; s < matrix.cols; s++, i++) {
      const cell = to + column[s]!;
      data[cell] = join(data[cell]!, matrix.data[i]!, how);
    }
    await slices.turn();
  }
  return { rows: r, cols: c, data };
}
