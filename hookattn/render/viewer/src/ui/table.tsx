/** The current selection as text: a sentence for a screen reader, and a table of its strongest pairs. */
import { type App, current, focus, stored } from "../app";
import { type Axes, type Axis } from "../data/labels";
import { fieldOf, mayBeNegative } from "../data/kinds";
import { at, type Matrix } from "../data/matrix";
import { presented } from "../data/presented";
import { shownHead } from "../data/shown";
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
  return label === undefined ? String(i) : axis.named ? `${axis.positions[i]} “${label.text}”` : label.text;
}

export function Table({ app }: { app: App }) {
  const state = app.state.value;
  const { call, axes } = current(app);
  const head = focus(state);
  const { query, key, sink, filter, batch } = state;
  const field = fieldOf(call, state.field);
  const { value } = useLoaded(
    async (signal) => {
      const { matrix: read } = await shownHead(app.trace, call, field, batch, stored(call, head));
      const matrix = presented(read, field, sink, filter, axes);
      // Of weights of either sign the strongest are those farthest from 0; scores outscore each other as they are.
      const far = field !== "scores" && mayBeNegative(call, field);
      const sizes = far ? { ...matrix, data: matrix.data.map(Math.abs) } : matrix;
      const found = await strongest(sizes, query, key, new Slices(10, signal));
      const pairs = found.map((p) => ({ ...p, value: at(matrix, p.query, p.key) }));
      return { pairs, axes, field, head };
    },
    [app, call, head, query, key, field, sink, filter, batch],
  );
  if (value === null) return null;
  return (
    <Tabular
      summary={told(value, query, key)}
      columns={["query", "key", value.field]}
      rows={value.pairs.map((p) => [name(value.axes.queries, p.query), name(value.axes.keys, p.key), p.value])}
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

function told(
  { pairs, axes, field, head }: { pairs: Pair[]; axes: Axes; field: string; head: number },
  query: number | null,
  key: number | null,
): string {
  const first = pairs[0];
  if (first === undefined) return `Head ${head}: nothing is attended to here`;
  const cell = `${name(axes.queries, first.query)} → ${name(axes.keys, first.key)}: ${field} ${exact(first.value)}`;
  if (query !== null && key !== null) return `Head ${head}, ${cell}`;
  const of =
    query !== null
      ? `the keys of ${name(axes.queries, query)}`
      : key !== null
        ? `the queries of ${name(axes.keys, key)}`
        : "all pairs";
  return `Head ${head}, strongest of ${of}: ${cell}`;
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
