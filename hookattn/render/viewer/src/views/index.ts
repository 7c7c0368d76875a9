/**
 * The views. A view is one file that exports a `View`; it is registered by a line in `VIEWS` below, and nowhere else.
 *
 * Its component gets the `App` and reads what it shows from `app.state.value` (a signal: reading it subscribes), the
 * call and the names of its rows and columns from `current(app)`, and numbers by `useLoaded`, from `app.trace.head(…)`:
 * one head at a time. It changes the selection by `app.set({…})` and the cursor that views share by
 * `app.cursor.value = {…}`. The shell around it does the rest: controls, certificate, notices, missing fields, keys, the
 * table, links and export. Export takes every <svg>, every <canvas> and every element of class `label` inside the view
 * as it is drawn, so a view has nothing to do for it.
 *
 * What to draw with: `ui/lines.tsx` (token columns, lines), `ui/axes.tsx` (token axes), `ui/legend.tsx`, `ui/tip.tsx`,
 * `colours.ts`.
 */
import { certificates } from "./certificates";
import { compare } from "./compare";
import { flow } from "./flow";
import { head } from "./head";
import { image } from "./image";
import { lens } from "./lens";
import { matrix } from "./matrix";
import { model } from "./model";
import { neuron } from "./neuron";
import { overview } from "./overview";
import type { View } from "./view";

export const VIEWS: readonly View[] = [overview, head, matrix, model, neuron, lens, flow, image, compare, certificates];
