/** What the rows and columns of a call are called. */
import { readable, segments, type Label } from "../tokens";
import type { Call } from "./call";
import type { Trace } from "./trace";

export interface Axis {
  labels: Label[];
  /** Position in the sequence of each entry. */
  positions: number[];
  /** Which sentence of a pair each entry belongs to; null where there is no pair. */
  segments: Uint8Array | null;
  /** Whether the labels are tokens, or numbers for want of them. */
  named: boolean;
}

export interface Axes {
  queries: Axis;
  keys: Axis;
}

const cache = new WeakMap<Trace, Map<string, Axes>>();

export function axesOf(trace: Trace, call: Call, batch: number): Axes {
  let known = cache.get(trace);
  if (known === undefined) cache.set(trace, (known = new Map()));
  const key = `${call.index} ${batch}`;
  let axes = known.get(key);
  if (axes === undefined) {
    // A generation of many steps and layers would keep the labels of each.
    if (known.size > 64) known.clear();
    known.set(key, (axes = make(trace, call, batch)));
  }
  return axes;
}

function make(trace: Trace, call: Call, batch: number): Axes {
  const { T, S } = call.extents;
  const lists = trace.document.tokens;
  const tokens = lists?.[batch] ?? lists?.[0] ?? null;
  const own = call.site.kind === "self";
  const queries = Array.from({ length: T }, (_, t) => call.past + (call.queries?.[t] ?? t));
  // A sliding window drops the oldest keys of its cache.
  const dropped = own ? Math.max(0, call.past + call.fed - S) : 0;
  const keys = Array.from({ length: S }, (_, s) => dropped + s);
  // The tokens are those of the model's input: of the encoder, where there is one beside the decoder.
  const encoded = call.site.stack === "decoder" && trace.calls.some((c) => c.site.stack === "encoder");
  const fits = tokens !== null && call.site.axes === "tokens";
  // Of a generation, the tokens may be the prompt's alone: those after it are numbers.
  const prompt = trace.calls.find((c) => c.site.path === call.site.path && c.site.kind === "self");
  const enough = call.past > 0 && prompt !== undefined ? prompt.fed : (queries.at(-1) ?? -1) + 1;
  const forSelf = fits && own && !encoded && tokens.length >= enough;
  const forKeys = forSelf || (fits && !own && tokens.length === S);
  return { queries: axis(queries, forSelf ? tokens : null), keys: axis(keys, forKeys ? tokens : null) };
}

function axis(positions: number[], tokens: string[] | null): Axis {
  const read = tokens === null ? null : readable(tokens);
  const pair = tokens === null ? null : segments(tokens);
  return {
    labels: positions.map((p) => read?.[p] ?? { text: String(p), raw: String(p) }),
    positions,
    segments:
      pair === null || positions.some((p) => p >= pair.length) ? null : Uint8Array.from(positions, (p) => pair[p]!),
    named: read !== null,
  };
}
