/** The current selection as text: a sentence for a screen reader, and a table of its strongest pairs. */
import { type App, current } from "../app";
import { type Axes, type Axis } from "../data/labels";
import { fieldOf, mayBeNegative } from "../data/kinds";
import { at, type Matrix } from "../data/matrix";
import { axesOver, nameOver, shownOver } from "../data/over";
import { presented } from "../data/presented";
import { absence } from "../data/shown";
import { exact } from "../format";
import { Slices } from "../slices";
import { useLoaded } from "./hooks";

const ROWS = 24;

interface Pair {
  query: number;
  key: number;
  value: number;
}

export function name(axis: Axis, i: number): string {
  const label = axis.labels[i];
  if (i === axis.sink) return "the sink";
  return label === undefined ? String(i) : axis.named ? `${axis.positions[i]} “${label.text}”` : label.text;
}

export function Table({ app }: { app: App }) {
  const state = app.state.value;
  const { call, axes: named } = current(app);
  const { query, key, sink, filter, batch, over } = state;
  const field = fieldOf(call, state.field);
  const axes = axesOver(call, field, named);
  const heads = state.heads.join();
  const { value } = useLoaded(
    async (signal) => {
      const shown = await shownOver(app.trace, call, field, batch, state.heads, over);
      const matrix = presented(shown.matrix, field, sink, filter, axes);
      // Of weights of either sign the strongest are those farthest from 0; scores outscore each other as they are.
      const far = field !== "scores" && mayBeNegative(call, field);
      const sizes = far ? { ...matrix, data: matrix.data.map(Math.abs) } : matrix;
      const found = await strongest(sizes, query, key, new Slices(10, signal));
      const pairs = found.map((p) => ({ ...p, value: at(matrix, p.query, p.key) }));
      const blank = query !== null && key !== null && found.length === 0 ? absence(shown, query, key) : null;
      return { pairs, axes, field, what: nameOver(call, state.heads, over), blank };
    },
    [app, call, heads, over, query, key, field, sink, filter, batch],
  );
  if (value === null) return null;
  return (
    <Tabular
      summary={summary(value, query, key)}
      columns={["query", "key", value.field]}
      rows={
        value.blank !== null
          ? [[name(value.axes.queries, query!), name(value.axes.keys, key!), value.blank]]
          : value.pairs.map((p) => [name(value.axes.queries, p.query), name(value.axes.keys, p.key), told(field, p.value)])
      }
    />
  );
}

/** A sentence, and the table that it is of when it is opened; null is a number that there is none of. */
export function Tabular(props: {
  summary: string;
  columns: readonly string[];
  rows: readonly (readonly (string | number | null)[])[];
}) {
  return (
    <details class="as-table">
      <summary>{props.summary}</summary>
      <div class="wide">
        <table>
          <thead>
            <tr>
              {props.columns.map((column) => (
                <th key={column} scope="col">
                  {column}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {props.rows.map((cells, i) => (
              <tr key={i}>
                {cells.map((cell, c) => (
                  <td key={c} class={typeof cell === "string" ? "" : "number"}>
                    {typeof cell === "number" ? exact(cell) : (cell ?? "–")}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  );
}

/** A number, or a word: of a mask there is none. */
function told(field: string, value: number): number | string {
  return field === "mask" ? "may attend" : value;
}

interface Found {
  pairs: Pair[];
  axes: Axes;
  field: string;
  /** Which heads. */
  what: string;
  /** Why the pair that is selected has no number. */
  blank: string | null;
}

function summary(
  { pairs, axes, field, what, blank }: Found,
  query: number | null,
  key: number | null,
): string {
  const of = what[0]!.toUpperCase() + what.slice(1);
  const pair = (query: number, key: number) => `${name(axes.queries, query)} → ${name(axes.keys, key)}`;
  if (blank !== null) return `${of}, ${pair(query!, key!)}: ${blank}`;
  const first = pairs[0];
  if (first === undefined) return `${of}: nothing is attended to here`;
  const value = told(field, first.value);
  const cell = `${pair(first.query, first.key)}: ${typeof value === "string" ? value : `${field} ${exact(value)}`}`;
  if (query !== null && key !== null) return `${of}, ${cell}`;
  const among =
    query !== null
      ? `the keys of ${name(axes.queries, query)}`
      : key !== null
        ? `the queries of ${name(axes.keys, key)}`
        : "all pairs";
  return `${of}, ${field === "mask" ? "first" : "strongest"} of ${among}: ${cell}`;
}

/** The largest values of a row, a column, one cell, or of all, the largest first. */
export async function strongest(matrix: Matrix, query: number | null, key: number | null, slices: Slices): Promise<Pair[]> {
  const found: Pair[] = [];
  const rows = query === null ? [0, matrix.rows] : [query, query + 1];
  const cols = key === null ? [0, matrix.cols] : [key, key + 1];
  let least = -Infinity;
  for (let t = rows[0]!; t < rows[1]!; t++) {
    for (let s = cols[0]!; s < cols[1]!; s++) {
      const value = at(matrix, t, s);
      if (!(value > least)) continue;
      found.push({ query: t, key: s, value });
      if (found.length >= 4 * ROWS) {
        found.sort((a, b) => b.value - a.value).length = ROWS;
        least = found[ROWS - 1]!.value;
      }
    }
    await slices.turn();
  }
  return found.sort((a, b) => b.value - a.value).slice(0, ROWS);
}
