import { type App, current, focus, stored } from "../app";
import { domain, ramp } from "../colours";
import { type Call, where } from "../data/call";
import { hasApplied } from "../data/kinds";
import { extent, type Matrix } from "../data/matrix";
import { groupOf, listed, readRow, readSteps, type Row, type Steps } from "../data/row";
import { exact, measured, number } from "../format";
import { useLoaded, useWidth } from "../ui/hooks";
import { bars, type Heat, type KeyColumn, KeyRows, maskColumn } from "../ui/keyrows";
import { Legend } from "../ui/legend";
import { Notice } from "../ui/notice";
import { QueryControl, queryOf } from "../ui/query";
import { name, Tabular } from "../ui/table";
import type { View } from "./view";

/** Components named in the readout. */
const STRONGEST = 3;

function Neuron({ app }: { app: App }) {
  const state = app.state.value;
  const { call, axes } = current(app);
  const head = focus(state);
  const { batch, key: locked } = state;
  const query = queryOf(app);
  const [ref, room] = useWidth();
  const { value, error } = useLoaded(async () => {
    const at = stored(call, head);
    const row = await readRow(app.trace, call, batch, at, query);
    const keys = listed(row, locked);
    const steps = await readSteps(app.trace, call, batch, at, query, row, keys);
    const place = `Head ${head}, query ${name(axes.queries, query)}`;
    return { place, call, axes, head, query, row, keys, steps, columns: columnsOf(call, row, keys, steps) };
  }, [app, call, batch, head, query, locked]);
  if (error !== null) return <Notice error>{error}</Notice>;
  const active = app.cursor.value.key;
  const n = value === null ? -1 : value.keys.indexOf(active ?? locked ?? -1);
  const dark = app.dark.value;
  const group = groupOf(call, stored(call, head));
  return (
    <div ref={ref}>
      <div class="controls">
        <QueryControl app={app} />
      </div>
      {value === null || room === 0 ? (
        <div class="quiet">Reading head {head} …</div>
      ) : (
        <>
          <div class="readout quiet">{told(value)}</div>
          <KeyRows
            axis={value.axes.keys}
            keys={value.keys}
            columns={value.columns}
            room={room}
            dark={dark}
            active={active}
            locked={locked}
            label={`${value.place}, a row for each key`}
            tell={(i) =>
              numbers(value, i)
                .map(([title, x]) => `${title} ${typeof x === "number" ? exact(x) : x}`)
                .join("\n")
            }
            onHover={(key) => (app.cursor.value = { query: null, key })}
            onPick={(key) => app.set({ query: value.query, key: key === locked ? null : key })}
          />
          <div class="readout">{n >= 0 && strongest(value, n)}</div>
          <Legend
            domain={domain("", "linear", -1, 1)}
            ramp={ramp("diverging", dark)}
            dropped={false}
            title="component, part of the largest (±)"
          />
          <Remarks app={app} call={value.call} steps={value.steps} group={group} />
          <div aria-live="polite">
            <Tabular
              summary={`${value.place}: ${value.keys.length} keys, step by step`}
              columns={[
                "key",
                ...numbers(value, 0)
                  .slice(1)
                  .map(([title]) => title),
              ]}
              rows={value.keys.map((_, i) => numbers(value, i).map(([, x]) => x))}
            />
          </div>
        </>
      )}
    </div>
  );
}

interface Shown {
  call: Call;
  axes: ReturnType<typeof current>["axes"];
  head: number;
  query: number;
  row: Row;
  keys: readonly number[];
  steps: Steps;
}

function told({ call, axes, head, query, row, keys, steps }: Shown): string {
  const scale = typeof call.scale === "number" ? number(call.scale) : "a tensor of this call";
  const parts = [`Query ${name(axes.queries, query)}, head ${head}; scale is ${scale}`];
  if (call.softcap !== null) parts.push(`scores are capped at ±${number(call.softcap)}`);
  if (row.sink !== null) parts.push(`a learned sink of ${number(row.sink)} joins the softmax`);
  if (keys.length < row.weights.length) parts.push(`the ${keys.length} keys of ${row.weights.length} that weigh most`);
  if (steps.values === null) parts.push("v is not in this trace");
  return parts.join("; ");
}

function columnsOf(call: Call, row: Row, keys: readonly number[], steps: Steps): KeyColumn[] {
  const { q, k, product, scaled, capped, bias, values } = steps;
  const allowed = keys.map((s) => row.allowed[s] === 1);
  const score = keys.map((s) => row.scores[s]!);
  const tint = "var(--muted)";
  const components = (title: string, matrix: Matrix, strip?: KeyColumn["strip"]): KeyColumn => ({
    title,
    ...heatRoom(matrix.cols, title),
    heat: { matrix, most: largest(matrix) },
    ...(strip && { strip }),
    tell: (n, d) =>
      `key ${keys[n]}, component ${d}\n${title} ${exact(matrix.data[n * matrix.cols + d]!)}` +
      (strip ? `\n${strip.title} ${exact(strip.heat.matrix.data[d]!)}` : ""),
  });
  const finished = capped !== null || bias !== null || call.own_scores;
  return [
    components("k", k, { title: "q", heat: heatOf(q) }),
    components("q∘k", product),
    bars("scale·q·k", [...scaled], tint),
    ...(capped === null ? [] : [bars("soft-capped", [...capped], tint)]),
    ...(bias === null ? [] : [bars("bias", [...bias], tint)]),
    ...(finished ? [bars("score", score, tint)] : []),
    maskColumn(allowed),
    bars(
      "weight",
      keys.map((s, n) => (allowed[n] || row.weights[s] ? row.weights[s]! : null)),
      "var(--accent)",
    ),
    ...(row.applied === null ? [] : [bars("applied", keys.map((s) => row.applied![s]!), "var(--accent)")]),
    ...(values === null ? [] : [components(row.applied === null ? "weight·v" : "applied·v", values.weighted, { title: "Σ", heat: heatOf(values.output) })]),
  ];
}

/** The steps of one listed key, by name. */
function numbers({ axes, row, keys, steps }: Shown, n: number): [string, string | number | null][] {
  const s = keys[n]!;
  const { scaled, capped, bias } = steps;
  return [
    ["key", name(axes.keys, s)],
    ["scale·q·k", scaled[n]!],
    ...(capped === null ? [] : [["soft-capped", capped[n]!] as [string, number]]),
    ...(bias === null ? [] : [["bias", bias[n]!] as [string, number]]),
    ["score", row.scores[s]!],
    ["mask", row.allowed[s] ? "may attend" : "masked"],
    ["weight", row.weights[s]!],
    ...(row.applied === null ? [] : [["applied", row.applied[s]!] as [string, number]]),
  ];
}

/** Which components decide a dot product. */
function strongest({ axes, call, keys, steps }: Shown, n: number): string {
  const { product } = steps;
  const own = product.data.subarray(n * product.cols, (n + 1) * product.cols);
  const order = Array.from(own, (_, d) => d).sort((a, b) => Math.abs(own[b]!) - Math.abs(own[a]!));
  const scale = typeof call.scale === "number" ? "" : ", before the scale";
  const list = order.slice(0, STRONGEST).map((d) => `${d} (${number(own[d]!)})`);
  return `key ${name(axes.keys, keys[n]!)}: the largest components of q∘k are ${list.join(", ")}${scale}`;
}

/** What does not add up, and what is missing. */
function Remarks({ app, call, steps, group }: { app: App; call: Call; steps: Steps; group: string | null }) {
  const missing = ["v", "bias"].filter((field) => !(field in call.fields) && !(field === "v" && steps.values));
  return (
    <>
      <p class="quiet">
        {group !== null && `This head reads ${group}. `}
        {call.own_scores
          ? "The scores are the model's own and are more than what is made of q·k here: "
          : "What is made of q and k here is the score in the trace, "}
        {call.own_scores ? `they differ by up to ${measured(steps.apart)}.` : `to within ${measured(steps.apart)}.`}
        {steps.values?.apart != null &&
          ` Σ ${hasApplied(call) ? "applied" : "weight"}·v is what the kernel returned, to within ${measured(steps.values.apart)}.`}
        {call.mixed && " The model changed the weights after the softmax, before they met v."}
      </p>
      {missing.map((field) => (
        <Notice key={field}>{app.trace.lacks(field, call).message}</Notice>
      ))}
    </>
  );
}

function heatOf(matrix: Matrix): Heat {
  return { matrix, most: largest(matrix) };
}

/** At least what its title takes. */
function heatRoom(components: number, title: string): { least: number; most: number } {
  return {
    least: Math.max(70, Math.min(128, components), 6.4 * (title.length + 9)),
    most: Math.max(110, Math.min(420, components * 12)),
  };
}

function largest(matrix: Matrix): number {
  const [low, high] = extent(matrix);
  return Math.max(-low, high) || 0;
}

export const neuron: View = {
  id: "neuron",
  label: "Neurons",
  help:
    "How the weights of one query come about, key by key: q and k as they enter the dot product (after RoPE, before " +
    "the scale), their product component by component, the score, the mask, the softmax, and what it takes of v. " +
    "Hover for numbers, ↑ ↓ change the query, ← → lock a key.",
  fields: () => ["q", "k", "scores", "mask", "weights"],
  controls: ["layer", "heads"],
  unfit: (call) =>
    (call.score ?? "dot") === "dot"
      ? null
      : `The scores of ${where(call)} are no product of queries and keys (${call.score}), so that no component of them ` +
        "has a part of its own.",
  ownTable: true,
  component: Neuron,
};
