/** What the parts of the overview share: the chosen head as a matrix, and the pair of tokens that is told of. */
import { useMemo } from "preact/hooks";
import { type App, current, focus, stored } from "../../app";
import type { Call } from "../../data/call";
import { weightsOf } from "../../data/kinds";
import { axesOf } from "../../data/labels";
import { type Matrix, thereOf } from "../../data/matrix";
import { difference, misfit, twinOf } from "../../data/pairs";
import { type Pyramid, pooling, pyramid } from "../../data/pool";
import { firstOf, presented } from "../../data/presented";
import { roleOf } from "../../data/rolewords";
import { columnOf, generation, readSheet, rowOf, type Sheet, sheetOf } from "../../data/sheet";
import type { Shown } from "../../data/shown";
import type { Trace } from "../../data/trace";
import type { Findings, HeadFound } from "../../findings";
import { type Range, rangeOf } from "../../scale";
import { Slices } from "../../slices";
import { placeOf } from "../../state";
import { useLoaded } from "../hooks";

/** The numbers of a head, ready to be drawn. */
export interface Numbers {
  readonly matrix: Matrix;
  readonly levels: Pyramid;
  readonly range: Range;
  /** Whether some entries are masked, or left out. */
  readonly masked: boolean;
  readonly left: boolean;
  /** The two matrices that this is the difference of. */
  readonly of: readonly [Matrix, Matrix] | null;
}

interface Read {
  readonly sheet: Sheet;
  readonly numbers: Numbers;
}

export interface Scene {
  readonly trace: Trace;
  /** The call of `trace`, its twin where the other trace is shown. */
  readonly call: Call;
  readonly other: { readonly trace: Trace; readonly call: Call } | null;
  readonly head: number;
  readonly batch: number;
  readonly field: "weights" | "applied";
  readonly sheet: Sheet;
  readonly found: HeadFound | null;
  readonly numbers: Numbers | null;
  /** What cannot be shown, and why. */
  readonly error: string | null;
  /** Whether the numbers are not yet all that is asked for. */
  readonly reading: boolean;
  /** What is told of: locked by the reader, else the pair that shows the head best. */
  readonly row: number | null;
  readonly column: number | null;
  pick(row: number | null, column: number | null): void;
}

/** Numbers of a head that takes a second. */
const LARGE = 2 ** 22;

export function isLarge({ extents: { T, S } }: Call): boolean {
  return T * S > LARGE;
}

export function useScene(app: App, findings: Findings): Scene {
  const state = app.state.value;
  const { batch, sink, filter, over } = state;
  const { call: own } = current(app);
  const head = focus(state);
  const side = app.other === null ? "a" : state.side;
  const twin = useMemo(() => (app.other === null ? null : twinOf(app.trace, app.other, own)), [app, own]);
  const [trace, call] = side === "b" && twin !== null ? [app.other!, twin] : [app.trace, own];
  const field = weightsOf(call, state.field);
  const begun = useMemo(() => generation(trace, call)[0]!, [trace, call]);
  const sheet = useMemo(() => sheetOf(trace, begun, Math.min(batch, begun.extents.B - 1), [head]), [trace, begun, batch, head]);
  const missing = whyNot(app, trace, call, head, side, twin, field);
  // A large head that nobody has chosen is not read only to be left for the one that is found to be striking.
  const { done, total, striking, missing: unknown } = findings;
  const coming = striking !== null || done < total || total === 0;
  const wait = !app.chosen.value && !app.led.value && isLarge(own) && unknown === null && coming;
  const { value, error, stale } = useLoaded(
    async (signal, show: (made: Read | null) => void): Promise<Read | null> => {
      if (missing !== null || wait) return null;
      const slices = new Slices(10, signal);
      const here = (of: Call) => Math.min(batch, of.extents.B - 1);
      const make = async ({ matrix: read, masks }: Shown, of: Numbers["of"] = null): Promise<Read> => {
        const matrix = of === null ? presented(read, field, sink, filter, sheet.axes) : read;
        const levels = await pyramid(matrix, of === null ? pooling(call, field) : "far", slices);
        const range = await rangeOf(matrix, firstOf(read, field, sink), slices);
        return { sheet, numbers: { matrix, levels, range, masked: masks, left: matrix !== read, of } };
      };
      if (side !== "difference") {
        const early = (part: Shown) => void make(part).then(show, () => undefined);
        return make(await readSheet(trace, sheet, field, here(call), state.heads, over, slices, early));
      }
      const others = sheetOf(app.other!, generation(app.other!, twin!)[0]!, here(twin!), [head]);
      const [a, b] = await Promise.all([
        readSheet(app.trace, sheet, field, here(own), state.heads, over, slices),
        readSheet(app.other!, others, field, here(twin!), state.heads, over, slices),
      ]);
      const [one, two] = [a, b].map(({ matrix }) => presented(matrix, field, sink, filter, sheet.axes)) as [Matrix, Matrix];
      const apart = difference(one, two, true);
      return make({ matrix: apart, whole: apart, masks: a.masks || b.masks }, [one, two]);
    },
    [app, sheet, side, twin, missing, wait, field, batch, state.heads.join(), over, sink, filter],
  );
  // While another head is read, the one before is not shown under its name.
  const numbers = value !== null && value.sheet === sheet ? value.numbers : null;
  const found = foundOf(findings, sheet, call, head);
  const [row, column] = useMemo(
    () => pairOf(app, sheet, call, found, numbers?.matrix ?? null),
    [app, findings, sheet, call, found, numbers, state.query, state.key, state.role, batch],
  );
  return {
    trace,
    call,
    other: side === "difference" && twin !== null ? { trace: app.other!, call: twin } : null,
    head,
    batch: Math.min(batch, call.extents.B - 1),
    field,
    sheet,
    found,
    numbers,
    error: missing ?? error,
    reading: stale,
    row,
    column,
    pick(row, column) {
      app.chosen.value = true;
      if (row === null && column === null) return app.set({ query: null, key: null });
      const at = row === null ? null : sheet.rows[row]!;
      // Of the other trace, places are those of the twins.
      const place = at === null || side === "b" ? {} : placeOf(app.trace, at.call);
      const of = at?.call ?? call;
      const key = column === null ? null : column + sheet.first - of.place.first;
      app.set({ ...place, query: at?.query ?? null, key: key === null || key < 0 || key >= of.extents.S ? null : key });
    },
  };
}

function whyNot(
  app: App,
  trace: Trace,
  call: Call,
  head: number,
  side: string,
  twin: Call | null,
  field: string,
): string | null {
  if (side !== "a" && twin === null) return `${app.other!.source.name} has no attention at this place.`;
  if (side !== "a" && !twin!.headNumbers.includes(head))
    return `${app.other!.source.name} does not have head ${head} here: it has ${twin!.headNumbers.join(", ")}.`;
  if (!trace.has(call, field)) return trace.lacks(field, call).message;
  if (side !== "difference") return null;
  if (!app.other!.has(twin!, field)) return app.other!.lacks(field, twin!).message;
  const reason = misfit(call, twin!);
  return reason === null ? null : `There is no difference to draw: ${reason}.`;
}

/** What is found of the head; of a generation, what is found of the step that tells most. */
function foundOf(findings: Findings, sheet: Sheet, call: Call, head: number): HeadFound | null {
  const of = (c: Call) => findings.heads[c.index]?.[stored(c, head)] ?? null;
  const calls = [call, ...sheet.calls.toSorted((a, b) => b.extents.T - a.extents.T)];
  return calls.map(of).find((f) => f !== null && f.roles.length > 0) ?? of(call);
}

function pairOf(
  app: App,
  sheet: Sheet,
  call: Call,
  found: HeadFound | null,
  matrix: Matrix | null,
): [number | null, number | null] {
  const { query, key, role, batch } = app.state.peek();
  const axes = axesOf(app.trace, call, batch);
  const row = query === null ? -1 : rowOf(sheet, call, Math.min(query, axes.queries.labels.length - 1));
  const column = key === null ? null : columnOf(sheet, call, key);
  if (row >= 0) return [row, column ?? (matrix === null ? null : strongestOf(matrix, row))];
  if (column !== null) return [matrix === null ? null : strongestIn(matrix, column), column];
  // A step that was gone to is what is told of.
  if (call !== sheet.calls[0]) {
    const last = rowOf(sheet, call, call.extents.T - 1);
    return [last, matrix === null ? null : strongestOf(matrix, last)];
  }
  const pair = (roleOf(found, role) ?? roleOf(found, ""))?.pair;
  if (pair != null && pair.batch === batch && found !== null) {
    const at = sheet.calls.find((c) => c.index === found.call);
    const shown = at === undefined ? -1 : rowOf(sheet, at, pair.query);
    if (shown >= 0) return [shown, columnOf(sheet, at!, pair.key)];
  }
  return matrix === null ? [null, null] : telling(matrix);
}

function strongestOf(matrix: Matrix, row: number): number | null {
  if (row >= thereOf(matrix)) return null;
  const { cols, data } = matrix;
  let best = 0;
  for (let s = 0; s < cols; s++) {
    const [x, y] = [data[row * cols + s]!, data[row * cols + best]!];
    if (!(Math.abs(x) <= Math.abs(y)) && x === x) best = s;
  }
  return best;
}

function strongestIn({ rows, cols, data }: Matrix, column: number): number {
  let best = 0;
  for (let t = 0; t < rows; t++) {
    const [x, y] = [data[t * cols + column]!, data[best * cols + column]!];
    if (!(Math.abs(x) <= Math.abs(y)) && x === x) best = t;
  }
  return best;
}

/** Keys that a row needs for its strongest to say something. */
const ENOUGH = 4;

const told = new WeakMap<Matrix, [number, number | null]>();

/** The strongest pair, but for the first key, where attention rests, and rows that have hardly a choice. */
function telling(matrix: Matrix): [number, number | null] {
  let known = told.get(matrix);
  if (known === undefined) told.set(matrix, (known = mostTelling(matrix)));
  return known;
}

function mostTelling(matrix: Matrix): [number, number | null] {
  const { cols, data } = matrix;
  const rows = thereOf(matrix);
  let best = -1;
  for (let t = Math.min(ENOUGH, rows - 1); t < rows; t++)
    for (let s = Math.min(1, cols - 1); s < cols; s++) {
      const x = Math.abs(data[t * cols + s]!);
      // Of equal ones the later, of which there is more to tell.
      if (x > 0 && !(x < Math.abs(data[best]!))) best = t * cols + s;
    }
  if (best >= 0) return [Math.floor(best / cols), best % cols];
  return [rows - 1, strongestOf(matrix, rows - 1)];
}
