/** A head as it is shown: the first key left out or its weight shared out again, one direction of a pair kept. */
import type { Filter, Sink } from "../state";
import type { Axes } from "./labels";
import type { Matrix } from "./matrix";

/** The first key that any query attends to: where trained models rest attention that has nowhere to go. */
export function firstKey({ rows, cols, data }: Matrix): number {
  for (let s = 0; s < cols; s++) for (let t = 0; t < rows; t++) {
      const x = data[t * cols + s]!;
      if (x > 0 || x < 0) return s;
    }
  return 0;
}

/** The first key, which has no say in where the colours of weights end (scale.ts); null where it is not in view. */
export function firstOf(matrix: Matrix, field: string, sink: Sink): number | null {
  return sink === "show" && (field === "weights" || field === "applied") ? firstKey(matrix) : null;
}

/**
 * What goes to a sink is no key's: it does not count in what is shared out, and is left out where the rest is all there is.
 *
 * The same matrix where nothing is to be changed; what is left out is NaN. */
export function presented(matrix: Matrix, field: string, sink: Sink, filter: Filter, axes: Axes): Matrix {
  const sunk = (field === "weights" || field === "applied") && sink !== "show";
  const [from, to] = [axes.queries.segments, axes.keys.segments];
  const split = filter !== "all" && from !== null && to !== null;
  if (!sunk && !split) return matrix;
  const { rows, cols } = matrix;
  const data = matrix.data instanceof Float64Array ? matrix.data.slice() : Float32Array.from(matrix.data);
  if (sunk) {
    const key = firstKey(matrix);
    const extra = axes.keys.sink ?? -1;
    for (let t = 0; t < rows; t++) {
      const row = t * cols;
      let rest = 0;
      for (let i = row; i < row + cols; i++) rest += i === row + key || i === row + extra ? 0 : data[i]! || 0;
      data[row + key] = NaN;
      if (sink !== "renormalise") continue;
      if (extra >= 0) data[row + extra] = NaN;
      if (rest > 0) for (let i = row; i < row + cols; i++) data[i]! /= rest;
    }
  }
  if (split) {
    const wanted = [...filter].map((letter) => (letter === "A" ? 0 : 1));
    for (let t = 0; t < rows; t++) {
      for (let s = 0; s < cols; s++) if (from[t] !== wanted[0] || to[s] !== wanted[1]) data[t * cols + s] = NaN;
    }
  }
  return { ...matrix, data };
}
