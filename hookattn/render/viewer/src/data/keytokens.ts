/**
 * Whose tokens the keys of a call are: the rule of hookattn/calls/key_tokens.py, which tables and figures follow.
 * tests/calls/test_key_tokens.py holds both to the same answers; a change here is a change there.
 */
import type { Call, Place } from "./call";
import type { Site, TraceDocument } from "./document";

/** Stacks that read no text, whatever their axes are said to count. */
const NO_TEXT: ReadonlySet<string> = new Set(["vision", "audio"]);
const TOGETHER = "put together from ";

/** Whether the keys are another sequence's than the queries. */
export function crosses({ kind }: Site): boolean {
  return kind.startsWith("cross");
}

/** Whether the keys of a call are the text that the trace's tokens are of, as far as the trace tells. */
export function readsTokens({ site }: Call, calls: readonly Call[]): boolean {
  if (site.axes !== "tokens" || NO_TEXT.has(site.stack)) return false;
  // A decoder or a fusion layer may read either tower.
  if (crosses(site)) return !calls.some((c) => NO_TEXT.has(c.site.stack));
  if (site.stack !== "text" && calls.some((c) => c.site.stack === "text")) return false;
  const crossing = new Set(calls.filter((c) => crosses(c.site)).map((c) => c.site.stack));
  // An encoder that crosses to its input has latents, or learned queries, of its own.
  return crossing.size === 0 || (site.stack === "encoder" && !crossing.has("encoder"));
}

type Sized = Pick<Call, "site" | "step" | "fed" | "extents" | "notes">;

/** Where each call of one site is in its sequence, in the order of its steps. */
export function places(calls: readonly Sized[]): Place[] {
  const keys = calls.map((c) => c.extents.S);
  const fed = calls.map((c) => c.fed);
  const before = calls.map((c) => c.extents.S - c.fed);
  // A cache that only ever grows tells it, also where rejected candidates are taken back. One of fixed size, or that
  // drops what is old, does not: there it is what was fed.
  const rises = before.length > 2 && before[0] === 0 && before.every((n, i) => i === 0 || n > before[i - 1]!);
  let end = 0;
  const past = before.map((n, i) => {
    // Without a cache each step is fed all from its beginning.
    const at = i === 0 || n <= 0 ? 0 : rises ? n : end;
    end = at + fed[i]!;
    return at;
  });
  const whole = (i: number): Place => ({
    first: 0,
    past: past[i]!,
    certain: before[i]! <= 0,
    grows: false,
    least: keys[i]!,
  });
  if (calls.length === 1) {
    const grows = calls[0]!.notes.some((note) => note.startsWith(TOGETHER));
    return [{ ...whole(0), certain: grows || before[0]! <= 0, grows }];
  }
  if (before.every((n) => n <= 0)) {
    const grows = keys.every((n, i) => i === 0 || n > keys[i - 1]!);
    return calls.map((_, i) => (grows ? { ...whole(i), grows, least: keys[0]! } : whole(i)));
  }
  if (before.slice(1).some((n) => n <= 0)) {
    return calls.map((_, i) => (before[i]! <= 0 ? whole(i) : { ...whole(i), least: null }));
  }
  if (before[0]! > 0 && keys.every((n, i) => i === 0 || n - keys[i - 1]! === fed[i])) {
    // The cache was filled before the first of these steps, and has dropped nothing since.
    return calls.map((_, i) => ({ ...whole(i), past: before[i]!, certain: true, grows: true, least: keys.at(-1)! }));
  }
  if (before[0]! > 0 && (calls[0]!.step !== 0 || new Set(keys).size > 1)) return calls.map((_, i) => whole(i));
  // What begins with an empty cache: one that grows, one of fixed size, or a window that drops the oldest keys.
  return calls.map((_, i) => ({
    first: Math.max(0, past[i]! + fed[i]! - keys[i]!),
    past: past[i]!,
    certain: true,
    grows: true,
    least: fed[0]!,
  }));
}

/** How many queries of its own sequence stand before those of each call of one site of cross-attention. */
export function queriesBefore(calls: readonly Pick<Call, "fed">[]): number[] {
  const fed = calls.map((c) => c.fed);
  // Where each step has more queries than the one before, all are fed again from their beginning.
  const again = fed.length > 1 && fed.every((n, i) => i === 0 || n > fed[i - 1]!);
  let sum = 0;
  return fed.map((n) => (again ? 0 : (sum += n) - n));
}

type Lists = readonly string[][];
type Tokens = Pick<TraceDocument, "tokens" | "stack_tokens">;

/** The lists that the keys of a call are among; null: there are none. Those of a stack come before the trace's own. */
function listsOfKeys(call: Call, calls: readonly Call[], { tokens, stack_tokens: named = {} }: Tokens): Lists | null {
  const { stack } = call.site;
  const others = Object.keys(named).filter((name) => name !== stack);
  const own = !crosses(call.site)
    ? stack
    : others.includes("encoder")
      ? "encoder"
      : others.length === 1
        ? others[0]!
        : "";
  if (Object.hasOwn(named, own)) return named[own]!;
  return readsTokens(call, calls) ? tokens : null;
}

/** The tokens of a batch entry that the queries of cross-attention are among, each at its position; or null. */
export function crossTokens(call: Call, calls: readonly Call[], tokens: Tokens, batch: number): string[] | null {
  const named = tokens.stack_tokens ?? {};
  const lists = Object.hasOwn(named, call.site.stack) ? named[call.site.stack]! : null;
  const one = fitting(lists, call, batch);
  if (one === null) return null;
  const steps = calls.filter((c) => crosses(c.site) && c.site.path === call.site.path);
  const alone = steps.every((c) => c.step === call.step) && !call.notes.some((note) => note.startsWith(TOGETHER));
  const least = steps.reduce((first, c) => (c.before === 0 && c.step < first.step ? c : first), call).fed;
  return (alone ? one.length === call.fed : one.length >= least) ? one : null;
}

/** The list of a batch entry, of lists that are as many as the batch, or one, and of one length. */
function fitting(lists: Lists | null, { extents }: Call, batch: number): string[] | null {
  if (lists === null || (lists.length !== 1 && lists.length !== extents.B)) return null;
  // Lists of several lengths have lost their padding, so that they do not line up.
  return lists.some((list) => list.length !== lists[0]!.length) ? null : lists[lists.length > 1 ? batch : 0]!;
}

/** The tokens of a batch entry that the keys of a call are among, each at its position; null: they are not its keys'. */
export function keyTokens(call: Call, calls: readonly Call[], tokens: Tokens, batch: number): string[] | null {
  const { place, extents } = call;
  const list = fitting(listsOfKeys(call, calls, tokens), call, batch);
  if (list === null || place.least === null) return null;
  const n = list.length;
  const fits = place.grows ? n >= place.least : n === extents.S;
  return fits && place.first < n ? list : null;
}
