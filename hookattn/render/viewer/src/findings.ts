/**
 * What is found of the heads of a trace, as the views read it: `App.findings` is a signal of it, which is set anew as
 * heads are measured. Nothing here computes; what does is started when the trace is open.
 */
import type { Scores } from "./options";

/** A role that a head has, and why. */
export interface RoleFound {
  /** As `hookattn.analyze.ROLES` calls it: “induction”, “previous token”, … */
  role: string;
  /** The measure that is the evidence, its value, and what uniform attention would have of it (null: says nothing). */
  measure: string;
  score: number;
  chance: number | null;
  /** The pair that shows it best, indices among what is stored; null: no pair of a query and a key shows it. */
  pair: { batch: number; query: number; key: number; weight: number } | null;
}

/** One head, measured. */
export interface HeadFound {
  /** Index of the call in the trace, and the head's place among those stored. */
  call: number;
  head: number;
  /** The most telling first; empty: none is clear. */
  roles: readonly RoleFound[];
}

export interface Findings {
  /** What was handed in with the trace, and what was measured here; values are null where nothing is measured yet. */
  scores: Scores;
  /** By call and stored head; null: not measured yet. */
  heads: readonly (readonly (HeadFound | null)[])[];
  /** Heads measured so far, all that are measured unasked, and how many more are when their layer is looked at. */
  done: number;
  total: number;
  later: number;
  /** The head to look at first: the most striking; null: none so far. */
  striking: { call: number; head: number } | null;
  /** Why nothing can be measured, with the `capture=` that would help; null: something is, or was. */
  missing: string | null;
}
