import type { Source } from "./source/source";
import type { State } from "./state";

/** What analyzers measured: `values[call][head]`, both counted as they are stored; null where there is none. */
export interface Measure {
  unit: string;
  description: string;
  values: (number | null)[][];
}

/** Measures by name; under `roles`, what each head was found to do: `roles[call][head]` is a list of words. */
export interface Scores {
  readonly [measure: string]: Measure | string[][][] | undefined;
}

/** For patches: a picture for each batch entry, as a data URL. */
export interface Images {
  urls: string[];
  /** Rows and columns of the patches; by default a square. */
  grid?: [number, number];
  /** Tokens before the first patch, such as a class token; by default what the grid leaves. */
  prefix?: number;
}

export interface Options {
  state?: Partial<State>;
  theme?: "light" | "dark" | "auto";
  scores?: Scores;
  images?: Images;
  /** Called after each change of the selection. */
  onState?: (state: State) => void;
  /** A second trace, for the comparison. */
  compare?: Source;
  /** Keep the state in `location.hash`, and take it from there: a page of its own, not a cell of a notebook. */
  link?: boolean;
}

export function measures(scores: Scores | undefined): [string, Measure][] {
  return Object.entries(scores ?? {}).filter(
    (entry): entry is [string, Measure] => entry[0] !== "roles" && entry[1] !== undefined,
  );
}

export function rolesOf(scores: Scores | undefined, call: number, head: number): string[] {
  return (scores?.["roles"] as string[][][] | undefined)?.[call]?.[head] ?? [];
}
