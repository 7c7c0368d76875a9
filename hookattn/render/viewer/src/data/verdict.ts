/** Why a weight is what it is: masked, outscored, or drained by a sink. The words are those of hookattn/calls/verdicts.py. */
import { exact, percent, short } from "../format";
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

/** A piece of a sentence; of a number, with all of its digits. */
export interface Part {
  readonly text: string;
  readonly exact?: string;
}

export interface Told {
  /** Of which weight it is told: “query 4 “it” → key 2 “cat””. */
  readonly subject: string;
  /** In plain words, with that subject in it and numbers of three digits. */
  readonly sentence: string;
  /** The sentence in pieces, whose numbers have their digits with them. */
  readonly parts: readonly Part[];
}

/**
 * Why one weight is what it is. `query` is the name of the query, as “4 “it””, and `keys` names the keys, as “key 2 “cat””.
 */
export function verdict(row: Row, judged: Verdict, key: number, query: string, keys: (s: number) => string): Told {
  const parts = reasons(row, judged, key, `query ${query}`, keys);
  const [first, ...rest] = parts;
  const whole = [{ ...first!, text: first!.text.charAt(0).toUpperCase() + first!.text.slice(1) }, ...rest];
  return {
    subject: `query ${query} → ${keys(key)}`,
    sentence: whole.map((part) => part.text).join(""),
    parts: whole,
  };
}

/** The sentence alone. */
export function explain(row: Row, judged: Verdict, key: number, query: string, keys: (s: number) => string): string {
  return verdict(row, judged, key, query, keys).sentence;
}

function reasons(row: Row, judged: Verdict, key: number, query: string, keys: (s: number) => string): Part[] {
  const { n, fair, learned, first, words } = judged;
  const { rank, competitor, softmax } = standing(row, key);
  const [own, weight, it] = [row.scores[key]!, row.weights[key]!, keys(key)];
  const given = say`${query} gives ${it} a weight of ${weight}`;
  const share = say`an equal share, 1/${String(n)} = ${fair}`;
  const rival = competitor === null ? 0 : row.scores[competitor]!;
  const other = competitor === null ? "" : keys(competitor);
  if (n === 0 && words[key] !== "edited")
    return say`${query} may attend to nothing: all keys are masked. The weight of ${it} in the trace is ${weight}.`;
  switch (words[key]!) {
    case "edited":
      return [
        ...given,
        ...say`: an edit set it while the model ran. The score of ${own} `,
        ...(row.allowed[key]
          ? say`is rank ${String(rank)} of ${String(n)} and would make it ${softmax}.`
          : say`is masked.`),
      ];
    case "masked":
      return [
        ...say`${query} may not attend to ${it}: the mask hides it, so it weighs ${weight}. Its score of ${own} would `,
        ...say`be rank ${String(rank)} of ${String(n + 1)}, and would weigh ${softmax}.`,
      ];
    case "attended":
      if (competitor === null) return [...given, ...say`: it is the only key that may be attended to.`];
      return rank === 1
        ? [
            ...given,
            ...say`: its score of ${own} is the largest of ${String(n)}, ${own - rival} above ${other} (${rival}).`,
          ]
        : [
            ...given,
            ...say`, at least `,
            ...share,
            ...say`: its score of ${own} is rank ${String(rank)} of ${String(n)}, ${rival - own} below ${other} (${rival}).`,
          ];
    case "outscored":
      if (rank === 1)
        return [
          ...given,
          ...say`, less than `,
          ...share,
          ...say`, although its score of ${own} is the largest of ${String(n)}: the weight is rounded, or not the `,
          ...say`softmax of the scores alone.`,
        ];
      return [
        ...given,
        ...say`, less than `,
        ...share,
        ...say`: ${other} outscores it, ${rival} against ${own} (rank ${String(rank)} of ${String(n)}), and is `,
        ...say`${Math.exp(rival - own)} times as heavy.`,
      ];
    case "drained": {
      const takers = [
        first > 0 ? `${keys(row.first)}, the first key, takes ${percent(first)}` : "",
        learned > 0 ? `the learned sink takes ${percent(learned)}` : "",
      ].filter(Boolean);
      return [
        ...given,
        ...say`, drained by a sink: ${takers.join(" and ")}. Of what is left it has ${weight / (1 - learned - first)}, `,
        ...say`at least `,
        ...share,
        ...say`; its score of ${own} is rank ${String(rank)} of ${String(n)}.`,
      ];
    }
  }
}

/** The pieces of a sentence: numbers are shortened, and keep their digits. */
function say(words: TemplateStringsArray, ...values: (string | number)[]): Part[] {
  const parts: Part[] = [];
  words.forEach((text, i) => {
    if (text !== "") parts.push({ text });
    const value = values[i];
    if (typeof value === "number") parts.push({ text: short(value), exact: exact(value) });
    else if (value !== undefined) parts.push({ text: value });
  });
  return parts;
}
