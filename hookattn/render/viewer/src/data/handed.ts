/** What was measured of the heads before the page was made, as findings. */
import type { Findings, HeadFound } from "../findings";
import { measures, rolesOf, type Scores } from "../options";
import type { Trace } from "./trace";

/** The measure that is the evidence of a role, as hookattn/analyze/tables/roles.py has it. */
const EVIDENCE: Readonly<Record<string, string>> = {
  induction: "induction",
  "duplicate token": "duplicate_token",
  "previous token": "previous_token",
  "next token": "next_token",
  itself: "self_token",
  "first token": "first_token",
  separators: "separators",
};

export function handedFindings(trace: Trace, scores: Scores | undefined): Findings {
  const known = new Map(measures(scores));
  const heads = trace.calls.map((call) =>
    call.headNumbers.map((_, head): HeadFound => {
      const roles = rolesOf(scores, call.index, head).map((role) => {
        const measure = EVIDENCE[role] ?? role;
        const score = known.get(measure)?.values[call.index]?.[head] ?? 1;
        return { role, measure, score, chance: null, pair: null };
      });
      return { call: call.index, head, roles };
    }),
  );
  const all = heads.flat().filter((h) => h.roles.length > 0);
  const order = Object.keys(EVIDENCE);
  const rank = (h: HeadFound) => (order.indexOf(h.roles[0]!.role) + 99) % 99;
  const best = all.sort((a, b) => rank(a) - rank(b) || b.roles[0]!.score - a.roles[0]!.score)[0];
  const total = heads.reduce((n, h) => n + h.length, 0);
  return {
    scores: scores ?? {},
    heads: scores === undefined ? heads.map((h) => h.map(() => null)) : heads,
    done: scores === undefined ? 0 : total,
    total,
    striking: best === undefined ? null : { call: best.call, head: best.head },
    missing: null,
  };
}
