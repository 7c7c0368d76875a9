/** One attention call of a trace: its document, and the extents that follow from the tensors' shapes. */
import type { CallDocument, Entry } from "./document";
import { crosses, type Place, places } from "./keytokens";

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
  /** Where its keys are in its sequence. */
  readonly place: Place;
}

/** B H T S, 0 for an axis that the field does not have. */
const AXES: Record<string, string> = {
  scores: "BHTS",
  weights: "BHTS",
  q: "BHT",
  output: "BHT",
  k: "BGS",
  v: "BGS",
};

export function describeCalls(documents: CallDocument[], entries: ReadonlyMap<string, Entry>): Call[] {
  const calls = documents.map((document, index) => {
    const extents = { B: 0, H: 0, G: 0, T: 0, S: document.keys ?? 0 };
    for (const [field, axes] of Object.entries(AXES)) {
      const shape = entries.get(document.fields[field] ?? "")?.shape;
      if (shape !== undefined) [...axes].forEach((axis, i) => (extents[axis as keyof typeof extents] = shape[i]!));
    }
    for (const field of ["mask", "bias"]) {
      // Broadcastable: its extents are those of the call where they are larger than one.
      const shape = entries.get(document.fields[field] ?? "")?.shape;
      if (shape?.length === 4)
        "BHTS".split("").forEach((axis, i) => (extents[axis as "B"] ||= shape[i]! > 1 ? shape[i]! : 0));
    }
    for (const axis of ["B", "H", "T", "S"] as const)
      extents[axis] ||= axis === "H" ? (document.heads?.length ?? 1) : 1;
    const headNumbers = document.heads ?? Array.from({ length: extents.H }, (_, i) => i);
    const last = document.queries?.reduce((most, i) => Math.max(most, i), 0) ?? extents.T - 1;
    const fed = document.of_queries ?? last + 1;
    const place: Place = { first: 0, past: 0, certain: true, grows: false, least: extents.S };
    return { ...document, index, extents, fed, past: 0, place, headNumbers };
  });
  // A module may run several times in one step; each such run is a sequence of its own.
  const sites = new Map<string, (typeof calls)[number][]>();
  const runs = new Map<string, number>();
  for (const call of calls.filter((c) => !crosses(c.site))) {
    const run = `${call.step} ${call.site.path}`;
    const nth = runs.get(run) ?? 0;
    runs.set(run, nth + 1);
    const key = `${nth} ${call.site.path}`;
    const others = sites.get(key);
    if (others === undefined) sites.set(key, [call]);
    else others.push(call);
  }
  for (const of of sites.values()) {
    for (const [i, place] of places(of).entries()) Object.assign(of[i]!, { place, past: place.past });
  }
  return calls;
}

export function where(call: Call): string {
  const { path, layer, stack, kind } = call.site;
  const at = layer === null ? "" : `layer ${layer}, `;
  const step = call.step > 0 ? `, step ${call.step}` : "";
  return `${at}${stack} ${kind} attention (${path || "the model itself"}${step})`;
}

/** The head of k and v that a stored query head reads. */
export function kvHead(call: Call, head: number): number {
  return call.kv_heads?.[head] ?? Math.floor((head * call.extents.G) / call.extents.H);
}
