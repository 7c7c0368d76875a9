/** Why a weight is what it is: masked, outscored, or drained by a sink. The words are those of figures/lens_figure.py. */
import { number, percent } from "../format";
import type { Row } from "./row";

/**
 * masked: the mask hides the key. attended: it weighs at least an equal share, 1/n for n keys that may be attended to.
 * drained: it weighs less, but would weigh that without what goes to the first key and to a learned sink. outscored: it
 * would not either. edited: an edit has set its weight, whatever its score is.
 */
export type Word = "attended" | "outscored" | "drained" | "masked" | "edited";

/** A float32 of 1/n may be less than 1/n. */
const ROUNDING = 1e-6;

export interface Verdict {
  /** One for each of the S keys. */
  words: Word[];
  /** How many keys may be attended to; 1/n is an equal share. */
  n: number;
  fair: number;
  /** What goes to the learned sink, and to the first key where that is a sink: weighs an equal share or more. */
  learned: number;
  first: number;
}

export function judge(row: Row): Verdict {
  const { weights, allowed, edited } = row;
  let n = 0;
  let sum = 0;
  for (let s = 0; s < allowed.length; s++) {
    if (!allowed[s]) continue;
    n++;
    sum += weights[s]!;
  }
  const fair = 1 / n;
  const least = fair * (1 - ROUNDING);
  const learned = row.sink === null || n === 0 ? 0 : Math.max(0, 1 - sum);
  const first = n > 1 && weights[row.first]! >= least ? weights[row.first]! : 0;
  const rest = 1 - learned - first;
  const words = Array.from(allowed, (may, s): Word => {
    if (edited?.(s)) return "edited";
    if (!may) return "masked";
    if (weights[s]! >= least) return "attended";
    return rest > 0 && weights[s]! / rest >= least ? "drained" : "outscored";
  });
  return { words, n, fair, learned, first };
}

export interface Standing {
  /** From 1, among the keys that may be attended to; of a masked one, what it would be. */
  rank: number;
  /** The highest-scoring of the other keys that may be attended to, or null. */
  competitor: number | null;
  /** exp(score − the logarithm of the denominator); of a masked one what it would weigh were it not. */
  softmax: number;
}

export function standing({ scores, allowed, lse }: Row, key: number): Standing {
  const own = scores[key]!;
  let rank = 1;
  let competitor: number | null = null;
  for (let s = 0; s < allowed.length; s++) {
    if (!allowed[s] || s === key) continue;
    if (scores[s]! > own) rank++;
    if (competitor === null || scores[s]! > scores[competitor]!) competitor = s;
  }
  const softmax = allowed[key] ? Math.exp(own - lse) : 1 / (1 + Math.exp(lse - own));
  return { rank, competitor, softmax };
}

/** The verdict on one key in plain words; `query` and `keys` are their names. */
export function explain(row: Row, verdict: Verdict, key: number, query: string, keys: (s: number) => string): string {
  const { n, fair, learned, first, words } = verdict;
  const { rank, competitor, softmax } = standing(row, key);
  const own = row.scores[key]!;
  const weight = number(row.weights[key]!);
  const share = `an equal share, 1/${n} = ${number(fair)}`;
  const apart = competitor === null ? 0 : Math.abs(own - row.scores[competitor]!);
  const rival = competitor === null ? "" : `${keys(competitor)} (${number(row.scores[competitor]!)})`;
  if (n === 0 && words[key] !== "edited") return `Masked: query ${query} may attend to nothing. The weight in the trace is ${weight}.`;
  switch (words[key]!) {
    case "edited":
      return (
        `Edited: the weight was set to ${weight} while the model ran. Its score of ${number(own)} ` +
        `${row.allowed[key] ? `is rank ${rank} of ${n} and would make it ${number(softmax)}` : "is masked"}.`
      );
    case "masked":
      return (
        `Masked: query ${query} may not attend to ${keys(key)}, so it weighs ${weight}. ` +
        `Its score of ${number(own)} would be rank ${rank} of ${n + 1}, and would weigh ${number(softmax)}.`
      );
    case "attended":
      if (competitor === null) return `Attended to: ${keys(key)} is the only key that may be. It weighs ${weight}.`;
      return rank === 1
        ? `Attended to: its score of ${number(own)} is the largest of ${n}, ${number(apart)} above ${rival}. ` +
            `It weighs ${weight}.`
        : `Attended to: its score of ${number(own)} is rank ${rank} of ${n}, ${number(apart)} below ${rival}; ` +
            `it weighs ${weight}, at least ${share}.`;
    case "outscored":
      if (rank === 1)
        return (
          `It weighs ${weight}, less than ${share}, although its score of ${number(own)} is the largest of ${n}: ` +
          "the weight is rounded, or not the softmax of the scores alone."
        );
      return (
        `Outscored by ${rival}: its score of ${number(own)}, rank ${rank} of ${n}, is ${number(apart)} below that, ` +
        `which makes it ${number(Math.exp(apart))} times lighter. It weighs ${weight}, less than ${share}.`
      );
    case "drained": {
      const takers = [
        first > 0 ? `${keys(row.first)}, the first key, takes ${percent(first)}` : "",
        learned > 0 ? `the learned sink takes ${percent(learned)}` : "",
      ].filter(Boolean);
      return (
        `Drained by a sink: ${takers.join(" and ")}. Its score of ${number(own)} is rank ${rank} of ${n}; it weighs ` +
        `${weight}, and of what is left ${number(row.weights[key]! / (1 - learned - first))}, at least ${share}.`
      );
    }
  }
}
