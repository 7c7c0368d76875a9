/** Which heads look at one key from one query, across the layers. */
import type { Slices } from "../slices";
import type { Call } from "./call";
import { weightsOf } from "./kinds";
import type { Trace } from "./trace";

export interface Look {
  readonly weight: number;
  /** From 1, among the keys of the same query of the same head. */
  readonly rank: number;
}

/** Rows that are read at the same time. */
const AT_ONCE = 24;

/** By `call head`, the model's number; `show` gets what there is so far. Calls that have other keys are left out. */
export async function looksAt(
  trace: Trace,
  calls: readonly Call[],
  asked: string,
  batch: number,
  query: number,
  key: number,
  slices: Slices,
  show: (found: ReadonlyMap<string, Look>) => void,
): Promise<ReadonlyMap<string, Look>> {
  const wanted = calls.flatMap((call) => call.headNumbers.map((head, place) => ({ call, head, place })));
  const found = new Map<string, Look>();
  let shown = performance.now();
  for (let i = 0; i < wanted.length; i += AT_ONCE) {
    const part = wanted.slice(i, i + AT_ONCE);
    const rows = await Promise.all(
      part.map(({ call, place }) => {
        const field = weightsOf(call, asked);
        return trace.has(call, field) ? trace.row(call, field, batch, place, query) : null;
      }),
    );
    rows.forEach((row, n) => {
      const weight = row?.data[key];
      if (weight === undefined) return;
      let rank = 1;
      for (const x of row!.data) if (Math.abs(x) > Math.abs(weight)) rank++;
      found.set(`${part[n]!.call.index} ${part[n]!.head}`, { weight, rank });
    });
    if (performance.now() - shown > 100) {
      show(new Map(found));
      shown = performance.now();
    }
    await slices.turn();
  }
  return found;
}
