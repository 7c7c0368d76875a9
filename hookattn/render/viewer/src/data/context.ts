/** What counts in a call and a batch entry, for `measured.ts`: the rules of `hookattn/analyze/call_view.py`. */
import type { Slices } from "../slices";
import type { Call } from "./call";
import { crosses, keyTokens } from "./keytokens";
import type { Matrix } from "./matrix";
import type { Context, Related } from "./measured";
import type { Trace } from "./trace";

/** `mask`: of the first head, or null where none was kept; `rows`: the queries that are measured. */
export async function contextOf(
  trace: Trace,
  call: Call,
  batch: number,
  mask: Matrix | null,
  rows: Int32Array,
  slices: Slices,
): Promise<Context> {
  const { T, S } = call.extents;
  const may = (t: number, s: number) => mask === null || mask.data[t * S + s]! !== 0;
  const real = new Uint8Array(S).fill(mask === null ? 1 : 0);
  // The last queries mostly see all the keys there are.
  for (let t = T - 1, n = mask === null ? S : 0; t >= 0 && n < S; t--) {
    for (let s = 0; s < S; s++) if (!real[s] && may(t, s)) (real[s] = 1), n++;
    await slices.turn();
  }
  const allowed = mask === null ? null : new Int32Array(rows.length);
  for (let r = 0; allowed !== null && r < rows.length; r++) {
    for (let s = 0, i = rows[r]! * S; s < S; s++, i++) if (mask!.data[i]) allowed[r]!++;
    await slices.turn();
  }
  const placed = !crosses(call.site) && call.place.certain;
  const at = placed
    ? rows.map((t) => {
        const key = call.past + (call.queries?.[t] ?? t) - call.place.first;
        return key >= 0 && key < S ? key : -1;
      })
    : null;
  const counts = Uint8Array.from(rows, (_, r) => {
    const key = at?.[r] ?? -1;
    return (allowed === null || allowed[r]! > 0) && (key < 0 || real[key] === 1) ? 1 : 0;
  });
  const tokens = at === null ? null : keyTokens(call, trace.calls, trace.document, batch);
  const named = tokens !== null && tokens.length >= call.place.first + S;
  let duplicate: Related | null = null;
  let induction: Related | null = null;
  if (named) {
    const words = tokens.slice(call.place.first, call.place.first + S);
    const found = await related(words, at!, counts, slices);
    const open = (r: number, key: number) => real[key] === 1 && may(rows[r]!, key);
    duplicate = kept(found, 0, open);
    induction = kept(found, 1, open);
  }
  return { rows, at, counts, allowed, first: Math.max(0, real.indexOf(1)), duplicate, induction };
}

/** For each row the earlier keys with the token of its query. */
async function related(words: readonly string[], at: Int32Array, counts: Uint8Array, slices: Slices): Promise<Related> {
  const places = new Map<string, number[]>();
  words.forEach((word, s) => (places.get(word) ?? places.set(word, []).get(word)!).push(s));
  const start = new Int32Array(at.length + 1);
  const keys: number[] = [];
  for (let r = 0; r < at.length; r++) {
    const p = at[r]!;
    if (p >= 0 && counts[r] === 1)
      for (const s of places.get(words[p]!)!) {
        if (s >= p) break;
        keys.push(s);
      }
    start[r + 1] = keys.length;
    await slices.turn();
  }
  return { start, key: Int32Array.from(keys) };
}

/** The same keys moved by `offset`, of which those are kept that are open. */
function kept(found: Related, offset: number, open: (row: number, key: number) => boolean): Related {
  const start = new Int32Array(found.start.length);
  const keys: number[] = [];
  for (let r = 0; r + 1 < start.length; r++) {
    for (let i = found.start[r]!; i < found.start[r + 1]!; i++) {
      const key = found.key[i]! + offset;
      if (open(r, key)) keys.push(key);
    }
    start[r + 1] = keys.length;
  }
  return { start, key: Int32Array.from(keys) };
}
