/** What is looked at: plain JSON, so that a link, a notebook or a program can restore it. */
import type { Call } from "./data/call";
import type { Trace } from "./data/trace";

/** `applied`: what met the values, where the model changed the weights after the softmax; else the weights. */
export type Field = "weights" | "applied" | "scores" | "mask";
export type Scale = "linear" | "log";
export type Pool = "max" | "sum";
export type Sink = "show" | "drop" | "renormalise";
export type Through = "rollout" | "flow";
/** What is drawn of several heads where one matrix is shown: the last that is chosen, or the mean or the largest of them. */
export type Over = "one" | "mean" | "max";
/** What the Model view draws of each head. */
export type Thumbs = "matrix" | "lines";
export type Filter = "all" | "AA" | "AB" | "BA" | "BB";
/** How the overview draws each head; `auto`: as there is room. */
export type Tiles = "auto" | "squares" | "matrix" | "lines";
/** Which of two traces the overview shows, or B − A. */
export type Side = "a" | "b" | "difference";

export interface State {
  /** Id of a view, as in views/index.ts. */
  view: string;
  step: number;
  batch: number;
  /** Stack, kind and layer of the call as in the trace; `nth` counts the calls that share them in one step. */
  stack: string;
  kind: string;
  layer: number | null;
  nth: number;
  /** The model's own numbers of the heads; the last one is in focus, where a view shows only one. */
  heads: number[];
  /** Index of a locked query or key among those stored; null: none is locked. */
  query: number | null;
  key: number | null;
  field: Field;
  scale: Scale;
  pool: Pool;
  /**
   * What becomes of the first key that is attended to: shown, left out, or left out with the rest made to sum to one
   * again.
   */
  sink: Sink;
  over: Over;
  filter: Filter;
  /** Model view: in the order of the layers, or by an analyzer's measure; and the smallest value shown. */
  sort: string;
  least: number | null;
  thumbs: Thumbs;
  /** Flow view: attention rollout, or the maximum flow. */
  through: Through;
  /** Overview: how heads are drawn, the role that alone is shown (empty: all), and which of two traces. */
  tiles: Tiles;
  role: string;
  side: Side;
  /** Matrix view: first key, first query, keys, queries. */
  zoom: [number, number, number, number] | null;
}

const FIRST: State = {
  view: "head",
  step: 0,
  batch: 0,
  stack: "",
  kind: "",
  layer: null,
  nth: 0,
  heads: [],
  query: null,
  key: null,
  field: "weights",
  scale: "linear",
  pool: "max",
  sink: "show",
  over: "one",
  filter: "all",
  sort: "layer",
  least: null,
  thumbs: "matrix",
  through: "rollout",
  tiles: "auto",
  role: "",
  side: "a",
  zoom: null,
};

/** Numbers up to which all heads are shown at first. */
const AT_ONCE = 2 ** 22;

const CHOICES: { [K in keyof State]?: readonly State[K][] } = {
  field: ["weights", "applied", "scores", "mask"],
  scale: ["linear", "log"],
  pool: ["max", "sum"],
  sink: ["show", "drop", "renormalise"],
  over: ["one", "mean", "max"],
  thumbs: ["matrix", "lines"],
  filter: ["all", "AA", "AB", "BA", "BB"],
  through: ["rollout", "flow"],
  tiles: ["auto", "squares", "matrix", "lines"],
  side: ["a", "b", "difference"],
};

/** The call that a state shows. The trace must have calls. */
export function callOf(trace: Trace, state: State): Call {
  return matches(trace, state)[state.nth] ?? trace.calls[0]!;
}

/** The calls of one stack, kind, layer and step: one, but where a layer runs several attentions. */
export function matches(trace: Trace, place: Pick<State, "step" | "stack" | "kind" | "layer">): Call[] {
  const { stack, kind, layer, step } = place;
  return trace.calls.filter(
    (c) => c.step === step && c.site.stack === stack && c.site.kind === kind && c.site.layer === layer,
  );
}

/** The part of a state that brings a call into view. */
export function placeOf(trace: Trace, call: Call): Pick<State, "step" | "stack" | "kind" | "layer" | "nth"> {
  const { stack, kind, layer } = call.site;
  const place = { step: call.step, stack, kind, layer };
  return { ...place, nth: matches(trace, place).indexOf(call) };
}

/** `wanted` over `before`, each part moved to the nearest that the trace has; `views` are the ids of the views. */
export function normalise(wanted: Partial<State>, before: State | null, trace: Trace, views: readonly string[]): State {
  const clean = Object.entries(wanted).filter(
    ([key, value]) => Object.hasOwn(FIRST, key) && value !== undefined && sound(key as keyof State, value),
  );
  const state: State = { ...(before ?? { ...FIRST, view: views[0] ?? "" }), ...Object.fromEntries(clean) };
  if (!views.includes(state.view)) state.view = views[0] ?? "";
  const calls = narrow(trace.calls, [
    (c) => c.site.stack === state.stack,
    (c) => c.site.kind === state.kind,
    (c) => c.step === state.step,
  ]);
  const call = nearest(calls, state.layer);
  if (call === undefined) return state;
  state.stack = call.site.stack;
  state.kind = call.site.kind;
  state.step = call.step;
  state.layer = call.site.layer;
  const same = matches(trace, state);
  state.nth = Math.min(Math.max(0, state.nth), same.length - 1);
  const shown = same[state.nth]!;
  const { B, T, S } = shown.extents;
  state.batch = clamp(state.batch, B);
  state.heads = [...new Set(state.heads)].filter((h) => shown.headNumbers.includes(h));
  const many = T * S * shown.headNumbers.length > AT_ONCE;
  if (state.heads.length === 0)
    state.heads = before === null && !many ? [...shown.headNumbers] : shown.headNumbers.slice(0, 1);
  if (state.query !== null) state.query = clamp(state.query, T);
  if (state.key !== null) state.key = clamp(state.key, S);
  return state;
}

function sound(key: keyof State, value: unknown): boolean {
  const choices = CHOICES[key] as readonly unknown[] | undefined;
  if (choices !== undefined) return choices.includes(value);
  const number = typeof value === "number" && Number.isFinite(value);
  switch (key) {
    case "view":
    case "stack":
    case "kind":
    case "sort":
    case "role":
      return typeof value === "string";
    case "heads":
      return Array.isArray(value) && value.every(Number.isInteger);
    case "zoom":
      return value === null || (Array.isArray(value) && value.length === 4 && value.every(Number.isFinite));
    case "step":
    case "batch":
    case "nth":
      return number && Number.isInteger(value);
    default:
      return value === null || (number && (key === "least" || Number.isInteger(value)));
  }
}

/** Each condition narrows what is left, unless nothing would be. */
function narrow(calls: Call[], conditions: ((call: Call) => boolean)[]): Call[] {
  for (const condition of conditions) {
    const kept = calls.filter(condition);
    if (kept.length > 0) calls = kept;
  }
  return calls;
}

function nearest(calls: Call[], layer: number | null): Call | undefined {
  const distance = (c: Call) => Math.abs((c.site.layer ?? -1) - (layer ?? -1));
  return calls.reduce<Call | undefined>(
    (best, c) => (best === undefined || distance(c) < distance(best) ? c : best),
    undefined,
  );
}

function clamp(x: number, length: number): number {
  return Math.min(Math.max(0, x), Math.max(0, length - 1));
}

/** A state as a link carries it. */
export function encode(state: State): string {
  return encodeURIComponent(JSON.stringify(state)).replace(/%(?:22|2C|3A|5B|5D|7B|7D)/g, decodeURIComponent);
}

/** What a link carries, or nothing where it carries something else. */
export function decode(hash: string): Partial<State> {
  try {
    const value: unknown = JSON.parse(decodeURIComponent(hash.replace(/^#/, "")));
    return typeof value === "object" && value !== null && !Array.isArray(value) ? value : {};
  } catch {
    return {};
  }
}
