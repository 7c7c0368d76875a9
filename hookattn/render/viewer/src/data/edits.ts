/** What was edited in a call, in words and entry by entry. The words are those of hookattn/calls/edits.py. */
import { type Call, kvHead } from "./call";
import type { Edit } from "./document";

type Edited = Pick<Call, "edits">;

/** Numbers named of each axis, and edits named of a call; more are counted. */
const NUMBERS = 6;
const EDITS = 3;

export function editsOf({ edits }: Edited): readonly Edit[] {
  return edits ?? [];
}

/** `zero(weights) head 1, query 5`. */
export function tell({ edit, field, heads, queries, keys, batch, note }: Edit): string {
  const named: [string, readonly number[] | null][] = [
    ["head", heads],
    ["query", queries],
    ["key", keys],
    ["batch entry", batch],
  ];
  const at = named.filter(([, numbers]) => numbers !== null).map(([name, numbers]) => `${name} ${listed(numbers!)}`);
  return [`${edit}(${field})`, at.join(", "), note].filter(Boolean).join(" ");
}

function listed(numbers: readonly number[]): string {
  return [...numbers.slice(0, NUMBERS), ...(numbers.length > NUMBERS ? ["…"] : [])].join(" ");
}

/** `edited: zero(weights) head 1; …`; empty: nothing was edited. `all`: each of them, however many. */
export function edited(call: Edited, all = false): string {
  const told = [...new Set(editsOf(call).map(tell))];
  if (told.length === 0) return "";
  const shown = all ? told : told.slice(0, EDITS);
  const rest = told.length - shown.length;
  return `edited: ${shown.join("; ")}${rest > 0 ? ` and ${rest} more` : ""}`;
}

/** Those of a query head, by its number in the model, or of the key head that it reads, as far as that is known. */
export function editsOfHead(call: Call, head: number): readonly Edit[] {
  return editsOf(call).filter(({ field, heads }) => {
    if (heads === null) return true;
    if (field !== "k" && field !== "v") return heads.includes(head);
    return call.heads !== null || heads.includes(kvHead(call, head));
  });
}

/**
 * The places among the stored queries, or keys, that edits of a batch entry and of some heads name one by one; null:
 * none.
 */
export function namedBy(
  call: Call,
  axis: "queries" | "keys",
  batch: number,
  heads: readonly number[],
  length: number,
): Uint8Array | null {
  const named = new Set<number>();
  for (const edit of new Set(heads.flatMap((head) => editsOfHead(call, head))))
    if (edit.batch === null || edit.batch.includes(batch)) for (const number of edit[axis] ?? []) named.add(number);
  if (named.size === 0) return null;
  const numberOf = (i: number) => (axis === "queries" ? (call.queries?.[i] ?? i) : i);
  return Uint8Array.from({ length }, (_, i) => (named.has(numberOf(i)) ? 1 : 0));
}

/** Which weights of a query were set, so that they are no softmax of the scores; null: none. `head`: its number. */
export function weightsSet(call: Call, batch: number, head: number, query: number): ((key: number) => boolean) | null {
  const number = call.queries?.[query] ?? query;
  const found = editsOf(call).filter(
    (e) =>
      e.field === "weights" &&
      [[e.batch, batch] as const, [e.heads, head] as const, [e.queries, number] as const].every(
        ([chosen, one]) => chosen === null || chosen.includes(one),
      ),
  );
  return found.length === 0 ? null : (key) => found.some((e) => e.keys === null || e.keys.includes(key));
}
