/** What counts in a call and a batch entry, for `measured.ts`: the rules of `hookattn/analyze/call_view.py`. */
import type { Slices } from "../slices";
import type { Call } from "./call";
import { crosses, keyTokens } from "./keytokens";
import type { Matrix } from "./matrix";
import type { Context, Related } from "./measured";
import type { Trace } from "./trace";

/** Pairs of equal tokens at the most: a token that is everywhere has S² / 2 of them. */
const PAIRS = 2 ** 24;

/** `mask`: of the first head, or null where none was kept. */
export async function contextOf(
  trace: Trace,
  call: Call,
  batch: number,
  mask: Matrix | null,
  slices: Slices,
): Promise<Context> {
  const { T, S } = call.extents;
  const allowed = mask === null ? null : new Int32Array(T);
  const real = new Uint8Array(S).fill(mask === null ? 1 : 0);
  if (mask !== null) {
    for (let t = 0; t < T; t++) {
      let n = 0;
      for (let s = 0, i = t * S; s < S; s++, i++) {
        if (!mask.data[i]) continue;
        n++;
        real[s] = 1;
      }
      allowed![t] = n;
      await slices.turn();
    }
  }
  const placed = !crosses(call.site) && call.place.certain;
  const at = placed
    ? Int32Array.from({ length: T }, (_, t) => {
        const key = call.past + (call.queries?.[t] ?? t) - call.place.first;
        return key >= 0 && key < S ? key : -1;
      })
    : null;
  const counts = Uint8Array.from({ length: T }, (_, t) => {
    const key = at?.[t] ?? -1;
    return (allowed === null || allowed[t]! > 0) && (key < 0 || real[key] === 1) ? 1 : 0;
  });
  const tokens = at === null ? null : keyTokens(call, trace.calls, trace.document, batch);
  const named = tokens !== null && tokens.length >= call.place.first + S;
  let duplicate: Related | null = null;
  let induction: Related | null = null;
  if (named) {
    const words = tokens.slice(call.place.first, call.place.first + S);
    const found = await related(words, T, at!, counts, slices);
    if (found !== null) {
      const open = (t: number, key: number) => real[key] === 1 && (mask === null || mask.data[t * S + key]! !== 0);
      duplicate = kept(found, 0, open);
      induction = kept(found, 1, open);
    }
  }
  return { at, counts, allowed, first: Math.max(0, real.indexOf(1)), duplicate, induction };
}

/** For each row the earlier keys with the token of its query. */
async function related(
  words: readonly string[],
  T: number,
  at: Int32Array,
  counts: Uint8Array,
  slices: Slices,
): Promise<Related | null> {
  const places = new Map<string, number[]>();
  words.forEach((word, s) => (places.get(word) ?? places.set(word, []).get(word)!).push(s));
  const start = new Int32Array(T + 1);
  const keys: number[] = [];
  for (let t = 0; t < T; t++) {
    const p = at[t]!;
    if (p >= 0 && counts[t] === 1)
      for (const s of places.get(words[p]!)!) {
        if (s >= p) break;
        keys.push(s);
      }
    if (keys.length > PAIRS) return null;
    start[t + 1] = keys.length;
    await slices.turn();
  }
  return { start, key: Int32Array.from(keys) };
}

/** The same keys moved by `offset`, of which those are kept that are open. */
function kept(found: Related, offset: number, open: (t: number, key: number) => boolean): Related {
  const start = new Int32Array(found.start.length);
  const keys: number[] = [];
  for (let t = 0; t + 1 < start.length; t++) {
    for (let i = found.start[t]!; i < found.start[t + 1]!; i++) {
      const key = found.key[i]! + offset;
      if (open(t, key)) keys.push(key);
    }
    start[t + 1] = keys.length;
  }
  return { start, key: Int32Array.from(keys) };
}
