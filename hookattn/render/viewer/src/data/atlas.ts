/** Which heads there are, layers down and heads across, of each stack and kind. */
import type { Call } from "./call";
import { namesIn } from "./sentences";
import type { Trace } from "./trace";

export interface AtlasRow {
  /** The call that stands for the row, and all of the site: in a generation one a step. */
  readonly call: Call;
  readonly calls: readonly Call[];
  readonly name: string;
  /** What the names of its heads begin with. */
  readonly heads: string;
}

export interface AtlasGroup {
  readonly name: string;
  readonly rows: readonly AtlasRow[];
  /** The model's numbers of the heads that any row has. */
  readonly heads: readonly number[];
}

/** The calls of a step, or, of steps that go on from each other (null), the call of each site with most queries. */
export function atlasOf(trace: Trace, step: number | null): AtlasGroup[] {
  const sites = new Map<string, Call[]>();
  const runs = new Map<string, number>();
  for (const call of trace.calls) {
    if (step !== null && call.step !== step) continue;
    const { stack, kind, path } = call.site;
    const run = `${call.step} ${kind} ${path}`;
    const nth = runs.get(run) ?? 0;
    runs.set(run, nth + 1);
    const site = [stack, kind, path, nth].join("\n");
    const known = sites.get(site);
    if (known === undefined) sites.set(site, [call]);
    else known.push(call);
  }
  const groups = new Map<string, AtlasRow[]>();
  for (const calls of sites.values()) {
    const call = calls.reduce((a, b) => (b.extents.T > a.extents.T ? b : a));
    const name = [call.site.stack, call.site.kind].filter(Boolean).join(" · ");
    const rows = groups.get(name) ?? [];
    groups.set(name, rows);
    rows.push({ call, calls, name: String(call.site.layer ?? rows.length), heads: namesIn(trace, call) });
  }
  return [...groups].map(([name, rows]) => {
    rows.sort((a, b) => (a.call.site.layer ?? -1) - (b.call.site.layer ?? -1) || a.call.index - b.call.index);
    return { name, rows, heads: [...new Set(rows.flatMap((r) => r.call.headNumbers))].sort((a, b) => a - b) };
  });
}
