/** The strongest entries of several matrices, and how much of the whole they are. */
import type { Slices } from "../slices";
import type { Matrix } from "./matrix";

export interface Link {
  /** Which of the matrices. */
  of: number;
  query: number;
  key: number;
  value: number;
}

export interface Strongest {
  links: Link[];
  /** What they have of the sum of all entries. */
  share: number;
}

/**
 * At most `limit` entries of at least `floor`, the weakest first. Positive floats are ordered as their bits are, so that a
 * histogram over the upper half of the bits tells from where on there are few enough: two passes, and nothing is sorted
 * but what is drawn.
 */
export async function strongest(
  matrices: readonly Matrix[],
  limit: number,
  floor: number,
  slices: Slices,
): Promise<Strongest> {
  const counts = new Uint32Array(1 << 16);
  const narrow = matrices.map((m) => (m.data instanceof Float32Array ? m.data : Float32Array.from(m.data)));
  let total = 0;
  for (const data of narrow) {
    const bits = new Uint32Array(data.buffer, data.byteOffset, data.length);
    for (let i = 0; i < data.length; i++) {
      const x = data[i]!;
      if (!(x > 0)) continue;
      total += x;
      if (x >= floor) counts[bits[i]! >>> 16]!++;
      if ((i & 0xffff) === 0) await slices.turn();
    }
  }
  let bin = counts.length - 1;
  for (let n = counts[bin]!; bin > 0 && n + counts[bin - 1]! <= limit; bin--) n += counts[bin - 1]!;
  const least = Math.max(floor, new Float32Array(Uint32Array.of(bin * 2 ** 16).buffer)[0]!);
  const links: Link[] = [];
  let kept = 0;
  for (const [of, data] of narrow.entries()) {
    const cols = matrices[of]!.cols;
    for (let i = 0; i < data.length; i++) {
      const value = data[i]!;
      if (!(value >= least)) continue;
      kept += value;
      links.push({ of, query: Math.floor(i / cols), key: i % cols, value });
    }
    await slices.turn();
  }
  links.sort((a, b) => a.value - b.value);
  return { links, share: total > 0 ? kept / total : 0 };
}
