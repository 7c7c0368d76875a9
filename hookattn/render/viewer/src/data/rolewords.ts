/** What a role is called in its colour and in a sentence about one pair of tokens. */
import type { HeadFound, RoleFound } from "../findings";
import type { Axes, Axis } from "./labels";
import { ALL } from "./roles";

/** The hue of a role, as style.css has it; a role of somebody else's has that of all others. */
export function hue(role: string): string {
  const place = ALL.indexOf(role);
  return `var(--r${place < 0 ? ALL.length - 1 : place})`;
}

export function inOrder(roles: Iterable<string>): string[] {
  const place = (role: string) => (ALL.indexOf(role) + ALL.length + 1) % (ALL.length + 1);
  return [...roles].sort((a, b) => place(a) - place(b) || (a < b ? -1 : 1));
}

/** The role that a head is drawn by: the one that is asked for, or its most telling; null: it has none of it. */
export function roleOf(found: HeadFound | null, asked: string): RoleFound | null {
  return found?.roles.find((r) => asked === "" || r.role === asked) ?? null;
}

/** “the 2nd ‘43’”: which of the like tokens it is, where there are several; a position where there are no tokens. */
export function nth(axis: Axis, i: number): string {
  const label = axis.labels[i];
  if (label === undefined || !axis.named) return `position ${axis.positions[i] ?? i}`;
  const like = axis.labels.map((l, at) => ({ l, at })).filter(({ l }) => l.raw === label.raw);
  const place = like.findIndex(({ at }) => at === i) + 1;
  return like.length < 2 ? `“${label.text}”` : `the ${ordinal(place)} “${label.text}”`;
}

function ordinal(n: number): string {
  const end = n % 100 > 10 && n % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][n % 10] ?? "th");
  return `${n}${end}`;
}

/** What a head does at one pair of a query and a key, by its role where the tokens bear it out. */
export function pairSentence(role: string | null, axes: Axes, query: number, key: number): string {
  const { queries, keys } = axes;
  const [from, to] = [nth(queries, query), nth(keys, key)];
  const [q, k] = [queries.positions[query]!, keys.positions[key]!];
  const raw = (i: number) => (keys.named ? keys.labels[i]?.raw : undefined);
  const own = queries.named ? queries.labels[query]?.raw : undefined;
  const plain = `from ${from} it looks at ${to}`;
  if (role === "induction" && key > 0 && own !== undefined && raw(key - 1) === own && k <= q)
    return `from ${from} it looks at what followed ${nth(keys, key - 1)}, “${keys.labels[key]!.text}”`;
  if ((role === "duplicate token" || role === "same word in the other sentence") && own !== undefined && raw(key) === own)
    return `from ${from} it looks back at the same token, ${to}`;
  if (q - k === 1) return `from ${from} it looks at the token before, ${to}`;
  if (k - q === 1) return `from ${from} it looks at the token after, ${to}`;
  if (q === k && own === raw(key)) return `${from} looks at itself`;
  if (role === "first token" && key === 0) return `from ${from} it looks at the first token, ${to}`;
  return plain;
}
