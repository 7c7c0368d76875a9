/** What the keys do, everywhere but in a field that takes text; arrows in a slider stay the slider's. */
import { type App, current, focus } from "../app";
import { zoomed } from "../data/frame";
import { fieldOf } from "../data/kinds";
import type { State } from "../state";
import { steps, toStep } from "../steps";
import { layers } from "./controls";
import { play } from "./player";

interface Key {
  keys: readonly string[];
  does: string;
  press(app: App, key: string, views: readonly string[]): Partial<State> | void;
}

function step<T>(values: readonly T[], value: T, by: number): T {
  return values[Math.min(values.length - 1, Math.max(0, values.indexOf(value) + by))] ?? value;
}

/** The locked row or column moves by one; the first press locks the first. */
function move(at: number | null, by: number, length: number): number {
  return at === null ? (by > 0 ? 0 : length - 1) : Math.min(length - 1, Math.max(0, at + by));
}

export const KEYS: readonly Key[] = [
  {
    keys: ["ArrowUp", "ArrowDown"],
    does: "lock the query before or after",
    press: (app, key) => ({
      query: move(app.state.value.query, key === "ArrowDown" ? 1 : -1, current(app).call.extents.T),
    }),
  },
  {
    keys: ["ArrowLeft", "ArrowRight"],
    does: "lock the key before or after",
    press: (app, key) => ({
      key: move(app.state.value.key, key === "ArrowRight" ? 1 : -1, current(app).call.extents.S),
    }),
  },
  {
    keys: ["Escape"],
    does: "unlock, and show the whole matrix",
    press: () => ({ query: null, key: null, zoom: null }),
  },
  {
    keys: ["[", "]"],
    does: "layer before or after",
    press: (app, key) => ({
      layer: step(layers(app, app.state.value), app.state.value.layer, key === "]" ? 1 : -1),
      nth: 0,
    }),
  },
  {
    keys: [",", "."],
    does: "head before or after, alone",
    press: (app, key) => ({
      heads: [step(current(app).call.headNumbers, focus(app.state.value), key === "." ? 1 : -1)],
    }),
  },
  {
    keys: ["+", "-"],
    does: "closer, further away (matrix)",
    press: (app, key) => {
      const { S, T } = current(app).call.extents;
      return { zoom: zoomed(app.state.value.zoom, S, T, key === "+" ? 2 : 0.5) };
    },
  },
  { keys: ["a"], does: "all heads", press: (app) => ({ heads: [...current(app).call.headNumbers] }) },
  {
    keys: [";", "'"],
    does: "step before or after",
    press: (app, key) => toStep(app, step(steps(app), app.state.value.step, key === "'" ? 1 : -1)),
  },
  { keys: ["p"], does: "play the steps, stop", press: (app) => (play(app), {}) },
  {
    keys: ["f"],
    does: "field: weights, what was applied where that is another, scores, mask",
    press: (app) => {
      const { call } = current(app);
      const there = (["weights", "applied", "scores", "mask"] as const).filter((f) => fieldOf(call, f) === f);
      return { field: cycle(there, fieldOf(call, app.state.value.field)) };
    },
  },
  {
    keys: ["l"],
    does: "scale: linear, log",
    press: (app) => ({ scale: cycle(["linear", "log"], app.state.value.scale) }),
  },
  {
    keys: ["m"],
    does: "heads: one, the mean, the largest of them",
    press: (app) => ({ over: cycle(["one", "mean", "max"], app.state.value.over) }),
  },
  {
    keys: ["s"],
    does: "first key: shown, dropped, renormalised",
    press: (app) => ({ sink: cycle(["show", "drop", "renormalise"], app.state.value.sink) }),
  },
  {
    keys: ["1", "2", "3", "4", "5", "6", "7", "8", "9"],
    does: "view",
    press: (_, key, views) => {
      const view = views[Number(key) - 1];
      return view === undefined ? undefined : { view };
    },
  },
];

function cycle<T>(values: readonly T[], value: T): T {
  return values[(values.indexOf(value) + 1) % values.length]!;
}

/** Act on a key; false if it has no meaning here. */
export function press(app: App, event: KeyboardEvent, views: readonly string[]): boolean {
  if (event.ctrlKey || event.metaKey || event.altKey) return false;
  const target = event.composedPath()[0];
  if (target instanceof HTMLSelectElement) return false;
  if (target instanceof HTMLInputElement && (target.type !== "range" || event.key.startsWith("Arrow"))) return false;
  const found = KEYS.find((k) => k.keys.includes(event.key));
  const patch = found?.press(app, event.key, views);
  if (patch === undefined) return false;
  app.set(patch as Partial<State>);
  return true;
}

const NAMES: Readonly<Record<string, string>> = {
  ArrowUp: "↑",
  ArrowDown: "↓",
  ArrowLeft: "←",
  ArrowRight: "→",
  Escape: "Esc",
};

export function keyName(key: string): string {
  return NAMES[key] ?? key;
}
