/** One attention call of a trace: its document, and the extents that follow from the tensors' shapes. */
import type { CallDocument } from "./document";

/** Where the keys and the queries of a call are in its sequence. */
export interface Place {
  /** Position of the first key. */
  first: number;
  /** Position of the first query. */
  past: number;
  /** Whether it is known where the queries are. */
  certain: boolean;
  /** Whether the sequence is longer in other steps. */
  grows: boolean;
  /** How many tokens a list of the sequence has at least; null where it may be of several sequences. */
  least: number | null;
}

export interface Call extends CallDocument {
  /** Its place among the calls of the trace. */
  readonly index: number;
  /** Batch, query heads, key/value heads, queries, keys; 0 where no captured field tells. */
  readonly extents: { B: number; H: number; G: number; T: number; S: number };
  /** The number that the model gives each stored head. */
  readonly headNumbers: number[];
  /** How many queries the kernel had; of selected rows an older file only tells that it had them. */
  readonly fed: number;
  /** How many positions of the same site were fed in earlier steps: the position of the first query. */
  readonly past: number;
  /** Of cross-attention: how many queries of its own sequence stand before the first. */
  readonly before: number;
  /** Where its keys are in its sequence. */
  readonly place: Place;
}

export function where(call: Call): string {
  const { path, layer, stack, kind } = call.site;
  const at = layer === null ? "" : `layer ${layer}, `;
  const step = call.step > 0 ? `, step ${call.step}` : "";
  const entry = call.entry ? `, in a forward of ${call.entry} alone` : "";
  return `${at}${stack} ${kind} attention (${path || "the model itself"}${step}${entry})`;
}

/** The head of k and v that a stored query head reads. */
export function kvHead(call: Call, head: number): number {
  return call.kv_heads?.[head] ?? Math.floor((head * call.extents.G) / call.extents.H);
}
