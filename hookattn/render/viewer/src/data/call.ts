/** One attention call of a trace: its document, and the extents that follow from the tensors' shapes. */
import type { CallDocument, Entry } from "./document";

export interface Call extends CallDocument {
  /** Its place among the calls of the trace. */
  readonly index: number;
  /** Batch, query heads, key/value heads, queries, keys; 0 where no captured field tells. */
  readonly extents: { B: number; H: number; G: number; T: number; S: number };
  /** The number that the model gives each stored head. */
  readonly headNumbers: number[];
  /** How many positions of the same site were fed in earlier steps: the position of the first query. */
  readonly past: number;
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
  // By site: the last of its calls. A module may run several times in one step.
  const fed = new Map<string, Fed>();
  return documents.map((document, index) => {
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
    const key = `${document.site.path}\n${document.site.kind}`;
    const start = startOf(fed.get(key), document, extents);
    fed.set(key, { step: document.step, start, T: extents.T, S: extents.S });
    return {
      ...document,
      index,
      extents,
      past: document.site.kind === "self" ? start : 0,
      headNumbers: document.heads ?? Array.from({ length: extents.H }, (_, i) => i),
    };
  });
}

/** A call of a site, and the position of its first query. */
interface Fed {
  step: number;
  start: number;
  T: number;
  S: number;
}

/** The position of a call's first query, which a generation counts on from step to step. */
function startOf(last: Fed | undefined, { step, queries }: CallDocument, { T, S }: { T: number; S: number }): number {
  if (last === undefined) return 0;
  if (last.step === step) return last.start;
  // No cache: each step is fed everything from its beginning.
  if (queries === null && T === S) return 0;
  const next = last.start + last.T;
  // A cache of fewer positions than were fed has dropped the oldest (a window, which then has a length that stays),
  // or the last step's rejected candidates.
  const rejected = next + T > S && last.start > 0 && S - T > last.start && S !== last.S;
  return rejected ? S - T : next;
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
