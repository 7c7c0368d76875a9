/** Measures the heads of a trace when it is open, the ones in view first, and tells what is found as it comes. */
import { effect } from "@preact/signals";
import type { App } from "./app";
import { work } from "./crew";
import type { Call } from "./data/call";
import { contextOf } from "./data/context";
import { areShares } from "./data/kinds";
import type { Matrix } from "./data/matrix";
import { type Context, joined, type Name, NAMES, STRIDE } from "./data/measured";
import { ALL, rankOf, ROLES, rolesFor } from "./data/roles";
import type { Range } from "./data/trace";
import { message, Unreachable } from "./errors";
import type { Findings, HeadFound, RoleFound } from "./findings";
import { type Measure, type Scores, rolesOf } from "./options";
import { Slices } from "./slices";
import { callOf } from "./state";

/** Numbers of a head that are read; of a larger one some rows, in so many groups. */
const OF_HEAD = 2 ** 19;
const GROUPS = 8;
/** Numbers of all batch entries of a trace that are read; of more, the first entries. */
const OF_TRACE = 2 ** 28;
/** Heads that are read at the same time, and milliseconds between two tellings. */
const AT_ONCE = 4;
const PAUSE = 120;
/** Milliseconds in which the view that is opened asks for what it draws. */
const PAINT = 40;

/** What a measure is: a share, where no unit stands before it. */
const UNITS: Readonly<Record<Name, string | readonly [string, string]>> = {
  induction: "The weight on the tokens that came after earlier occurrences of the query's own token.",
  duplicate_token: "The weight on all earlier occurrences of the query's own token.",
  previous_token: "The weight on the token before.",
  next_token: "The weight on the token after.",
  self_token: "The weight on the token itself.",
  "local_mass(window=2)": "The weight on the token itself and its two neighbours.",
  first_token: "The weight on the first token.",
  learned_sink: "What goes to learned sinks and to no key.",
  normalised_entropy: "The entropy over that of uniform attention.",
  entropy: ["nats", "How spread out the attention of a query is."],
  mean_distance: ["keys", "How far from the query its keys are."],
};

type Values = Partial<Record<Name, number | null>>;
interface Pairs {
  [measure: string]: RoleFound["pair"];
}

/** What is known of one head, all batch entries together. */
interface Known {
  values: Values;
  /** The same of uniform attention. */
  chance: Values;
  pairs: Pairs;
}

export function nothing(app: Pick<App, "trace" | "options">): Findings {
  const heads = app.trace.calls.map((call) => Array.from({ length: call.extents.H }, () => null));
  return { scores: app.options.scores ?? {}, heads, done: 0, total: 0, later: 0, striking: null, missing: null };
}

/** Starts measuring; returns what stops it. */
export function find(app: App): () => void {
  const stop = new AbortController();
  const known = app.trace.calls.map((call) => new Array<Known | null>(call.extents.H).fill(null));
  const chances = new Map<string, Promise<Values>>();
  // Calls that were begun, and those of them that cannot be measured.
  const begun = new Set<Call>();
  const without = new Set<Call>();
  const { ahead = Infinity } = app.trace.source;
  const inView = () => callOf(app.trace, app.state.peek());
  const running = new Set<number>();
  let spent = 0;
  let told = 0;
  let missing: string | null = null;
  const tell = (step: number, last: boolean) => {
    if (stop.signal.aborted || (!last && performance.now() - told < PAUSE)) return;
    told = performance.now();
    let [total, done, later] = [0, 0, 0];
    for (const call of app.trace.calls) {
      if (call.step !== step) continue;
      const { H } = call.extents;
      if (!begun.has(call) && spent + numbersOf(call) > ahead) {
        later += H;
        continue;
      }
      total += H;
      done += without.has(call) ? H : known[call.index]!.filter((k) => k !== null).length;
    }
    app.findings.value = made(app, known, { total, done, later }, missing);
  };
  /** Measures the calls of one step, those in view first; the others as long as they may be read ahead. */
  async function measureStep(step: number): Promise<void> {
    const { stack, kind, layer } = app.state.peek();
    const rank = ({ site }: Call) =>
      (site.stack === stack && site.kind === kind ? 0 : 2) + (site.layer === layer ? 0 : 1);
    const all = app.trace.calls.filter((c) => c.step === step).sort((a, b) => rank(a) - rank(b) || a.index - b.index);
    // Where the step is being measured already, what came into view goes before what is left of it.
    const first = !running.has(step);
    const calls = first ? all : [inView()];
    running.add(step);
    const most = Math.min(OF_TRACE, ahead);
    const entries = Math.max(1, Math.floor(most / Math.max(1, all.reduce((n, c) => n + numbersOf(c), 0))));
    for (const call of calls) {
      if (begun.has(call)) continue;
      if (spent + numbersOf(call) > ahead && call !== inView()) continue;
      begun.add(call);
      if (!app.trace.has(call, "weights")) {
        missing ??= app.trace.lacks("weights", call).message;
        without.add(call);
        continue;
      }
      spent += numbersOf(call) * Math.min(entries, call.extents.B);
      try {
        await measureCall(app, call, Math.min(entries, call.extents.B), chances, stop.signal, (head, found) => {
          known[call.index]![head] = found;
          tell(step, false);
        });
      } catch (error) {
        if (stop.signal.aborted) return;
        missing ??= message(error);
        without.add(call);
        if (!(error instanceof Unreachable)) continue;
        for (const one of app.trace.calls) if (!begun.has(one)) begun.add(one), without.add(one);
      }
    }
    if (first) running.delete(step);
    tell(step, true);
  }
  const follow = effect(() => {
    const { step } = app.state.value;
    const call = callOf(app.trace, app.state.value);
    // What is in view is drawn first: a picture is waited for, what is found of it comes as it comes.
    if (!begun.has(call)) setTimeout(() => !stop.signal.aborted && void measureStep(step), PAINT);
  });
  return () => {
    stop.abort();
    follow();
  };
}

async function measureCall(
  app: App,
  call: Call,
  entries: number,
  chances: Map<string, Promise<Values>>,
  signal: AbortSignal,
  tell: (head: number, found: Known) => void,
): Promise<void> {
  const { trace } = app;
  const { H, S } = call.extents;
  const ranges = sampled(call);
  const rows = Int32Array.from(ranges.flatMap(([first, end]) => Array.from({ length: end - first }, (_, i) => first + i)));
  const sums = new Array<Float64Array | null>(H).fill(null);
  const where = new Array<number[]>(H).fill([]).map(() => new Array<number>(12).fill(0));
  let chance: Promise<Values> | null = null;
  for (let batch = 0; batch < entries; batch++) {
    signal.throwIfAborted();
    // Where heads have masks of their own, the first stands for all, as in hookattn/analyze/chance.py.
    const mask = trace.has(call, "mask") ? await trace.optional(call, "mask", batch, 0) : null;
    const whole = mask ?? (trace.has(call, "mask") ? open(call) : null);
    const context = await contextOf(trace, call, batch, whole, rows, new Slices(10, signal));
    if (batch === 0 && whole !== null) {
      const key = [call.fields["mask"], call.site.stack, call.site.kind, call.step, call.queries, ranges].join(" ");
      chance = chances.get(key) ?? uniform(whole, context, S);
      chances.set(key, chance);
    }
    const one = async (head: number) => {
      await idle(app);
      signal.throwIfAborted();
      const read = await trace.rows(call, "weights", batch, head, ...ranges);
      const out = await work("measure", read!.data, S, context);
      const before = sums[head];
      const next = before === null || before === undefined ? out : joined(before, out);
      for (let m = 0; m < 12; m++)
        if (before == null || next[m * STRIDE + 2] !== before[m * STRIDE + 2]) where[head]![m] = batch;
      sums[head] = next;
    };
    let next = 0;
    const lane = async () => {
      while (next < H) await one(next++);
    };
    await Promise.all(Array.from({ length: Math.min(AT_ONCE, H) }, lane));
  }
  const level = chance === null ? {} : await chance;
  for (let head = 0; head < H; head++) tell(head, read(call, sums[head]!, where[head]!, level));
}

/** Resolves once no view reads all there is. */
function idle({ reading }: App): Promise<void> {
  return new Promise((resolve) => {
    const stop = effect(() => {
      if (reading.value === 0) void Promise.resolve().then(() => stop()).then(resolve);
    });
  });
}

/** Numbers of a batch entry of a call that are read. */
function numbersOf({ extents: { H, T, S } }: Call): number {
  return H * Math.min(OF_HEAD, T * S);
}

/** Rows of a head as ranges: all, or of a large one groups, each in the middle of its part of the rows. */
function sampled({ extents: { T, S } }: Call): Range[] {
  const most = Math.max(GROUPS, Math.floor(OF_HEAD / S));
  if (T <= most) return [[0, T]];
  const size = Math.floor(most / GROUPS);
  return Array.from({ length: GROUPS }, (_, g) => {
    const first = Math.round(((g + 0.5) * T) / GROUPS - size / 2);
    return [first, first + size];
  });
}

/** A mask that hides nothing. */
function open({ extents: { T, S } }: Call): Matrix {
  return { rows: T, cols: S, data: new Uint8Array(T * S).fill(1) };
}

/** What attention that is the same for all keys has of each measure. */
async function uniform(mask: Matrix, context: Context, S: number): Promise<Values> {
  const data = new Float32Array(context.rows.length * S);
  context.rows.forEach((t, r) => {
    const n = context.allowed![r]! || 1;
    for (let s = 0; s < S; s++) data[r * S + s] = mask.data[t * S + s] ? 1 / n : 0;
  });
  return valuesOf(await work("measure", data, S, context));
}

function valuesOf(sums: Float64Array): Values {
  return Object.fromEntries(
    NAMES.map((name, m) => {
      const count = sums[m * STRIDE + 1]!;
      return [name, count > 0 ? sums[m * STRIDE]! / count : null];
    }),
  );
}

function read(call: Call, sums: Float64Array, batches: readonly number[], chance: Values): Known {
  // Weights of a kind that nobody knows are measured where they are shares after all.
  const shares = areShares(call, "weights") || sums[11 * STRIDE] === 0;
  const values: Values = shares ? valuesOf(sums) : {};
  const pairs: Pairs = {};
  NAMES.forEach((name, m) => {
    const [query, key, weight] = sums.subarray(m * STRIDE + 2, m * STRIDE + 5);
    pairs[name] = query! < 0 ? null : { batch: batches[m]!, query: query!, key: key!, weight: weight! };
  });
  return { values, chance, pairs };
}

function made(
  app: App,
  known: (Known | null)[][],
  counts: Pick<Findings, "done" | "total" | "later">,
  missing: string | null,
): Findings {
  const given = app.options.scores ?? {};
  const measured = NAMES.filter((name) => known.some((call) => call.some((k) => k?.values[name] != null)));
  const scores: Record<string, Measure | string[][][] | undefined> = {};
  for (const name of measured) {
    const said = UNITS[name];
    const [unit, description] = typeof said === "string" ? ["share", said] : said;
    scores[name] = { unit, description, values: known.map((call) => call.map((k) => k?.values[name] ?? null)) };
  }
  const heads = known.map((call, index) => call.map((k, head) => found(app, index, head, k)));
  scores["roles"] = heads.map((call) => call.map((h) => (h === null ? [] : h.roles.map((r) => r.role))));
  return {
    // What was handed in was measured with all there is to measure with: it counts.
    scores: { ...scores, ...given } as Scores,
    heads,
    ...counts,
    striking: striking(app, heads, known),
    missing: counts.done > 0 && heads.some((call) => call.some((h) => h !== null)) ? null : missing,
  };
}

function found(app: App, call: number, head: number, known: Known | null): HeadFound | null {
  const given = rolesOf(app.options.scores, call, head);
  if (known === null && given.length === 0) return null;
  const measured = (known === null ? [] : rolesFor(known.values, known.chance)).map(
    ({ name, measure, lifted }): RoleFound => ({
      role: name,
      measure,
      score: known!.values[measure]!,
      chance: lifted ? (known!.chance[measure] ?? null) : null,
      pair: known!.pairs[measure] ?? null,
    }),
  );
  const more = given
    .filter((name) => !measured.some((r) => r.role === name))
    .map((role): RoleFound => {
      const measure = ROLES.find((r) => r.name === role)?.measure ?? MEASURES[role] ?? role;
      const values = (app.options.scores?.[measure] as Measure | undefined)?.values;
      return { role, measure, score: values?.[call]?.[head] ?? NaN, chance: null, pair: known?.pairs[measure] ?? null };
    });
  return { call, head, roles: [...measured, ...more].sort((a, b) => rankOf(a.role) - rankOf(b.role)) };
}

const MEASURES: Readonly<Record<string, string>> = {
  "same word in the other sentence": "same_word(across=True)",
  separators: "separators",
};

/** The most telling role with the highest score; where none is clear, the head that is least spread out. */
function striking(app: App, heads: Findings["heads"], known: (Known | null)[][]): Findings["striking"] {
  const { step } = app.state.peek();
  let best: { call: number; head: number; worth: number } | null = null;
  heads.forEach((call, index) => {
    if (app.trace.calls[index]!.step !== step) return;
    call.forEach((head, h) => {
      if (head === null) return;
      const [role] = head.roles;
      const values = known[index]![h]?.values;
      const worth =
        role === undefined
          ? 1 - (values?.normalised_entropy ?? 1) - (values?.first_token ?? 0)
          : 10 * (ALL.length - Math.min(rankOf(role.role), ALL.length - 1)) + (Number.isNaN(role.score) ? 0 : role.score);
      if (best === null || worth > best.worth) best = { call: index, head: h, worth };
    });
  });
  return best && { call: (best as { call: number }).call, head: (best as { head: number }).head };
}
