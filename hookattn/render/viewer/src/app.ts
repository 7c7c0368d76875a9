/** What every part of the page shares: the trace, the state, the cursor. */
import { signal, type ReadonlySignal, type Signal } from "@preact/signals";
import type { Call } from "./data/call";
import { type Axes, axesOf } from "./data/labels";
import { Trace } from "./data/trace";
import { nothing } from "./find";
import type { Findings } from "./findings";
import type { Options } from "./options";
import type { Source } from "./source/source";
import { callOf, normalise, type State } from "./state";
import type { View } from "./views/view";

/** The cell or row that the pointer is at; indices among what is stored. */
export interface Cursor {
  query: number | null;
  key: number | null;
}

export interface App {
  readonly trace: Trace;
  /** The second trace of a comparison, or null. */
  readonly other: Trace | null;
  readonly options: Options;
  readonly state: ReadonlySignal<State>;
  readonly dark: ReadonlySignal<boolean>;
  readonly cursor: Signal<Cursor>;
  /** What is found of the heads so far; `find.ts` fills it. */
  readonly findings: Signal<Findings>;
  /** The same of the second trace, measured when it is shown alone; places are its own. */
  readonly otherFindings: Signal<Findings>;
  /** Whether the reader has chosen what is looked at; until then it follows what is found. */
  readonly chosen: Signal<boolean>;
  /** Whether it has followed what is found. */
  readonly led: Signal<boolean>;
  /** Views that are reading all heads of many layers: measuring waits, and finds them read. */
  readonly reading: Signal<number>;
  /** Whether the steps are being played, one after the other. */
  readonly playing: Signal<boolean>;
  set(patch: Partial<State>): void;
  /** As `set`, by the page itself: the selection goes on following. */
  lead(patch: Partial<State>): void;
}

/** The parts of a state that say what is looked at. */
const LOOKED_AT = ["step", "batch", "stack", "kind", "layer", "nth", "heads", "query", "key"] as const;

export async function open(
  source: Source,
  options: Options,
  dark: ReadonlySignal<boolean>,
  views: readonly View[],
): Promise<App> {
  const [trace, other] = await Promise.all([Trace.open(source), options.compare ? Trace.open(options.compare) : null]);
  const cursor = signal<Cursor>({ query: null, key: null });
  let ids = views.map((view) => view.id);
  const state = signal(normalise(options.state ?? {}, null, trace, ids));
  const change = (patch: Partial<State>, own: boolean) => {
    const before = state.peek();
    const next = normalise(patch, before, trace, ids);
    if (JSON.stringify(next) === JSON.stringify(before)) return;
    if (!own && LOOKED_AT.some((part) => String(next[part]) !== String(before[part]))) app.chosen.value = true;
    // What the pointer was at may not be there in another view or another call.
    if ((["view", "step", "stack", "kind", "nth"] as const).some((part) => next[part] !== before[part]))
      cursor.value = { query: null, key: null };
    state.value = next;
    options.onState?.(next);
  };
  const app: App = {
    trace,
    other,
    options,
    state,
    dark,
    cursor,
    findings: signal(nothing({ trace, options })),
    otherFindings: signal(nothing({ trace: other ?? trace, options: {} })),
    chosen: signal(LOOKED_AT.some((part) => options.state?.[part] !== undefined)),
    led: signal(false),
    reading: signal(0),
    playing: signal(false),
    set: (patch) => change(patch, false),
    lead: (patch) => change(patch, true),
  };
  // A view that has nothing to show for this trace has no tab, and no link leads to it.
  ids = views.filter((view) => !view.absent?.(app)).map((view) => view.id);
  // Who hands in a picture wants to see it.
  const asked = options.state?.view !== undefined || options.images === undefined || ids.includes("overview");
  state.value = normalise(!asked && ids.includes("image") ? { view: "image" } : {}, state.peek(), trace, ids);
  return app;
}

/** The call in view, and the names of its rows and columns. Reads the state: a component that asks follows it. */
export function current(app: App): { call: Call; axes: Axes } {
  const state = app.state.value;
  const call = callOf(app.trace, state);
  return { call, axes: axesOf(app.trace, call, state.batch, state.heads) };
}

/** The place among the stored heads of a head that is named by its number in the model. */
export function stored(call: Call, head: number): number {
  return Math.max(0, call.headNumbers.indexOf(head));
}

/** The head that a view of one head shows. */
export function focus(state: State): number {
  return state.heads.at(-1) ?? 0;
}
