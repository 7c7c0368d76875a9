/**
 * Where the colours of weights end. `hookattn/render/scale.py` is the same rule for figures, and tests compare the two.
 *
 * The largest weight would do where heads are sharp. But in a causal head it is always the 1 of the first query, beside
 * which a diffuse head is blank. So the end is the 0.75 quantile of the largest weights of those rows that have more than
 * a few keys. The quantile is over rows, not entries: of a sharp head of 2,048 tokens all but one entry in a thousand is
 * noise, and a quantile of entries would draw noise as strong as attention.
 */
import { type Matrix, thereOf } from "./data/matrix";
import type { Slices } from "./slices";

/** Rows of at most so many keys do not count. */
const KEYS = 8;
/** With fewer rows that count, the largest weight is the end. */
const ROWS = 8;
const QUANTILE = 0.75;
/** How many times the weight of a uniform head the end is at the least, so that one stays pale. */
const UNIFORM = 4;

/** What a domain is made of: the smallest and the largest number there is, and where the colours end. */
export interface Range {
  readonly low: number;
  readonly high: number;
  readonly end: number;
}

/**
 * Of one head, NaN where it is masked. `first`: the key where heads rest attention that has nowhere to go, which counts
 * in no row's largest; null: there is none. `keys`: columns after these are no keys, and do not count.
 */
export async function rangeOf(
  matrix: Matrix,
  first: number | null,
  slices: Slices,
  keys = matrix.cols,
): Promise<Range> {
  const { cols, data } = matrix;
  let low = Infinity;
  let high = -Infinity;
  let size = 0;
  let total = 0;
  const tops: number[] = [];
  for (let t = 0, row = 0; t < thereOf(matrix); t++, row += cols) {
    let [count, top, sum] = [0, 0, 0];
    for (let s = 0; s < cols; s++) {
      const x = data[row + s]!;
      // Neither NaN nor infinite.
      if (x - x !== 0) continue;
      if (x < low) low = x;
      if (x > high) high = x;
      if (s >= keys) continue;
      const far = x < 0 ? -x : x;
      count++;
      sum += far;
      if (far > size) size = far;
      if (far > top && s !== first) top = far;
    }
    if (count > KEYS) {
      tops.push(top);
      total += sum;
    }
    if (t % 64 === 0) await slices.turn();
  }
  if (low > high) return { low: NaN, high: NaN, end: 0 };
  if (tops.length < ROWS) return { low, high, end: size };
  tops.sort((a, b) => a - b);
  let end = tops[Math.floor(QUANTILE * (tops.length - 1))]!;
  if (end >= size / 2) end = size;
  end = Math.max(end, (UNIFORM * total) / tops.length / keys);
  return { low, high, end: end === size ? end : roundedUp(end) };
}

/** To two significant digits. */
function roundedUp(x: number): number {
  if (x <= 0) return x;
  const step = 10 ** (Math.floor(Math.log10(x)) - 1);
  // What a division makes of two digits may be a little more than they are.
  return Math.ceil(x / step - 1e-9) * step;
}

/** The range of several heads that share their colours. */
export function joined(ranges: readonly Range[]): Range {
  const found = ranges.filter(({ low }) => !Number.isNaN(low));
  if (found.length === 0) return { low: NaN, high: NaN, end: 0 };
  return {
    low: Math.min(...found.map((r) => r.low)),
    high: Math.max(...found.map((r) => r.high)),
    end: Math.max(...found.map((r) => r.end)),
  };
}
