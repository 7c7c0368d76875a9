/**
 * The views. A view is one file that exports a `View`; it is registered by a line in `VIEWS` below, and nowhere else.
 *
 * Its component gets the `App` and reads what it shows from `app.state.value` (a signal: reading it subscribes), the
 * call and
 * the names of its rows and columns from `current(app)`, and numbers by `useLoaded`, from `app.trace.head(…)`: one
 * head at a
 * time. It changes the selection by `app.set({…})` and the cursor that views share by `app.cursor.value = {…}`. The
 * shell around
 * it does the rest: controls, certificate, notices, missing fields, keys, the table, links and export. Export takes
 * every <svg>,
 * every <canvas> and every element of class `label` inside the view as it is drawn, so a view has nothing to do for it.
 *
 * What to draw with: `ui/lines.tsx` (token columns, lines), `ui/axes.tsx` (token axes), `ui/legend.tsx`, `ui/tip.tsx`,
 * `colours.ts`.
 */
import type { ComponentType } from "preact";
import type { App } from "../app";
import type { State } from "../state";
import { certificates } from "./certificates";
import { compare } from "./compare";
import { flow } from "./flow";
import { head } from "./head";
import { image } from "./image";
import { lens } from "./lens";
import { matrix } from "./matrix";
import { model } from "./model";
import { neuron } from "./neuron";

export type ControlName = "layer" | "heads" | "field" | "scale" | "pool" | "sink" | "filter" | "sort";

export interface View {
  /** As in `State.view`. */
  id: string;
  /** On its tab. */
  label: string;
  /** One sentence: what it shows and how it is used. */
  help: string;
  /** The fields of the call that it cannot do without; without them the shell says which `capture=` keeps them. */
  fields(state: State): readonly string[];
  /** Which controls, beside those for stack, step and batch, have a meaning here. */
  controls: readonly ControlName[];
  /** Whether it has a table of its own, in place of that of the head in focus. */
  ownTable?: boolean;
  /** Why it has nothing to show for this trace at all (no images, no second trace), or null. It then has no tab. */
  absent?(app: App): string | null;
  component: ComponentType<{ app: App }>;
}

export const VIEWS: readonly View[] = [head, matrix, model, neuron, lens, flow, image, compare, certificates];
