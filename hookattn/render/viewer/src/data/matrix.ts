import type { Numbers } from "./dtypes";

/** One head of one field: rows × cols, row-major. */
export interface Matrix {
  readonly rows: number;
  readonly cols: number;
  readonly data: Numbers;
  /** How many of the rows are read so far: the others mean nothing yet. All, where it says nothing. */
  readonly there?: number;
}

/** The number of rows that mean something. */
export function thereOf({ rows, there = rows }: Matrix): number {
  return there;
}

/** A number; NaN where its row is not read yet. */
export function at(matrix: Matrix, row: number, col: number): number {
  return row < thereOf(matrix) ? matrix.data[row * matrix.cols + col]! : NaN;
}

/** Smallest and largest finite value, `[NaN, NaN]` where there is none. */
export function extent({ data }: Matrix): [number, number] {
  let low = Infinity;
  let high = -Infinity;
  for (let i = 0; i < data.length; i++) {
    const x = data[i]!;
    if (x < low && x > -Infinity) low = x;
    if (x > high && x < Infinity) high = x;
  }
  return low > high ? [NaN, NaN] : [low, high];
}
