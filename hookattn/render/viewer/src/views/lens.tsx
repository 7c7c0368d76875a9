import { type App, current, focus, stored } from "../app";
import { where } from "../data/call";
import { isSoftmax, normalizerOf } from "../data/kinds";
import { listed, readRow, type Row } from "../data/row";
import { judge, standing, type Verdict, verdict as tell, type Word } from "../data/verdict";
import { exact, number, percent, short } from "../format";
import { useLoaded, useWidth } from "../ui/hooks";
import { bars, type KeyColumn, KeyRows, maskColumn, ROW } from "../ui/keyrows";
import { Notice } from "../ui/notice";
import { QueryControl, queryOf } from "../ui/query";
import { name, Tabular } from "../ui/table";
import type { View } from "./view";

/** How far a weight may be from the softmax of its score before it is told: what rounding to 8 bits does. */
const APART = 5e-3;

function Lens({ app }: { app: App }) {
  const state = app.state.value;
  const { call, axes } = current(app);
  const head = focus(state);
  const { batch, key: locked } = state;
  const query = queryOf(app);
  const [ref, room] = useWidth();
  const { value, error } = useLoaded(async () => {
    const row = await readRow(app.trace, call, batch, stored(call, head), query);
    const verdict = judge(row);
    const keys = listed(row, locked);
    const place = `Head ${head}, query ${name(axes.queries, query)}`;
    return { place, axes, query, row, verdict, keys, columns: columnsOf(row, verdict, keys) };
  }, [app, call, batch, head, query, locked]);
  if (error !== null) return <Notice error>{error}</Notice>;
  const active = app.cursor.value.key;
  // While another call is read, the one before is shown, which may not have the key.
  const there = (key: number | null): key is number => key !== null && key < value!.row.weights.length;
  const shown = value === null ? null : ([active, locked].find(there) ?? heaviest(value.row));
  return (
    <div ref={ref}>
      <div class="controls">
        <QueryControl app={app} />
      </div>
      {value === null || shown === null || room === 0 ? (
        <div class="quiet">Reading head {head} …</div>
      ) : (
        <>
          <div class="verdict" aria-live="polite" style={{ minHeight: room < 600 ? "9em" : "4.4em" }}>
            {tell(
              value.row,
              value.verdict,
              shown,
              name(value.axes.queries, value.query),
              (s) => `key ${name(value.axes.keys, s)}`,
            ).parts.map(({ text, exact }, i) => (exact === undefined ? text : <span key={i} title={exact}>{text}</span>))}
          </div>
          <Facts {...value} shown={shown} />
          <KeyRows
            axis={value.axes.keys}
            keys={value.keys}
            columns={value.columns}
            room={room}
            dark={app.dark.value}
            active={active}
            locked={locked}
            label={`${value.place}, a row for each key`}
            tell={() => null}
            onHover={(key) => (app.cursor.value = { query: null, key })}
            onPick={(key) => app.set({ query: value.query, key: key === locked ? null : key })}
          />
          <div class="readout quiet">
            The dashed line is the logarithm of the softmax's denominator: a weight is exp(score − line).
            {value.row.sink !== null && " The solid line is the learned sink."}
            {value.keys.length < value.row.weights.length &&
              ` Listed are the ${value.keys.length} keys of ${value.row.weights.length} that weigh most.`}
          </div>
          <Tabular
            summary={`${value.place}: why, key by key`}
            columns={["key", "score", "rank", "mask", "weight", "why"]}
            rows={value.keys.map((s) => [
              name(value.axes.keys, s),
              value.row.scores[s]!,
              value.row.allowed[s] ? standing(value.row, s).rank : null,
              value.row.allowed[s] ? "may attend" : "masked",
              value.row.weights[s]!,
              value.verdict.words[s]!,
            ])}
          />
        </>
      )}
    </div>
  );
}

interface Shown {
  axes: ReturnType<typeof current>["axes"];
  row: Row;
  verdict: Verdict;
  shown: number;
}

function Facts({ axes, row, verdict, shown }: Shown) {
  const { rank, competitor, softmax } = standing(row, shown);
  const { allowed, scores, weights } = row;
  const may = allowed[shown] === 1;
  const facts: [string, string, (number | undefined)?][] = [
    ["score", short(scores[shown]!), scores[shown]!],
    ["rank", may ? `${rank} of ${verdict.n}` : "–"],
    ["mask", may ? "may attend" : "masked"],
    [
      "largest competitor",
      competitor === null ? "none" : `key ${name(axes.keys, competitor)}, ${short(scores[competitor]!)}`,
      competitor === null ? undefined : scores[competitor],
    ],
    ["log-sum-exp", short(row.lse), row.lse],
    ["learned sink", row.sink === null ? "none" : `${percent(verdict.learned)} (logit ${short(row.sink)})`, row.sink ?? undefined],
    [
      `first key, ${name(axes.keys, row.first)}`,
      allowed[row.first] ? percent(weights[row.first]!) : "masked",
      weights[row.first],
    ],
    ["weight", short(weights[shown]!), weights[shown]],
  ];
  const apart = may && verdict.words[shown] !== "edited" && Math.abs(weights[shown]! - softmax) > APART;
  return (
    <>
      <dl class="facts">
        {facts.map(([term, told, value]) => (
          <div key={term}>
            <dt>{term}</dt>
            <dd title={value === undefined ? undefined : exact(value)}>{told}</dd>
          </div>
        ))}
      </dl>
      {apart && (
        <Notice>
          The softmax of the scores would be {exact(softmax)} here: the weight in the trace is not made of its scores
          alone.
        </Notice>
      )}
    </>
  );
}

function heaviest({ weights }: Row): number {
  let best = 0;
  for (let s = 1; s < weights.length; s++) if (weights[s]! > weights[best]!) best = s;
  return best;
}

function columnsOf(row: Row, { words }: Verdict, keys: readonly number[]): KeyColumn[] {
  const allowed = keys.map((s) => row.allowed[s] === 1);
  return [
    dots(row, keys),
    maskColumn(allowed),
    bars(
      "weight",
      keys.map((s, n) => (allowed[n] || row.weights[s] ? row.weights[s]! : null)),
      "var(--accent)",
    ),
    why(keys.map((s) => words[s]!)),
  ];
}

/** A dot for each score, empty where it is masked, the learned sink, and the logarithm of the denominator. */
function dots(row: Row, keys: readonly number[]): KeyColumn {
  const marks = [row.lse, row.sink ?? NaN].filter(Number.isFinite);
  const values = [...keys.map((s) => row.scores[s]!), ...marks];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return {
    title: "score",
    least: 76,
    most: 420,
    draw: (x, width, y) => {
      // The numbers of the axis, where the title leaves room for them.
      const ends = width < 230 ? [] : [low, high];
      const at = (value: number) => x + 6 + ((value - low) / (high - low || 1)) * (width - 12);
      const [top, bottom] = [y(0) - ROW / 2, y(keys.length - 1) + ROW / 2];
      return (
        <g>
          {ends.map((end, i) => (
            <text
              key={i}
              class="faint"
              x={i === 0 ? x + 60 : x + width}
              y={top - 7}
              text-anchor={i === 0 ? "start" : "end"}
            >
              {i === 0 ? `${number(end)} ←` : `→ ${number(end)}`}
            </text>
          ))}
          {keys.map((s, n) => (
            <g key={s}>
              <line x1={x} x2={x + width} y1={y(n)} y2={y(n)} stroke="var(--line)" stroke-opacity={0.5} />
              <circle
                cx={at(row.scores[s]!)}
                cy={y(n)}
                r={4}
                fill={row.allowed[s] ? "var(--text)" : "var(--bg)"}
                stroke={row.allowed[s] ? "none" : "var(--muted)"}
              />
            </g>
          ))}
          {row.sink !== null && (
            <line x1={at(row.sink)} x2={at(row.sink)} y1={top} y2={bottom} stroke="var(--cursor)">
              <title>learned sink</title>
            </line>
          )}
          {Number.isFinite(row.lse) && (
            <line
              x1={at(row.lse)}
              x2={at(row.lse)}
              y1={top}
              y2={bottom}
              stroke="var(--accent)"
              stroke-width={1.5}
              stroke-dasharray="5 4"
            />
          )}
        </g>
      );
    },
  };
}

function why(words: readonly Word[]): KeyColumn {
  return {
    title: "why",
    least: 62,
    most: 90,
    draw: (x, _, y) => (
      <g>
        {words.map((word, n) => (
          <text
            key={n}
            x={x}
            y={y(n)}
            dominant-baseline="central"
            class={word === "attended" || word === "drained" || word === "edited" ? undefined : "faint"}
            font-weight={word === "attended" ? 600 : 400}
          >
            {word}
          </text>
        ))}
      </g>
    ),
  };
}

export const lens: View = {
  id: "lens",
  label: "Why",
  help:
    "Why each weight of one query is what it is: its score against the others', the mask, and what sinks take. " +
    "Hover over a key or lock one (← →) for its reasons; ↑ ↓ change the query.",
  fields: () => ["scores", "mask", "weights"],
  controls: ["layer", "heads"],
  ownTable: true,
  unfit: (call) =>
    isSoftmax(call)
      ? null
      : `Why a weight is what it is, is told of a softmax, in which keys outscore each other. The weights of ${where(call)} ` +
        `are none (normalizer: ${normalizerOf(call)}).`,
  component: Lens,
};
