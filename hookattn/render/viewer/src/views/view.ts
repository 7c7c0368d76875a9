/** What a view is, and the controls that it can ask for. */
import type { ComponentType } from "preact";
import type { App } from "../app";
import type { Call } from "../data/call";
import type { State } from "../state";

export type ControlName = "layer" | "heads" | "field" | "weights" | "over" | "scale" | "pool" | "sink" | "filter" | "sort" | "thumbs";

export interface View {
  /** As in `State.view`. */
  id: string;
  /** On its tab. */
  label: string;
  /** One sentence: what it shows and how it is used. */
  help: string;
  /** The fields of the call that it cannot do without; without them the shell says which `capture=` keeps them. */
  fields(state: State): readonly string[];
  /** Which controls, beside those for stack, step and batch, have a meaning here; some are in the Display menu. */
  controls: readonly ControlName[];
  /** What a picture of it is of: the head in focus (by default, where heads are chosen), all that are chosen, or no head. */
  shows?: "head" | "heads" | "trace";
  /** Whether it has a table of its own, in place of that of the head in focus. */
  ownTable?: boolean;
  /** Why it has nothing to show for a call of this kind, or null. */
  unfit?(call: Call): string | null;
  /** Why it has nothing to show for this trace at all (no images, no second trace), or null. It then has no tab. */
  absent?(app: App): string | null;
  component: ComponentType<{ app: App }>;
}
