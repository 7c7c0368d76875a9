/** What kind of attention a call is: what its weights may be taken for, which axes were guessed, what can be drawn. */
import type { Call } from "./call";
import { editsOf } from "./edits";

/** Normalizers whose weights are a distribution over the keys, as hookattn/attention/normalizers.py has them. */
const SHARES: ReadonlySet<string> = new Set(["softmax", "softmax1", "sparsemax"]);
/** Those whose weights are never negative. */
const POSITIVE: ReadonlySet<string> = new Set([...SHARES, "sigmoid", "relu", "relu^2", "exp", "softplus"]);
/** Fields that a call which was captured whole may have none of. */
export const OPTIONAL: ReadonlySet<string> = new Set(["bias", "sinks", "applied"]);

type Kind = Pick<Call, "normalizer" | "fields">;

export function normalizerOf({ normalizer }: Kind): string {
  return normalizer ?? "softmax";
}

/** Whether weights are the softmax of scores and sinks. */
export function isSoftmax(call: Kind): boolean {
  return normalizerOf(call).startsWith("softmax");
}

/** Whether a field holds shares of the attention of a query: 0 to 1, and with what goes to sinks 1 in all. */
export function areShares(call: Kind, field: string): boolean {
  return field === "weights" && SHARES.has(normalizerOf(call));
}

/** Whether a field may have numbers below 0. */
export function mayBeNegative(call: Kind & Pick<Call, "edits">, field: string): boolean {
  if (editsOf(call).some((edit) => edit.field === field)) return field !== "mask";
  return field === "scores" || field === "applied" || (field === "weights" && !POSITIVE.has(normalizerOf(call)));
}

/** Whether what met the values is there apart from the weights: after a gate, dropout, or a mix of heads. */
export function hasApplied({ fields }: Pick<Call, "fields">): boolean {
  return fields["applied"] != null;
}

/** The field that is drawn of a call where `field` is asked for: where nothing changed the weights, they were applied. */
export function fieldOf<F extends string>(call: Pick<Call, "fields">, field: F): F | "weights" {
  return field === "applied" && !hasApplied(call) ? "weights" : field;
}

/** The same for a view that draws weights, whatever field another view shows. */
export function weightsOf(call: Pick<Call, "fields">, field: string): "weights" | "applied" {
  return field === "applied" && hasApplied(call) ? "applied" : "weights";
}

/** The letters of the axes that nothing but convention tells from others. */
export function guessed({ basis }: Pick<Call, "basis">): string[] {
  return Object.entries(basis ?? {})
    .filter(([, how]) => how === "guessed")
    .map(([letter]) => letter);
}

/** Why a call has none of a field that others have; null: it may have been captured. */
export function absent(call: Call, field: string): string | null {
  if (call.fields[field] !== null || OPTIONAL.has(field)) return null;
  const score = call.score ?? "dot";
  return score === "dot"
    ? "its scores are more than a product of queries and keys, and the model formed none that are finite"
    : `its scores are no product of queries and keys (${score})`;
}
