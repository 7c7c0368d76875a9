/** A trace as the views read it: its calls at once, its numbers one head at a time, when they are looked at. */
import { work } from "../crew";
import { FieldAbsent, NotCaptured, ViewerError } from "../errors";
import { Lru, once } from "../lru";
import type { Source } from "../source/source";
import { type Call, kvHead, where } from "./call";
import { describeCalls } from "./describe";
import { derived, type Terms } from "./derive";
import { type Coding, type Entry, readHeader, type TraceDocument } from "./document";
import { CODINGS, DTYPES, type Numbers, SQRT8_LESS, together } from "./dtypes";
import { absent, OPTIONAL } from "./kinds";
import type { Matrix } from "./matrix";

/** Terms that are stored as small as they are, and read at the extents of the call. */
const BROADCAST: ReadonlySet<string> = new Set(["mask", "bias", "scale"]);
/** Bytes of decoded heads that are kept: a few of 4096 × 4096 float32. */
const CACHE = 256 * 2 ** 20;

/** Numbers in the first part of a large head: enough for the eye, and soon there; and of small heads that are read together. */
const PART = 2 ** 20;
/** Fields of which, sooner or later, all heads are wanted, each of them small. */
const SMALL: ReadonlySet<string> = new Set(["q", "k"]);
/** Products of numbers of q and k that one worker makes at once; and up to which it is done before a worker had it. */
const [WORK, AT_ONCE] = [2 ** 26, 2 ** 18];

/** The head of what is stored that a query head reads. */
function heldBy(call: Call, field: string, head: number): number {
  return field === "k" || field === "v" ? kvHead(call, head) : head;
}

/** Queries from the first to before the last. */
export type Range = readonly [number, number];

export interface Tensor {
  shape: number[];
  data: Numbers;
}

export class Trace {
  readonly calls: Call[];
  private readonly cache = new Lru<Promise<Matrix>>(CACHE);
  private readonly groups = new Lru<Promise<Numbers>>(CACHE / 8);

  private constructor(
    readonly source: Source,
    readonly document: TraceDocument,
    readonly entries: ReadonlyMap<string, Entry>,
  ) {
    this.calls = describeCalls(document.calls, entries);
  }

  static async open(source: Source): Promise<Trace> {
    const { document, entries } = await readHeader(source);
    return new Trace(source, document, entries);
  }

  /**
   * Whether a field can be had: stored, or derived from what is stored. `null` (no bias, no sinks) counts as had, but of
   * what every product of queries and keys has (q, k, scores) it says that this call is none.
   */
  has(call: Call, field: string): boolean {
    if (field in call.fields) return call.fields[field] !== null || OPTIONAL.has(field);
    return call.derivable.includes(field) && (field === "scores" || field === "weights");
  }

  /** How the stored numbers of a field were narrowed, or null. */
  coding(call: Call, field: string): Coding | null {
    return this.document.coding?.[call.fields[field] ?? ""] ?? null;
  }

  /**
   * One head of a field, `head` counted among those stored: q T×D, k S×D, v S×E, output T×E, scores, weights, mask
   * and bias T×S.
   * A large one calls `show` once with its first rows, while the rest is read or derived.
   * Throws NotCaptured; for a field that the call has none of (bias null), use `optional`.
   */
  head(call: Call, field: string, batch: number, head: number, show?: (part: Matrix) => void): Promise<Matrix> {
    const name = call.fields[field];
    const make = () =>
      name == null
        ? this.derive(call, field, batch, head, [[0, call.extents.T]], show)
        : this.stored(call, field, name, batch, heldBy(call, field, head), show);
    return once(this.cache, this.keyOf(call, field, batch, head), make, (matrix) => matrix.data.byteLength);
  }

  /**
   * Calls and heads may share what is stored (a mask of all layers), which is read once, for each size it is expanded to.
   */
  private keyOf(call: Call, field: string, batch: number, head: number): string {
    const { T, S } = call.extents;
    const name = call.fields[field];
    if (name == null) return `${call.index} ${field} ${batch} ${head}`;
    return `${name} ${place(this.entry(name), batch, heldBy(call, field, head)).start} ${T} ${S}`;
  }

  /** As `head`, or null where the call has no such term. */
  async optional(call: Call, field: string, batch: number, head: number): Promise<Matrix | null> {
    if (call.fields[field] === null) return null;
    return this.head(call, field, batch, head);
  }

  /**
   * One query of q, output, scores, weights, mask or bias, 1 × its columns, or null where the call has no such term.
   * Nothing else is read.
   */
  row(call: Call, field: string, batch: number, head: number, query: number): Promise<Matrix | null> {
    return this.rows(call, field, batch, head, [query, query + 1]);
  }

  /** The same of the queries of some ranges, one after the other. */
  async rows(call: Call, field: string, batch: number, head: number, ...ranges: Range[]): Promise<Matrix | null> {
    const name = call.fields[field];
    if (name === null) return null;
    const [[first, end]] = ranges as [Range];
    const all = ranges.length === 1 && first === 0 && end === call.extents.T;
    const known = this.cache.get(this.keyOf(call, field, batch, head));
    if (known !== undefined || all || (SMALL.has(field) && ranges.length > 1)) {
      // What was read, or is being read, is not read again.
      const whole = await this.head(call, field, batch, head);
      const { cols, data } = whole;
      return all ? whole : stacked(ranges.map(([a, b]) => ({ rows: b - a, cols, data: data.subarray(a * cols, b * cols) })));
    }
    return name === undefined
      ? this.derive(call, field, batch, head, ranges)
      : stacked(await Promise.all(ranges.map((range) => this.storedRows(call, field, name, batch, head, range))));
  }

  /** The error for a field that is not here. */
  lacks(field: string, call: Call): ViewerError {
    const why = absent(call, field);
    return why === null
      ? new NotCaptured(field, where(call), this.document.left_out?.includes(field) ?? false)
      : new FieldAbsent(field, where(call), why);
  }

  /** The learned logits that join the softmax of a head: one, or one a row; null if there are none. */
  async sinks(call: Call, batch: number, head: number): Promise<Numbers | null> {
    const name = call.fields["sinks"];
    if (name === null) return null;
    if (name === undefined) throw this.lacks("sinks", call);
    const { shape, data } = await this.tensor(name);
    if (shape.length === 1) return data.slice(head, head + 1);
    const [b, h, t] = [shape.at(-4) ?? 1, shape.at(-3) ?? 1, shape.at(-2) ?? 1];
    const start = ((b > 1 ? batch : 0) * h + (h > 1 ? head : 0)) * t;
    return data.slice(start, start + t);
  }

  /** A whole tensor, by its name in the file: statistics and other small things. */
  async tensor(name: string): Promise<Tensor> {
    const entry = this.entry(name);
    return { shape: entry.shape, data: await this.numbers(name, entry, 0, count(entry.shape)) };
  }

  private entry(name: string): Entry {
    const entry = this.entries.get(name);
    if (entry === undefined)
      throw new ViewerError(`${this.source.name}: the document names a tensor “${name}” that is not in the file.`);
    return entry;
  }

  /** Elements `first` to `end` of a tensor, as numbers; `follow`: what its weights are by q and k, where it lacks that. */
  private async numbers(name: string, entry: Entry, first: number, end: number, follow?: Numbers): Promise<Numbers> {
    const { dtype, begin, shape } = entry;
    const type = DTYPES[dtype];
    if (type === undefined) throw new ViewerError(`“${name}” has the dtype ${dtype}, unknown to this viewer.`);
    const bytes = await this.source.read(begin + first * type.size, begin + end * type.size);
    const coding = this.document.coding?.[name];
    if (coding === undefined) return type.decode(bytes);
    let codes = new Uint8Array(bytes);
    if (follow !== undefined) codes = together(codes, follow) as typeof codes;
    const decode = CODINGS[follow === undefined ? coding.kind : "sqrt8"];
    if (decode === undefined)
      throw new ViewerError(`“${name}” is coded as “${coding.kind}”, which this viewer does not know.`);
    return decode(codes, coding, shape, first);
  }

  /** What q and k make of weights that are stored without it. */
  private async follow(call: Call, field: string, batch: number, head: number, range: Range): Promise<Matrix | null> {
    return this.coding(call, field)?.kind === SQRT8_LESS ? this.derive(call, field, batch, head, [range]) : null;
  }

  private async stored(
    call: Call,
    field: string,
    name: string,
    batch: number,
    head: number,
    show?: (part: Matrix) => void,
  ): Promise<Matrix> {
    const entry = this.entry(name);
    const { start, rows, cols } = place(entry, batch, head);
    if (SMALL.has(field)) return { rows, cols, data: await this.together(name, entry, batch, head) };
    const follow = (await this.follow(call, field, batch, head, [0, call.extents.T]))?.data;
    const read = (from: number, to: number) =>
      this.numbers(name, entry, start + from * cols, start + to * cols, follow?.subarray(from * cols, to * cols));
    const first = Math.ceil(PART / cols);
    const whole = show === undefined || rows < 2 * first ? read(0, rows) : inParts(read, first, rows, cols, show);
    const stored = { rows, cols, data: await whole };
    return BROADCAST.has(field) ? expand(stored, call.extents.T, call.extents.S) : stored;
  }

  private async storedRows(
    call: Call,
    field: string,
    name: string,
    batch: number,
    head: number,
    [first, end]: Range,
  ): Promise<Matrix> {
    const entry = this.entry(name);
    const { start, rows, cols } = place(entry, batch, head);
    const count = rows > 1 ? end - first : 1;
    const from = start + (rows > 1 ? first * cols : 0);
    const follow = (await this.follow(call, field, batch, head, [first, end]))?.data;
    const stored = { rows: count, cols, data: await this.numbers(name, entry, from, from + count * cols, follow) };
    return BROADCAST.has(field) ? expand(stored, end - first, call.extents.S) : stored;
  }

  /** One of several heads that are read in one request. */
  private async together(name: string, entry: Entry, batch: number, head: number): Promise<Numbers> {
    const { start, rows, cols } = place(entry, batch, head);
    const each = Math.max(1, Math.floor(PART / (rows * cols)));
    const first = head - (head % each);
    const end = Math.min(entry.shape.at(-3) ?? 1, first + each);
    const from = place(entry, batch, first).start;
    const make = () => this.numbers(name, entry, from, from + (end - first) * rows * cols);
    const known = await once(this.groups, `${name} ${batch} from ${first}`, make, (data) => data.byteLength);
    return known.subarray(start - from, start - from + rows * cols);
  }

  /** The rows of some queries, one range after the other; of many the first are shown while the rest is made. */
  private async derive(
    call: Call,
    field: string,
    batch: number,
    head: number,
    ranges: readonly Range[],
    show?: (part: Matrix) => void,
  ): Promise<Matrix> {
    if (!this.has(call, field) || call.fields[field] === null) throw this.lacks(field, call);
    const soft = field === "weights";
    const stored = soft && call.fields["scores"] != null;
    const part = async (of: string) => (await this.rows(call, of, batch, head, ...ranges))?.data ?? null;
    const [scores, q, k, bias, mask, sinks, scale] = await Promise.all([
      stored ? part("scores") : null,
      stored ? null : part("q"),
      stored ? null : this.head(call, "k", batch, head),
      stored ? null : part("bias"),
      soft ? part("mask") : null,
      soft ? this.sinks(call, batch, head) : null,
      stored ? 1 : this.scale(call, batch, head, ranges),
    ]);
    const keys = call.extents.S;
    const rows = ranges.reduce((n, [first, end]) => n + end - first, 0);
    const own = sinks === null || sinks.length === 1 ? sinks : cut(sinks, ranges);
    const terms = (from: number, to: number): Terms => {
      const some = (of: Numbers | null, cols = keys) => of && of.subarray(from * cols, to * cols);
      return {
        rows: to - from,
        keys,
        field: soft ? "weights" : "scores",
        of: stored ? { scores: some(scores)! } : { q: some(q, k!.cols)!, k: k!.data },
        scale: typeof scale === "number" ? scale : some(scale.data)!,
        softcap: call.softcap,
        bias: some(bias),
        mask: some(mask),
        sinks: own === null || own.length === 1 ? own : own.subarray(from, to),
      };
    };
    const each = keys * (stored ? 1 : k!.cols);
    // Sending a little of it would take longer than making it.
    if (rows * each <= AT_ONCE) return { rows, cols: keys, data: derived(terms(0, rows)) };
    const step = Math.max(2, 2 * Math.floor(WORK / each / 2));
    if (rows <= step) return { rows, cols: keys, data: await work("derived", terms(0, rows)) };
    const whole = { rows, cols: keys, data: new ((q ?? scores) instanceof Float64Array ? Float64Array : Float32Array)(rows * keys) };
    const blocks: { to: number; made: Promise<Numbers> }[] = [];
    // What is asked for last is done first (crew.ts).
    for (let from = step * (Math.ceil(rows / step) - 1); from >= 0; from -= step) {
      const to = Math.min(rows, from + step);
      blocks.unshift({ to, made: work("derived", terms(from, to)) });
    }
    const first = PART / keys;
    let shown = rows < 2 * first;
    let from = 0;
    for (const { to, made } of blocks) {
      whole.data.set(await made, from * keys);
      from = to;
      if (shown || show === undefined || to < first) continue;
      shown = true;
      const some = new (whole.data.constructor as Float64ArrayConstructor)(rows * keys);
      some.set(whole.data.subarray(0, to * keys));
      show({ ...whole, data: some, there: to });
    }
    return whole;
  }

  /** The kernel's factor on q·kᵀ, for one head: a number, or the rows of some queries. */
  async scale(call: Call, batch: number, head: number, ranges: readonly Range[]): Promise<number | Matrix> {
    if (typeof call.scale === "number") return call.scale;
    const { tensor } = call.scale;
    return stacked(await Promise.all(ranges.map((range) => this.storedRows(call, "scale", tensor, batch, head, range))));
  }
}

/** Rows 0 to `rows`: the first ones are shown before the others are there. */
async function inParts(
  read: (from: number, to: number) => Promise<Numbers>,
  first: number,
  rows: number,
  cols: number,
  show: (part: Matrix) => void,
): Promise<Numbers> {
  const [top, rest] = [read(0, first), read(first, rows)];
  // Should the first part fail, its error is the one that is told.
  rest.catch(() => undefined);
  const head = await top;
  const data = new (head.constructor as Float64ArrayConstructor)(rows * cols);
  data.set(head);
  show({ rows, cols, data, there: first });
  const tail = await rest;
  // The first part may still be being pooled for the screen: what it reads is not to change meanwhile.
  const whole = data.slice();
  whole.set(tail, first * cols);
  return whole;
}

/** Rows of several ranges as one matrix. */
function stacked(parts: readonly Matrix[]): Matrix {
  const [first] = parts as [Matrix];
  if (parts.length === 1) return first;
  const rows = parts.reduce((n, part) => n + part.rows, 0);
  const data = new (first.data.constructor as Float64ArrayConstructor)(rows * first.cols);
  let at = 0;
  for (const part of parts) {
    data.set(part.data, at);
    at += part.data.length;
  }
  return { rows, cols: first.cols, data };
}

function cut(data: Numbers, ranges: readonly Range[]): Numbers {
  return stacked(ranges.map(([first, end]) => ({ rows: end - first, cols: 1, data: data.subarray(first, end) }))).data;
}

/** Where a head begins among the elements of a tensor, and its rows and columns. */
function place({ shape }: Entry, batch: number, head: number): { start: number; rows: number; cols: number } {
  const [b, h, rows, cols] = [4, 3, 2, 1].map((i) => shape.at(-i) ?? 1) as [number, number, number, number];
  return { start: ((b > 1 ? batch : 0) * h + (h > 1 ? head : 0)) * rows * cols, rows, cols };
}

function count(shape: number[]): number {
  return shape.reduce((a, b) => a * b, 1);
}

/** A broadcast matrix at its full extents. */
function expand(matrix: Matrix, rows: number, cols: number): Matrix {
  if (matrix.rows === rows && matrix.cols === cols) return matrix;
  const data = new (matrix.data.constructor as Float64ArrayConstructor)(rows * cols);
  for (let r = 0; r < rows; r++) {
    const from = (matrix.rows > 1 ? r : 0) * matrix.cols;
    const row = matrix.data.subarray(from, from + matrix.cols);
    if (matrix.cols > 1) data.set(row, r * cols);
    else data.fill(row[0]!, r * cols, (r + 1) * cols);
  }
  return { rows, cols, data };
}
