/** What the rows and columns of a call are called. */
import { readable, segments, type Label } from "../tokens";
import type { Call } from "./call";
import { editsOf, namedBy } from "./edits";
import { crosses, crossTokens, keyTokens } from "./keytokens";
import type { Trace } from "./trace";

export interface Axis {
  labels: Label[];
  /** Position in the sequence of each entry. */
  positions: number[];
  /** Which sentence of a pair each entry belongs to; null where there is no pair. */
  segments: Uint8Array | null;
  /** 1 where an edit names the entry; null where none does. */
  edited: Uint8Array | null;
  /** Whether the labels are tokens, or numbers for want of them. */
  named: boolean;
  /** The entry that is no key but the sink; absent where there is none. */
  sink?: number;
}

export interface Axes {
  queries: Axis;
  keys: Axis;
}

const cache = new WeakMap<Trace, Map<string, Axes>>();

/** `heads`: those that are looked at, whose edits are marked; by default all. */
export function axesOf(trace: Trace, call: Call, batch: number, heads: readonly number[] = call.headNumbers): Axes {
  let known = cache.get(trace);
  if (known === undefined) cache.set(trace, (known = new Map()));
  const key = `${call.index} ${batch}${editsOf(call).length > 0 ? ` ${heads}` : ""}`;
  let axes = known.get(key);
  if (axes === undefined) {
    // A generation of many steps and layers would keep the labels of each.
    if (known.size > 64) known.clear();
    known.set(key, (axes = make(trace, call, batch, heads)));
  }
  return axes;
}

function make(trace: Trace, call: Call, batch: number, heads: readonly number[]): Axes {
  const { T, S } = call.extents;
  const tokens = keyTokens(call, trace.calls, trace.document, batch);
  const across = crosses(call.site) ? crossTokens(call, trace.calls, trace.document, batch) : null;
  const first = across === null ? call.past : call.before;
  const queries = Array.from({ length: T }, (_, t) => first + (call.queries?.[t] ?? t));
  const keys = Array.from({ length: S }, (_, s) => call.place.first + s);
  const forQueries = !crosses(call.site) && call.place.certain;
  return {
    queries: axis(trace, queries, forQueries ? tokens : across, namedBy(call, "queries", batch, heads, T)),
    keys: axis(trace, keys, tokens, namedBy(call, "keys", batch, heads, S)),
  };
}

function axis(trace: Trace, positions: number[], tokens: string[] | null, edited: Uint8Array | null): Axis {
  const read = tokens === null ? null : readable(tokens);
  const pair = tokens === null ? null : (given(trace, tokens) ?? segments(tokens));
  return {
    labels: positions.map((p) => read?.[p] ?? { text: String(p), raw: String(p) }),
    positions,
    segments:
      pair === null || positions.some((p) => p >= pair.length) ? null : Uint8Array.from(positions, (p) => pair[p]!),
    edited,
    named: read !== null,
  };
}

/** Which sentence each token is of, where the trace says it of these tokens; padding counts to the sentence before it. */
function given({ document }: Trace, tokens: string[]): number[] | null {
  // Tokens that were given stack by stack stand in the document twice.
  const text = tokens.join("\0");
  const found = document.segments?.[document.tokens?.findIndex((row) => row.join("\0") === text) ?? -1];
  if (found === undefined || !found.some((n) => n > 0)) return null;
  let last = 0;
  return found.map((n) => (last = n < 0 ? last : Math.min(n, 1)));
}
