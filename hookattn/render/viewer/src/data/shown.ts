/** A head as views draw it: scores without those of masked entries, which no softmax sees. */
import type { Call } from "./call";
import type { Matrix } from "./matrix";
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
  const hides = field === "scores" && trace.has(call, "mask");
  if (!hides) {
    const plain = (whole: Matrix): Shown => ({ matrix: whole, whole, masks: false });
    return plain(await trace.head(call, field, batch, head, show && ((part) => show(plain(part)))));
  }
  const mask = trace.optional(call, "mask", batch, head);
  const early = show && ((part: Matrix) => void mask.then((m) => show(without(part, m)), () => undefined));
  const [whole, may] = await Promise.all([trace.head(call, field, batch, head, early), mask]);
  return without(whole, may);
}

function without(whole: Matrix, mask: Matrix | null): Shown {
  if (mask === null || !mask.data.some((x) => x === 0)) return { matrix: whole, whole, masks: false };
  const data = whole.data instanceof Float64Array ? whole.data.slice() : Float32Array.from(whole.data);
  for (let i = 0; i < data.length; i++) if (!mask.data[i]) data[i] = NaN;
  return { matrix: { ...whole, data }, whole, masks: true };
}
