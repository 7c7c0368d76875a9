/** Which heads there are, layers down and heads across, of each stack and kind. */
import type { Call } from "./call";
import type { Trace } from "./trace";

export interface AtlasRow {
  readonly call: Call;
  readonly name: string;
}

export interface AtlasGroup {
  readonly name: string;
  readonly rows: readonly AtlasRow[];
  /** The model's numbers of the heads that any row has. */
  readonly heads: readonly number[];
}

/** The calls of a step, or, of steps that go on from each other (null), the call of each site with most queries. */
export function atlasOf(trace: Trace, step: number | null): AtlasGroup[] {
  const sites = new Map<string, Call>();
  const runs = new Map<string, number>();
  for (const call of trace.calls) {
    if (step !== null && call.step !== step) continue;
    const { stack, kind, path } = call.site;
    const run = `${call.step} ${kind} ${path}`;
    const nth = runs.get(run) ?? 0;
    runs.set(run, nth + 1);
    const site = [stack, kind, path, nth].join("\n");
    const known = sites.get(site);
    if (known === undefined || call.extents.T > known.extents.T) sites.set(site, call);
  }
  const groups = new Map<string, Call[]>();
  for (const call of sites.values()) {
    const name = [call.site.stack, call.site.kind].filter(Boolean).join(" · ");
    groups.set(name, [...(groups.get(name) ?? []), call]);
  }
  return [...groups].map(([name, calls]) => {
    calls.sort((a, b) => (a.site.layer ?? -1) - (b.site.layer ?? -1) || a.index - b.index);
    const heads = [...new Set(calls.flatMap((c) => c.headNumbers))].sort((a, b) => a - b);
    return { name, rows: calls.map((call, i) => ({ call, name: String(call.site.layer ?? i) })), heads };
  });
}

/** `L1H2`, as papers write it; of a site without a layer its path. */
export function headName({ site }: Call, head: number): string {
  return site.layer === null ? `${site.path || "model"} head ${head}` : `L${site.layer}H${head}`;
}
