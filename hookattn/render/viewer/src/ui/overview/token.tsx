/** The chosen token: what it looks at most, why it looks at the one that is told of, and which other heads do. */
import { useState } from "preact/hooks";
import { type App, stored } from "../../app";
import type { AtlasGroup } from "../../data/atlas";
import { headName } from "../../data/sentences";
import { isSoftmax, normalizerOf } from "../../data/kinds";
import { type Axes, axesOf } from "../../data/labels";
import { type Look, looksAt } from "../../data/looksat";
import { ofPatches, patches, place } from "../../data/patches";
import { readRow } from "../../data/row";
import { columnOf, keyOf } from "../../data/sheet";
import { explain, judge } from "../../data/verdict";
import { Slices } from "../../slices";
import { placeOf } from "../../state";
import { shorten } from "../../tokens";
import type { Call } from "../../data/call";
import { useLoaded } from "../hooks";
import { name } from "../table";
import { Tip, type TipAt } from "../tip";
import { two } from "./numbers";
import type { Scene } from "./scene";

const BARS = 5;

interface Bar {
  readonly key: number;
  readonly weight: number;
  /** In the other trace, where two are compared. */
  readonly beside: number | null;
}

interface Room {
  app: App;
  scene: Scene;
  groups: readonly AtlasGroup[];
  room: number;
  /** The height that the strip of heads may take. */
  most: number;
}

export function ChosenToken(props: Room) {
  const { row, column, sheet, error } = props.scene;
  const at = row === null ? null : (sheet.rows[row] ?? null);
  if (at === null)
    return (
      <div class="asked">
        <div class="heading">
          <h2>The chosen token</h2>
        </div>
        <p class="quiet">{error === null ? "Reading …" : "Without the weights of the head there is nothing to tell of its tokens."}</p>
      </div>
    );
  const key = column === null ? null : keyOf(sheet, at.call, column);
  return <Token {...props} call={at.call} query={at.query} asked={key} />;
}

function Token(props: Room & { call: Call; query: number; asked: number | null }) {
  const { app, scene, call, query, asked } = props;
  const { trace, head, batch, field, sheet, other, error } = scene;
  const axes = axesOf(trace, call, batch, [head]);
  const names = namesOf(app, call, axes);
  const { value } = useLoaded(async () => {
    if (error !== null) return null;
    const own = (await trace.row(call, field, batch, stored(call, head), query))!.data;
    const beside =
      other === null
        ? null
        : (await other.trace.row(other.call, field, Math.min(batch, other.call.extents.B - 1), stored(other.call, head), query))!
            .data;
    const bars = Array.from(own, (weight, key): Bar => ({ key, weight, beside: beside?.[key] ?? null }));
    const size = (bar: Bar) => Math.abs(bar.beside === null ? bar.weight : bar.beside - bar.weight);
    const strongest = bars.filter((b) => size(b) > 0).sort((a, b) => size(b) - size(a));
    return { call, query, bars: strongest.slice(0, BARS), of: bars.length };
  }, [trace, other?.trace, call, field, batch, head, query, error]);
  const ready = value !== null && value.call === call && value.query === query ? value : null;
  const key = asked !== null && asked >= 0 ? asked : (ready?.bars[0]?.key ?? null);
  return (
    <div class="asked">
      <div>
      <div class="heading">
        <h2>The chosen token</h2>
      </div>
      <p class="sentence">
        <b>{names.query(query)}</b> looks most at
      </p>
      {ready === null ? (
        <div class="quiet bars">Reading …</div>
      ) : (
        <>
          <ol class="bars">
            {ready.bars.map((bar) => (
              <li key={bar.key}>
                <button
                  aria-pressed={bar.key === key}
                  title={names.key(bar.key)}
                  onClick={() => scene.pick(scene.row, columnOf(sheet, call, bar.key))}
                >
                  <span class="who">{shorten(names.key(bar.key), 26)}</span>
                  <span class="track" aria-hidden="true">
                    <span style={{ width: percentage(bar.weight) }} />
                    {bar.beside !== null && <span class="beside" style={{ width: percentage(bar.beside) }} />}
                  </span>
                  <span class="much">{bar.beside === null ? two(bar.weight) : `${two(bar.weight)} → ${two(bar.beside)}`}</span>
                </button>
              </li>
            ))}
          </ol>
          {ready.of > ready.bars.length && ready.bars.length > 0 && other === null && (
            <p class="quiet">{rest(ready.bars, ready.of)}</p>
          )}
        </>
      )}
      </div>
      {key !== null && (
        <div>
          <Why scene={scene} call={call} query={query} asked={key} names={names} />
          <Strip {...props} asked={key} told={names.key(key)} />
        </div>
      )}
    </div>
  );
}

function percentage(weight: number): string {
  return `${(100 * Math.min(1, Math.abs(weight))).toFixed(1)}%`;
}

function rest(bars: readonly Bar[], of: number): string {
  const sum = bars.reduce((n, b) => n + b.weight, 0);
  const others = of - bars.length;
  return `The other ${others === 1 ? "key" : `${others} keys`} together: ${two(Math.max(0, 1 - sum))}`;
}

/** What queries and keys are called here: patches by where they lie, tokens by position and text. */
interface Names {
  query(i: number): string;
  key(i: number): string;
}

function namesOf(app: App, call: Call, axes: Axes): Names {
  const keys = ofPatches(call, app.options) ? patches(call.extents.S, app.options.images) : null;
  const part = (axis: Axes["keys"], i: number) => (axis.segments === null ? "" : `${"AB"[axis.segments[i]!]} · `);
  return {
    query: (i) => (keys !== null && call.site.kind === "self" ? place(axes.queries.positions[i]!, keys) : part(axes.queries, i) + name(axes.queries, i)),
    key: (i) => (keys !== null ? place(i, keys) : part(axes.keys, i) + name(axes.keys, i)),
  };
}

interface Pair {
  scene: Scene;
  call: Call;
  query: number;
  asked: number;
}

/** The sentence of the view that tells why. */
function Why({ scene, call, query, asked: key, names }: Pair & { names: Names }) {
  const { trace, head, batch } = scene;
  const lacking = ["scores", "mask", "weights"].find((field) => !trace.has(call, field));
  const fit = isSoftmax(call);
  const { value, error } = useLoaded(async () => {
    if (lacking !== undefined || !fit) return null;
    const row = await readRow(trace, call, batch, stored(call, head), query);
    return { row, verdict: judge(row), call, query };
  }, [trace, call, batch, head, query, lacking, fit]);
  const told = () => {
    if (!fit) return `Its weights are no softmax of scores (normalizer: ${normalizerOf(call)}).`;
    if (lacking !== undefined) return trace.lacks(lacking, call).message;
    if (error !== null) return error;
    if (value === null || value.call !== call || value.query !== query || key >= value.row.weights.length) return "Reading …";
    const { row, verdict } = value;
    return explain(row, verdict, key, names.query(query), (s) => `key ${names.key(s)}`);
  };
  return (
    <div class="why" aria-live="polite">
      <h3>Why</h3>
      <p>{told()}</p>
    </div>
  );
}

const LEFT = 26;

/** Layers down, heads across: how much each head looks at the key, from the same query. */
function Strip(props: Pair & Room & { told: string }) {
  const { app, scene, groups, room, most, call, query, asked: key, told } = props;
  const { trace, head, batch, field } = scene;
  const [tip, setTip] = useState<TipAt | null>(null);
  const calls = trace.calls.filter(
    (c) =>
      c.step === call.step &&
      c.site.stack === call.site.stack &&
      c.site.kind === call.site.kind &&
      c.extents.T === call.extents.T &&
      c.extents.S === call.extents.S,
  );
  calls.sort((a, b) => (a.site.layer ?? -1) - (b.site.layer ?? -1) || a.index - b.index);
  const { value } = useLoaded(
    async (signal, show: (found: ReadonlyMap<string, Look>) => void) =>
      looksAt(trace, calls, field, batch, query, key, new Slices(8, signal), show),
    [trace, call, field, batch, query, key],
  );
  const heads = [...new Set(calls.flatMap((c) => c.headNumbers))].sort((a, b) => a - b);
  const size = Math.max(4, Math.min(room > 700 ? 44 : 26, Math.floor((Math.min(room, 900) - LEFT) / heads.length), Math.floor(Math.max(most, 120) / calls.length)));
  const cells = calls.flatMap((c, y) =>
    c.headNumbers.map((h) => ({ call: c, head: h, x: LEFT + heads.indexOf(h) * size, y: y * size, look: value?.get(`${c.index} ${h}`) })),
  );
  const [width, height] = [LEFT + heads.length * size + 1, calls.length * size + 1];
  const find = (event: PointerEvent | MouseEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    return cells.find((c) => x >= c.x && x < c.x + size && y >= c.y && y < c.y + size) ?? null;
  };
  const among = cells.filter((c) => c.look !== undefined && c.look.rank <= BARS && c.look.weight !== 0);
  const best = among.reduce<(typeof cells)[number] | null>((a, c) => (a === null || c.look!.weight > a.look!.weight ? c : a), null);
  const stride = Math.max(1, Math.ceil(13 / size));
  const some = groups.flatMap((g) => g.rows);
  return (
    <div class="strip">
      <h3>Which heads look at it</h3>
      <p class="quiet">
        {value === null
          ? "Reading …"
          : `${among.length} of ${cells.length} heads have ${told} among the ${BARS} keys they look at most from here` +
            (best === null ? "." : `; ${headName(trace, best.call, stored(best.call, best.head))} most, ${two(best.look!.weight)}.`)}
      </p>
      <div class="plane" style={{ width: `${width}px`, height: `${height}px`, touchAction: "auto" }}>
        <svg
          width={width}
          height={height}
          role="img"
          aria-label={`How much each of ${cells.length} heads looks at ${told}, layers down, heads across`}
          onPointerMove={(event) => {
            const cell = find(event);
            setTip(
              cell === null
                ? null
                : {
                    x: cell.x + size,
                    y: cell.y,
                    text: `${headName(trace, cell.call, stored(cell.call, cell.head))}: ${cell.look === undefined ? "not read" : `${two(cell.look.weight)}, rank ${cell.look.rank}`}`,
                  },
            );
          }}
          onPointerLeave={() => setTip(null)}
          onClick={(event) => {
            const cell = find(event);
            const own = cell === null ? undefined : app.trace.calls[cell.call.index];
            if (cell === null || own === undefined || !some.some((r) => r.call.site.path === own.site.path)) return;
            app.chosen.value = true;
            app.set({ ...placeOf(app.trace, own), heads: [cell.head], query, key });
          }}
        >
          {calls.map(
            (c, y) =>
              y % stride === 0 && (
                <text key={y} class="faint" x={LEFT - 5} y={(y + 0.5) * size} text-anchor="end" dominant-baseline="central">
                  {c.site.layer ?? y}
                </text>
              ),
          )}
          {cells.map(({ call: c, head: h, x, y, look }) => (
            <g key={`${c.index} ${h}`}>
              <rect x={x + 0.5} y={y + 0.5} width={size - 1} height={size - 1} fill="var(--panel)" />
              {look !== undefined && (
                <rect
                  x={x + 0.5}
                  y={y + 0.5}
                  width={size - 1}
                  height={size - 1}
                  fill="var(--accent)"
                  fill-opacity={Math.min(1, Math.abs(look.weight)).toFixed(3)}
                  data-look={`${c.site.layer}.${h}`}
                />
              )}
              {c === call && h === head && (
                <rect x={x + 1} y={y + 1} width={size - 2} height={size - 2} fill="none" stroke="var(--cursor)" stroke-width={size > 9 ? 2 : 1} />
              )}
            </g>
          ))}
        </svg>
        <Tip tip={tip} width={width} />
      </div>
    </div>
  );
}
