/** What a trace holds, in a sentence or two. */
import type { Findings } from "../findings";
import { inOrder } from "./rolewords";
import type { Trace } from "./trace";

export function summary(trace: Trace, findings: Findings): string {
  const layers = new Set(trace.calls.map((c) => c.site.path)).size;
  const heads = Math.max(...trace.calls.map((c) => c.headNumbers.length));
  const tokens = Math.max(...trace.calls.map((c) => c.extents.S));
  const counts = new Map<string, number>();
  for (const { role } of findings.heads.flat().flatMap((h) => h?.roles ?? [])) counts.set(role, (counts.get(role) ?? 0) + 1);
  const roles = inOrder(counts.keys()).map((role) => `${counts.get(role)} ${role}`);
  return `${layers} layers × ${heads} heads, ${tokens} tokens. ${roles.length > 0 ? `${roles.join(", ")}.` : ""}`;
}
