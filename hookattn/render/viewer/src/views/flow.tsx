import type { App } from "../app";
import type { Call } from "../data/call";
import { axesOf } from "../data/labels";
import { flowsToAll, type Paths, pathsOf, toAll } from "../data/paths";
import { mixing, refusal, RESIDUAL } from "../data/rollout";
import { strongest } from "../data/strongest";
import { exact, percent } from "../format";
import { Slices } from "../slices";
import type { Through } from "../state";
import { stepName, steps, toStep } from "../steps";
import { useLoaded, useWidth } from "../ui/hooks";
import { Segments } from "../ui/inputs";
import { Drawing, type Graph } from "../ui/layers";
import { Notice } from "../ui/notice";
import { QueryControl, queryOf } from "../ui/query";
import { name, Tabular } from "../ui/table";
import type { View } from "./view";

/** Lines of all attention, behind the paths. */
const BEHIND = 1200;
const LEAST = 0.02;
/** Input tokens in the table. */
const ROWS = 100;

function Flow({ app }: { app: App }) {
  const { step, stack, kind } = app.state.value;
  const calls = app.trace.calls.filter((c) => c.step === step && c.site.stack === stack && c.site.kind === kind);
  const why = refusal(app.trace, calls);
  if (why === null) return <Layers app={app} calls={calls} />;
  const other = passable(app, step);
  return (
    <Notice>
      {why}{" "}
      {other !== null && (
        <button onClick={() => app.set(toStep(app, other))}>
          Show step {stepName(app, other)}
        </button>
      )}
    </Notice>
  );
}

/** The first other step of the same attention through whose layers something can flow. */
function passable(app: App, here: number): number | null {
  const { stack, kind } = app.state.value;
  const found = steps(app).find((step) => {
    const calls = app.trace.calls.filter((c) => c.step === step && c.site.stack === stack && c.site.kind === kind);
    return step !== here && calls.length > 0 && refusal(app.trace, calls) === null;
  });
  return found ?? null;
}

function Layers({ app, calls }: { app: App; calls: readonly Call[] }) {
  const { batch, key: locked, through } = app.state.value;
  const [ref, room] = useWidth();
  const { value: graph, error } = useLoaded<Graph>(
    async (signal) => {
      const slices = new Slices(10, signal);
      app.reading.value++;
      const layers = await mixing(app.trace, calls, batch, slices).finally(() => app.reading.value--);
      const axes = axesOf(app.trace, calls[0]!, batch);
      return { calls, axes, layers, behind: await strongest(layers, BEHIND, LEAST, slices) };
    },
    [app, calls[0], calls.length, batch],
  );
  const query = app.cursor.value.query ?? queryOf(app);
  const key = app.cursor.value.key ?? locked;
  const found = useLoaded(
    async (signal) =>
      graph === null ? null : { graph, through, ...(await pathsOf(graph.layers, through, query, key, signal)) },
    [graph, through, query, key],
  );
  const many = graph !== null && through === "flow" && !flowsToAll(graph.layers);
  const all = useLoaded(
    async (signal) =>
      graph === null || through === "rollout" || many
        ? null
        : { graph, query, values: await toAll(graph.layers, query, signal) },
    [graph, through, query],
  );
  const path = found.value?.graph === graph ? found.value : null;
  const known = path?.through === "flow" && all.value?.graph === graph && all.value.query === path.query;
  const paths = path !== null && known ? { ...path, values: all.value!.values } : path;
  if (error !== null || found.error !== null) return <Notice error>{error ?? found.error}</Notice>;
  return (
    <div ref={ref}>
      <div class="controls">
        <Segments<Through>
          name="Through the layers"
          value={through}
          of={[
            ["rollout", "rollout", "Products of the layers: what a token is made of"],
            ["flow", "maximum flow", "The most that can go from one token to another, where each edge bounds it"],
          ]}
          pick={(next) => app.set({ through: next })}
        />
        <QueryControl app={app} />
      </div>
      {graph === null || paths === null || room === 0 ? (
        <div class="quiet">Following {calls.length} layers …</div>
      ) : (
        <>
          <div class="readout" aria-live="polite">
            {told(graph, paths, paths.through)}
          </div>
          <Drawing app={app} graph={graph} paths={paths} room={room} />
          <div class="readout quiet">{remarks(graph, paths, many)}</div>
          <Table graph={graph} paths={paths} through={paths.through} />
        </>
      )}
    </div>
  );
}

function told({ axes }: Graph, { query, key, total }: Paths, through: Through): string {
  const from = name(axes.queries, query);
  if (key === null) return `What ${from} is made of after the last layer, by rollout. Choose an input for its paths.`;
  const to = name(axes.keys, key);
  return through === "rollout"
    ? `Of ${from} after the last layer, ${exact(total)} comes from input ${to}, by rollout, on these paths.`
    : `At most ${exact(total)} flows between ${from} after the last layer and input ${to}; one way that it can go.`;
}

function remarks({ calls }: Graph, { values, lines }: Paths, many: boolean): string {
  const layers = new Set(calls.map((c) => c.site.layer));
  const whole = calls[0]!.site.layers;
  const parts = [
    `Lines carry ${percent(lines.share)} of it; grey ones are the mean over the heads, with ${RESIDUAL} of each token ` +
      `past the attention, where that is at least ${LEAST}.`,
  ];
  if (whole !== null && layers.size < whole) parts.push(`Only ${layers.size} of ${whole} layers are in this trace.`);
  if (calls.some((c) => c.heads !== null)) parts.push("Not all heads were kept: the mean is over those that were.");
  if (many) parts.push("The flow is computed for one input token at a time: there are too many.");
  else if (values.includes(null)) parts.push("The flow to the other input tokens is being computed …");
  return parts.join(" ");
}

function Table({ graph, paths, through }: { graph: Graph; paths: Paths; through: Through }) {
  const { axes } = graph;
  const rows = paths.values
    .map((value, j) => ({ value, j }))
    .filter((row): row is { value: number; j: number } => row.value !== null)
    .sort((a, b) => b.value - a.value || a.j - b.j);
  const what = through === "rollout" ? "rollout" : "maximum flow";
  const best = rows[0];
  const first = best === undefined ? "" : `, most from ${name(axes.keys, best.j)}: ${exact(best.value)}`;
  return (
    <Tabular
      summary={`${name(axes.queries, paths.query)} after the last layer, ${what}${first}`}
      columns={["input", what]}
      rows={rows.slice(0, ROWS).map(({ value, j }) => [name(axes.keys, j), value])}
    />
  );
}

export const flow: View = {
  id: "flow",
  label: "Flow",
  help:
    "Attention through the layers, input on the left: what a token of the last layer is made of (rollout), or the " +
    "most that can flow to an input token (maximum flow). Click a token on the right (↑ ↓) or an input on the left (← →) " +
    "for its paths.",
  fields: () => ["weights"],
  controls: [],
  ownTable: true,
  component: Flow,
};
