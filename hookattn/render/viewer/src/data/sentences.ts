/** What was found, in words: of the trace in a line, of a head in a sentence, of a pair of a query and a key. */
import type { Findings, HeadFound, RoleFound } from "../findings";
import type { Call } from "./call";
import { edited } from "./edits";
import { guessed } from "./kinds";
import { axesOf, type Axes, type Axis } from "./labels";
import { ALL, rankOf } from "./roles";
import type { Trace } from "./trace";

/** `good`: what was verified; `doubt`: what a reader must know before trusting a picture; `wrong`: what is not so. */
export type Tone = "plain" | "good" | "doubt" | "wrong";

export interface Said {
  tone: Tone;
  text: string;
}

/** Roles that heads have on something; those of others stand before “head”. */
const ON: Readonly<Record<string, string>> = {
  "same word in the other sentence": "the same word in the other sentence",
  itself: "the token itself",
  neighbours: "the neighbours",
  separators: "separators",
  "learned sink": "a learned sink",
};

/** “3 previous-token heads”. */
function headsOf(role: string, n: number): string {
  const heads = n === 1 ? "head" : "heads";
  const on = ON[role];
  const words = on !== undefined ? `${heads} on ${on}` : `${role.replace(" ", "-")} ${heads}`;
  return `${grouped(n)} ${ALL.includes(role) ? words : `${heads} of the role ${role}`}`;
}

/** Skipped sites, unfaithful and guessed calls that are named one by one; of more only the number is said. */
const NAMED = 2;

type Told = Pick<Trace, "calls" | "document">;

/**
 * The trace in a line: its extents, what its heads do, and whether that is what the model did. Heads are those of one
 * step; certificates are of all calls. Join the texts by a space.
 */
export function headline(trace: Told, findings: Findings, step: number): Said[] {
  const calls = trace.calls.filter((c) => c.step === step);
  return [
    { tone: "plain", text: `${extentsOf(trace, calls, step)}.` },
    ...rolesIn(trace, calls, findings),
    ...trustIn(trace),
  ];
}

function extentsOf(trace: Told, calls: readonly Call[], step: number): string {
  const groups = new Map<string, Call[]>();
  for (const call of calls) {
    const name = groupOf(call);
    groups.set(name, [...(groups.get(name) ?? []), call]);
  }
  const parts = [...groups].map(([name, of]) => (groups.size > 1 ? `${name}: ` : "") + sizes(of));
  const entries = Math.max(1, ...calls.map((c) => c.extents.B));
  if (entries > 1) parts.push(`a batch of ${entries}`);
  const steps = new Set(trace.calls.map((c) => c.step));
  if (steps.size > 1) parts.push(`step ${step} of ${steps.size}, counted from 0`);
  return parts.join(groups.size > 1 ? "; " : ", ");
}

function groupOf({ site }: Call): string {
  return site.kind === "self" ? site.stack : `${site.stack} ${site.kind}`;
}

function sizes(calls: readonly Call[]): string {
  const layers = new Set(calls.map((c) => c.site.layer ?? c.site.path)).size;
  const axes = new Set(calls.map((c) => c.site.axes));
  const unit = axes.size === 1 ? [...axes][0]! : "positions";
  const across = calls.some((c) => c.site.kind.startsWith("cross"));
  const keys = range(calls.map((c) => c.extents.S));
  const queries = range(calls.map((c) => c.extents.T));
  const whole = !across && calls.every((c) => c.extents.T === c.extents.S);
  const one = unit.replace(/s$/, "");
  const length = whole
    ? `${keys} ${keys === "1" ? one : unit}`
    : `${queries} ${queries === "1" ? "query" : "queries"} on ${keys} ${keys === "1" ? "key" : "keys"}`;
  const heads = range(calls.map((c) => c.headNumbers.length));
  return `${counted(layers, "layer")} × ${heads} ${heads === "1" ? "head" : "heads"}, ${length}`;
}

function range(numbers: readonly number[]): string {
  const low = numbers.reduce((a, b) => Math.min(a, b), Infinity);
  const high = numbers.reduce((a, b) => Math.max(a, b), 0);
  return low === high ? grouped(low) : `${grouped(low)} to ${grouped(high)}`;
}

function grouped(n: number): string {
  return n.toLocaleString("en");
}

function counted(n: number, one: string): string {
  return `${grouped(n)} ${one}${n === 1 ? "" : "s"}`;
}

/** What the heads of some calls do, each counted at its most telling role. */
function rolesIn(trace: Told, calls: readonly Call[], findings: Findings): Said[] {
  if (findings.missing !== null) return [{ tone: "doubt", text: `What heads do is not known: ${findings.missing}` }];
  const heads = calls.flatMap((call) => findings.heads[call.index] ?? []);
  const measured = heads.filter((h): h is HeadFound => h !== null);
  const by = new Map<string, { head: HeadFound; role: RoleFound }[]>();
  for (const head of measured) {
    const [role] = head.roles;
    if (role !== undefined) by.set(role.role, [...(by.get(role.role) ?? []), { head, role }]);
  }
  const parts = [...by]
    .sort(([a], [b]) => rankOf(a) - rankOf(b))
    .map(([role, found], nth) => {
      const text = headsOf(role, found.length);
      if (nth > 0) return text;
      const best = found.reduce((a, b) => (b.role.score > a.role.score || Number.isNaN(a.role.score) ? b : a));
      const which = found.length > 1 ? "strongest " : "";
      const score = Number.isNaN(best.role.score) ? "" : `, ${two(best.role.score)}`;
      return `${text} (${which}${headName(trace, trace.calls[best.head.call]!, best.head.head)}${score})`;
    });
  const waiting = heads.length - measured.length;
  const said: Said[] = [];
  if (parts.length > 0) said.push({ tone: "plain", text: `${parts.join(", ")}.` });
  else if (waiting === 0 && heads.length > 0) said.push({ tone: "plain", text: "No head has a clear role." });
  if (waiting > 0) {
    const all = grouped(heads.length);
    said.push({ tone: "plain", text: `${grouped(measured.length)} of ${all} heads measured so far.` });
  }
  return said;
}

/** Whether the calls are what the model did, and what is not in the trace. */
function trustIn({ calls, document }: Told): Said[] {
  const status = (call: Call) => call.certificate?.status ?? "unverified";
  const bad = calls.filter((c) => status(c) === "unfaithful");
  const open = calls.filter((c) => status(c) === "unverified");
  const all = calls.length === 1 ? "the call" : `all ${grouped(calls.length)} calls`;
  const said: Said[] = [];
  if (bad.length === 0 && open.length === 0) said.push({ tone: "good", text: `✓ ${all} faithful.` });
  if (bad.length > 0) {
    const text = `✗ ${grouped(bad.length)} of ${counted(calls.length, "call")} unfaithful: ${listed(bad.map(placeOf))}.`;
    said.push({ tone: "wrong", text });
  }
  if (open.length > 0) {
    const which = open.length === calls.length ? all : `${grouped(open.length)} of ${counted(calls.length, "call")}`;
    said.push({ tone: "doubt", text: `? ${which} unverified.` });
  }
  const unsure = calls.filter((c) => guessed(c).length > 0);
  if (unsure.length > 0) {
    const letters = [...new Set(unsure.flatMap(guessed))].join(", ");
    const which = unsure.length === calls.length ? all : `${grouped(unsure.length)} of ${counted(calls.length, "call")}`;
    said.push({ tone: "doubt", text: `? Which axis is which (${letters}) was guessed in ${which}.` });
  }
  const changed = calls.filter((c) => edited(c) !== "");
  if (changed.length > 0) said.push({ tone: "doubt", text: `✎ ${counted(changed.length, "call")} edited.` });
  if (document.skipped.length > 0) {
    const names = document.skipped.map(({ path, reason }) => `${path || "the model itself"} (${reason})`);
    said.push({ tone: "doubt", text: `${counted(names.length, "site")} skipped: ${listed(names)}.` });
  }
  return said;
}

function listed(names: readonly string[]): string {
  const more = names.length - NAMED;
  return names.slice(0, NAMED).join("; ") + (more > 0 ? `; and ${grouped(more)} more` : "");
}

function placeOf({ site, step }: Call): string {
  return `${site.path || "the model itself"}${step > 0 ? `, step ${step}` : ""}`;
}

/** “L1H2”, with its stack and kind where the trace has several, with its path where a layer has several or no number. */
export function headName(trace: Pick<Trace, "calls">, call: Call, head: number): string {
  return namesIn(trace, call) + (call.headNumbers[head] ?? head);
}

/** The same up to the number of the head. */
export function namesIn(trace: Pick<Trace, "calls">, call: Call): string {
  const { site, step } = call;
  const like = trace.calls.filter((c) => c.step === step && c.site.layer === site.layer && groupOf(c) === groupOf(call));
  const several = new Set(trace.calls.map(groupOf)).size > 1;
  return (several ? `${groupOf(call)} ` : "") + (site.layer === null || like.length > 1 ? `${site.path || "the model"} H` : `L${site.layer}H`);
}

/** A head in a sentence: its name, its role, and what shows it, with a number that is of just that. */
export function headSentence(trace: Trace, findings: Findings, call: Call, head: number): string {
  const name = headName(trace, call, head);
  const found = findings.heads[call.index]?.[head] ?? null;
  if (found === null) return `${name} · ${findings.missing ?? "not measured yet"}`;
  const [role] = found.roles;
  if (role === undefined) {
    const spread = measureOf(findings, "normalised_entropy", found);
    const far = measureOf(findings, "mean_distance", found);
    const even = spread === null ? "" : ` · its entropy is ${two(spread)} of that of even attention`;
    return `${name} · no clear role${even}${far === null ? "" : `, its keys are ${two(far)} away on average`}`;
  }
  return `${name} · ${role.role} · ${evidence(trace, call, role)}`;
}

/** Why a head is said to have a role. */
function evidence(trace: Trace, call: Call, role: RoleFound): string {
  const { pair, score } = role;
  const share = Number.isNaN(score) ? "" : `, ${two(score)} of its weight on average`;
  if (role.role === "learned sink") return `looks at no key, but at a learned sink${share}`;
  if (role.role === "uniform") {
    const much = Number.isNaN(score) ? "" : `: its entropy is ${two(score)} of the most there can be`;
    return `looks at all the keys that it may look at nearly alike${much}`;
  }
  if (pair === null) return `${GENERAL[role.role] ?? "as it was scored"}${share}`;
  const axes = axesOf(trace, call, pair.batch);
  const entry = call.extents.B > 1 ? ` (batch entry ${pair.batch})` : "";
  return `${pairSentence(role.role, axes, pair.query, pair.key)}, ${two(pair.weight)}${entry}`;
}

const GENERAL: Readonly<Record<string, string>> = {
  induction: "looks at what followed earlier occurrences of the token",
  "duplicate token": "looks back at the same token",
  "same word in the other sentence": "looks at the same word in the other sentence",
  "previous token": "looks at the token before",
  "next token": "looks at the token after",
  itself: "looks at the token itself",
  neighbours: "looks at the token and its neighbours",
  separators: "looks at separators",
  "first token": "looks at the first token",
};

/**
 * What is to be seen at one pair of a query and a key: what `role` says of it where the tokens and positions bear it out,
 * else only which they are. `role` may be that of no head.
 */
export function pairSentence(role: string | null, axes: Axes, query: number, key: number): string {
  const { queries, keys } = axes;
  const [p, k] = [queries.positions[query]!, keys.positions[key]!];
  // Queries of the same sequence as the keys are among them, and so is every like token before them.
  const own = keys.positions.indexOf(p);
  const same = queries.named && keys.named && own >= 0 && keys.labels[own]!.raw === queries.labels[query]!.raw;
  const from = same ? nth(keys, own) : nth(queries, query);
  const to = nth(keys, key);
  const word = queries.labels[query]!.raw;
  switch (role) {
    case "induction":
      if (same && key > 0 && k <= p && keys.labels[key - 1]!.raw === word)
        return `from ${from} it looks at what followed ${nth(keys, key - 1)}`;
      break;
    case "duplicate token":
      if (same && k < p && keys.labels[key]!.raw === word) return `from ${from} it looks back at ${to}`;
      break;
    case "first token":
      return `from ${from} it looks at the first token, ${to}`;
    case "itself":
    case "neighbours":
    case "previous token":
    case "next token":
      // These are of calls whose queries and keys are of one sequence.
      if (k === p) return `${from} looks at itself`;
      if (k === p - 1) return `from ${from} it looks at the token before, ${to}`;
      if (k === p + 1) return `from ${from} it looks at the token after, ${to}`;
  }
  return `from ${from} it looks at ${to}`;
}

/** “the 2nd “43””: which of the like tokens it is, as far as those before it are known; a position where there are none. */
export function nth({ labels, positions, named }: Axis, i: number): string {
  const label = labels[i]!;
  if (!named) return `position ${positions[i]}`;
  const text = `“${label.text}”`;
  const like = labels.flatMap(({ raw }, at) => (raw === label.raw ? [at] : []));
  if (positions[0] !== 0 || positions.at(-1) !== positions.length - 1) return `${text} at position ${positions[i]}`;
  return like.length < 2 ? text : `the ${ordinal(like.indexOf(i) + 1)} ${text}`;
}

function ordinal(n: number): string {
  const tens = n % 100 > 10 && n % 100 < 14;
  return `${n}${tens ? "th" : (["th", "st", "nd", "rd"][n % 10] ?? "th")}`;
}

function measureOf(findings: Findings, name: string, { call, head }: HeadFound): number | null {
  const measure = findings.scores[name];
  return measure === undefined || Array.isArray(measure) ? null : (measure.values[call]?.[head] ?? null);
}

function two(x: number): string {
  return x.toFixed(2).replace("-", "−");
}
