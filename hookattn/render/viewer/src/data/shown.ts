/** A head as views draw it: without the numbers of masked entries, which no softmax sees and which weigh nothing. */
import type { Call } from "./call";
import { at, type Matrix, thereOf } from "./matrix";
import type { Trace } from "./trace";

export interface Shown {
  /** What is drawn; NaN where an entry is masked. */
  readonly matrix: Matrix;
  /** All numbers of the field. */
  readonly whole: Matrix;
  /** Whether masked entries are told apart. */
  readonly masks: boolean;
}

/** As `Trace.head`. */
export async function shownHead(
  trace: Trace,
  call: Call,
  field: string,
  batch: number,
  head: number,
  show?: (part: Shown) => void,
): Promise<Shown> {
  if (field === "mask" || !trace.has(call, "mask")) {
    const plain = (whole: Matrix): Shown =>
      field === "mask" ? without(whole, whole, field) : { matrix: whole, whole, masks: false };
    return plain(await trace.head(call, field, batch, head, show && ((part) => show(plain(part)))));
  }
  const mask = trace.optional(call, "mask", batch, head);
  const early = show && ((part: Matrix) => void mask.then((m) => show(without(part, m, field)), () => undefined));
  const [whole, may] = await Promise.all([trace.head(call, field, batch, head, early), mask]);
  return without(whole, may, field);
}

/** One query of it, 1 × keys. */
export async function shownRow(
  trace: Trace,
  call: Call,
  field: string,
  batch: number,
  head: number,
  query: number,
): Promise<Shown> {
  const has = field !== "mask" && trace.has(call, "mask");
  const [whole, may] = await Promise.all([
    trace.row(call, field, batch, head, query),
    has ? trace.row(call, "mask", batch, head, query) : null,
  ]);
  return without(whole!, field === "mask" ? whole : may, field);
}

/** A weight that is not 0 is shown though its entry is masked: an edit has set it, or the mask is not the kernel's. */
function without(whole: Matrix, mask: Matrix | null, field: string): Shown {
  if (mask === null || !mask.data.includes(0 as never)) return { matrix: whole, whole, masks: false };
  const data = new (whole.data instanceof Float64Array ? Float64Array : Float32Array)(whole.data.length);
  const end = thereOf(whole) * whole.cols;
  data.set(whole.data.subarray(0, end));
  const all = field === "scores" || field === "mask";
  for (let i = 0; i < end; i++) if (!mask.data[i] && (all || data[i] === 0)) data[i] = NaN;
  return { matrix: { ...whole, data }, whole, masks: true };
}

/** Why an entry of what is presented has no number. */
export function absence({ matrix, masks }: Pick<Shown, "matrix" | "masks">, query: number, key: number): string {
  if (query >= thereOf(matrix)) return "being read";
  return masks && Number.isNaN(at(matrix, query, key)) ? "masked" : "left out";
}
