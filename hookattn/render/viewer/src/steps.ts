/** The steps of a trace: the forwards that it recorded, such as the prompt of a generation and each token after it. */
import type { App } from "./app";
import type { Call } from "./data/call";
import { axesOf } from "./data/labels";
import { callOf, matches, type State } from "./state";

export function steps(app: App): number[] {
  return [...new Set(app.trace.calls.map((c) => c.step))].sort((a, b) => a - b);
}

/** The selection in another step: the locked key and query stay with their positions, where the step has them. */
export function toStep(app: App, step: number): Partial<State> {
  const state = app.state.peek();
  const next = matches(app.trace, { ...state, step })[state.nth];
  const patch: Partial<State> = { step, query: null, key: null, zoom: null };
  if (next === undefined) return patch;
  const [from, to] = [callOf(app.trace, state), next].map((call) => axesOf(app.trace, call, state.batch));
  for (const [name, side] of [
    ["query", "queries"],
    ["key", "keys"],
  ] as const) {
    const locked = state[name];
    const at = locked === null ? -1 : to![side].positions.indexOf(from![side].positions[locked]!);
    if (at >= 0) patch[name] = at;
  }
  return patch;
}

/** A step in a few words: its number, and the token that is its query, or how many there are. */
export function stepName(app: App, step: number): string {
  const state = app.state.value;
  const call: Call | undefined = matches(app.trace, { ...state, step })[0] ?? app.trace.calls.find((c) => c.step === step);
  if (call === undefined) return String(step);
  const { queries } = axesOf(app.trace, call, state.batch);
  const T = queries.labels.length;
  if (T > 1) return `${step}: ${T} queries`;
  return queries.named ? `${step}: “${queries.labels[0]!.text}”` : `${step}: position ${queries.positions[0]}`;
}
