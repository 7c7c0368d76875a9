/** What heads are called, of what was measured here: the roles and bounds of `hookattn/analyze/tables/roles.py`. */
import type { Name } from "./measured";

export interface Role {
  name: string;
  measure: Name;
  /** From where on it is clear. */
  least: number;
  /** Whether it has to be twice the level of uniform attention. */
  lifted: boolean;
  /** Roles that say the same more closely. */
  unless: readonly string[];
}

const LIFT = 2;

function role(name: string, measure: Name, least: number, lifted = true, unless: readonly string[] = []): Role {
  return { name, measure, least, lifted, unless };
}

/** The most telling first. */
export const ROLES: readonly Role[] = [
  role("induction", "induction", 0.4),
  role("duplicate token", "duplicate_token", 0.4),
  role("previous token", "previous_token", 0.5),
  role("next token", "next_token", 0.5),
  role("itself", "self_token", 0.5),
  role("neighbours", "local_mass(window=2)", 0.6, true, ["previous token", "next token", "itself"]),
  role("first token", "first_token", 0.5),
  role("learned sink", "learned_sink", 0.5, false),
  role("uniform", "normalised_entropy", 0.9, false),
];

/** All names that heads may be called by, also those that need more than is measured here, in the order of Python's. */
export const ALL: readonly string[] = [
  "induction",
  "duplicate token",
  "same word in the other sentence",
  "previous token",
  "next token",
  "itself",
  "neighbours",
  "separators",
  "first token",
  "learned sink",
  "uniform",
];

/** The place of a role among all, the most telling first; one of somebody else's comes after them. */
export function rankOf(role: string): number {
  const place = ALL.indexOf(role);
  return place < 0 ? ALL.length : place;
}

type Values = Readonly<Partial<Record<Name, number | null>>>;

/** The roles of a head; `chance`: the same of uniform attention. */
export function rolesFor(values: Values, chance: Values): Role[] {
  const found = ROLES.filter(({ measure, least, lifted }) => {
    const score = values[measure] ?? NaN;
    const level = chance[measure] ?? null;
    return score >= least && !(lifted && level !== null && score < LIFT * level);
  });
  return found.filter((r) => !r.unless.some((name) => found.some((other) => other.name === name)));
}
