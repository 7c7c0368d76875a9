/** How far each head is from the same head of the second trace: a list that sorts, and chooses the head. */
import { useState } from "preact/hooks";
import { type App, current, focus } from "../app";
import { apart, type Row } from "../data/apart";
import type { Trace } from "../data/trace";
import { number } from "../format";
import { Slices } from "../slices";
import { placeOf } from "../state";
import { useLoaded } from "./hooks";

/** Numbers of each trace up to which all layers, or all heads of one, are compared unasked. */
const AT_ONCE = 2 ** 23;

type Order = "place" | "variation" | "largest";

const COLUMNS: readonly [Order, string, string][] = [
  ["place", "head", "Layer and head"],
  ["variation", "variation", "Total variation: half the sum of |A − B| over the keys, the mean over the rows; 0 to 1"],
  ["largest", "largest", "The largest difference of any weight"],
];

export function Distances({ app, other }: { app: App; other: Trace }) {
  const { step, batch, stack, kind } = app.state.value;
  const { call: shown } = current(app);
  const [order, setOrder] = useState<Order>("variation");
  const [all, setAll] = useState(false);
  const calls = app.trace.calls.filter((c) => c.step === step && c.site.stack === stack && c.site.kind === kind);
  const size = calls.reduce((n, c) => n + c.headNumbers.length * c.extents.T * c.extents.S, 0);
  const few = size > AT_ONCE && !all;
  const { T, S } = shown.extents;
  const head = focus(app.state.value);
  const alone = few && shown.headNumbers.length * T * S > AT_ONCE ? head : null;
  const { value, error, stale } = useLoaded(
    async (signal, show: (rows: Row[]) => void) => {
      const rows: Row[] = [];
      for (const call of few ? [shown] : calls) {
        rows.push(...(await apart(app.trace, other, call, "weights", batch, alone, new Slices(10, signal))));
        show([...rows]);
      }
      return rows;
    },
    [app, step, batch, stack, kind, few, few ? shown : null, alone],
  );
  const rows = (value ?? []).toSorted((a, b) =>
    order === "place" ? a.call.index - b.call.index || a.head - b.head : (b[order] || 0) - (a[order] || 0),
  );
  return (
    <div class="distances">
      <div class="told">
        {stale ? "Comparing …" : "How far apart the weights are"}
        {few && (
          <button onClick={() => setAll(true)}>
            all heads
          </button>
        )}
      </div>
      {error !== null && <p class="quiet">{error}</p>}
      <div class="rows">
        <table>
          <thead>
            <tr>
              {COLUMNS.map(([id, text, title]) => (
                <th key={id} scope="col" aria-sort={order !== id ? "none" : id === "place" ? "ascending" : "descending"}>
                  <button class="plain" title={title} onClick={() => setOrder(id)}>
                    {text} {order === id ? (id === "place" ? "↑" : "↓") : ""}
                  </button>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {rows.map((row) => {
              const { call } = row;
              return (
                <tr key={`${call.index} ${row.head}`} aria-current={call === shown && row.head === head}>
                  <td>
                    <button
                      class="plain"
                      aria-label={`${call.site.layer ?? call.site.path}.${row.head}: layer ${call.site.layer ?? call.site.path}, head ${row.head}`}
                      onClick={() => app.set({ ...placeOf(app.trace, call), heads: [row.head] })}
                    >
                      {call.site.layer ?? call.site.path}.{row.head}
                    </button>
                  </td>
                  <td
                    class="number"
                    style={{ background: `linear-gradient(to left, var(--hover) ${100 * (row.variation || 0)}%, transparent 0)` }}
                  >
                    {Number.isNaN(row.variation) ? "–" : number(row.variation)}
                  </td>
                  <td class="number">{number(row.largest)}</td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
    </div>
  );
}
