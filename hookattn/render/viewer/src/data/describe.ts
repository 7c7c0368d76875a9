/** The calls of a document, with what follows from the shapes of their tensors and from the other calls. */
import type { Call, Place } from "./call";
import type { CallDocument, Entry } from "./document";
import { crosses, places, queriesBefore } from "./keytokens";

/** B H T S, 0 for an axis that the field does not have. */
const AXES: Record<string, string> = {
  scores: "BHTS",
  weights: "BHTS",
  applied: "BHTS",
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
    return { ...document, index, extents, fed, past: 0, before: 0, place, headNumbers };
  });
  // A module may run several times in one step; each such run is a sequence of its own.
  const sites = new Map<string, (typeof calls)[number][]>();
  const runs = new Map<string, number>();
  for (const call of calls) {
    const at = `${crosses(call.site)} ${call.site.path}`;
    const run = `${call.step} ${at}`;
    const nth = runs.get(run) ?? 0;
    runs.set(run, nth + 1);
    const key = `${nth} ${at}`;
    const others = sites.get(key);
    if (others === undefined) sites.set(key, [call]);
    else others.push(call);
  }
  for (const of of sites.values()) {
    if (crosses(of[0]!.site)) {
      for (const [i, before] of queriesBefore(of).entries()) Object.assign(of[i]!, { before });
      continue;
    }
    for (const [i, place] of places(of).entries()) Object.assign(of[i]!, { place, past: place.past });
  }
  return calls;
}
