/** The part of a matrix that is in view: first key, first query, keys, queries. Fractions of a cell are allowed. */
export type Frame = [number, number, number, number];

/** The smallest side of a frame, in cells. */
const LEAST = 4;

export function whole(keys: number, queries: number): Frame {
  return [0, 0, keys, queries];
}

/** `frame` inside the matrix, or all of it where it makes no sense there. */
export function within(frame: Frame | null, keys: number, queries: number): Frame {
  if (frame === null) return whole(keys, queries);
  const [k, q, wide, high] = frame;
  const w = Math.min(keys, Math.max(Math.min(LEAST, keys), wide));
  const h = Math.min(queries, Math.max(Math.min(LEAST, queries), high));
  return [Math.min(Math.max(0, k), keys - w), Math.min(Math.max(0, q), queries - h), w, h];
}

/** Closer by `factor`, where the point at the parts `x`, `y` of the frame stays where it is. Null: all is in view. */
export function zoomed(
  frame: Frame | null,
  keys: number,
  queries: number,
  factor: number,
  x = 0.5,
  y = 0.5,
): Frame | null {
  const [k, q, w, h] = within(frame, keys, queries);
  const least = Math.max(Math.min(LEAST, keys) / w, Math.min(LEAST, queries) / h);
  const by = Math.max(1 / factor, Math.min(1, least));
  const next = within([k + (1 - by) * w * x, q + (1 - by) * h * y, w * by, h * by], keys, queries);
  return next[2] >= keys && next[3] >= queries ? null : next;
}

export function moved(
  frame: Frame | null,
  keys: number,
  queries: number,
  byKeys: number,
  byQueries: number,
): Frame | null {
  if (frame === null) return null;
  const [k, q, w, h] = within(frame, keys, queries);
  return within([k + byKeys, q + byQueries, w, h], keys, queries);
}
