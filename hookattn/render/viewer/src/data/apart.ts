/** How far the heads of a call are from those of its twin in the second trace. */
import type { Call } from "./call";
import { areShares } from "./kinds";
import { type Distance, distance, misfit, twinOf } from "./pairs";
import type { Slices } from "../slices";
import type { Trace } from "./trace";

export interface Row extends Distance {
  call: Call;
  head: number;
}

/**
 * The distances of the heads that a call and its twin have in common, or of one; none where there is no twin that fits.
 */
export async function apart(
  trace: Trace,
  other: Trace,
  call: Call,
  field: string,
  batch: number,
  alone: number | null,
  slices: Slices,
): Promise<Row[]> {
  const twin = twinOf(trace, other, call);
  if (twin === null || misfit(call, twin) !== null || !trace.has(call, field) || !other.has(twin, field)) return [];
  // What is no distribution has no total variation; its largest difference is what it is.
  const shares = areShares(call, field) && areShares(twin, field);
  const rows: Row[] = [];
  for (const head of (alone === null ? call.headNumbers : [alone]).filter((h) => twin.headNumbers.includes(h))) {
    const read = (name: string) =>
      Promise.all(
        ([[trace, call], [other, twin]] as const).map(([of, c]) => {
          const [entry, place] = [Math.min(batch, c.extents.B - 1), Math.max(0, c.headNumbers.indexOf(head))];
          return of.has(c, name) ? of.optional(c, name, entry, place) : null;
        }),
      );
    const [masks, [a, b]] = await Promise.all([read("mask"), read(field)]);
    rows.push({ call, head, ...(await distance(a!, b!, masks, slices, shares)) });
  }
  return rows;
}
