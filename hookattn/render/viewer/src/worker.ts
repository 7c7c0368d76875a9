/** Measuring beside the page: in a worker, or, where there are none, in slices between what the page has to do. */
import { type Context, measure, STRIDE } from "./data/measured";
import { Slices } from "./slices";

export interface Measurer {
  /** Sums of some rows of a head; `data` may be given away. */
  measure(data: Float32Array | Float64Array, rows: Int32Array, S: number, context: Context): Promise<Float64Array>;
  stop(): void;
}

// Contexts are as large as what they are of, and the same for all heads of a call: they are sent once.
const PROGRAM = `const measure = ${measure.toString()}, contexts = new Map();
onmessage = ({ data: { id, of, context, data, rows, S } }) => {
  if (context) { if (contexts.size > 3) contexts.clear(); contexts.set(of, context); }
  try { postMessage({ id, out: measure(data, rows, S, contexts.get(of)) }); }
  catch (error) { postMessage({ id, error: String(error) }); }
};`;

export function measurer(): Measurer {
  let url = "";
  try {
    url = URL.createObjectURL(new Blob([PROGRAM], { type: "text/javascript" }));
    return inWorker(new Worker(url), () => URL.revokeObjectURL(url));
  } catch {
    if (url) URL.revokeObjectURL(url);
    return onPage();
  }
}

function inWorker(worker: Worker, done: () => void): Measurer {
  const waiting = new Map<number, { settle(out: Float64Array): void; again(): void }>();
  const plain = onPage();
  const numbers = new WeakMap<Context, number>();
  let [calls, contexts] = [0, 0];
  let broken = false;
  let sent: number[] = [];
  worker.onmessage = ({ data: { id, out } }: MessageEvent<{ id: number; out?: Float64Array }>) => {
    const one = waiting.get(id);
    waiting.delete(id);
    if (out === undefined) one?.again();
    else one?.settle(out);
  };
  // A policy of the page may forbid what the browser knows how to do: it is done here, then.
  worker.onerror = (event) => {
    event.preventDefault();
    broken = true;
    for (const one of waiting.values()) one.again();
    waiting.clear();
  };
  return {
    measure(data, rows, S, context) {
      if (broken) return plain.measure(data, rows, S, context);
      let of = numbers.get(context);
      if (of === undefined) numbers.set(context, (of = contexts++));
      const known = sent.includes(of);
      if (!known) sent = [...(sent.length > 3 ? [] : sent), of];
      const id = calls++;
      return new Promise((settle, reject) => {
        const again = () => void plain.measure(data, rows, S, context).then(settle, reject);
        waiting.set(id, { settle, again });
        worker.postMessage({ id, of, context: known ? null : context, data, rows, S });
      });
    },
    stop() {
      worker.terminate();
      done();
      waiting.clear();
    },
  };
}

/** So many rows between two breaths. */
const ROWS = 64;

function onPage(): Measurer {
  return {
    async measure(data, rows, S, context) {
      const slices = new Slices();
      let out: Float64Array | null = null;
      for (let r = 0; r < rows.length; r += ROWS) {
        const part = measure(data.subarray(r * S, (r + ROWS) * S), rows.subarray(r, r + ROWS), S, context);
        out = out === null ? part : joined(out, part);
        await slices.turn();
      }
      return out ?? measure(data, rows, S, context);
    },
    stop() {},
  };
}

/** The sums of some rows and of others; of the pairs the better one. */
export function joined(a: Float64Array, b: Float64Array): Float64Array {
  const out = a.slice();
  for (let m = 0; m < out.length; m += STRIDE) {
    out[m]! += b[m]!;
    out[m + 1]! += b[m + 1]!;
    if (b[m + 2]! >= 0 && (out[m + 2]! < 0 || b[m + 4]! > out[m + 4]!)) out.set(b.subarray(m + 2, m + 5), m + 2);
  }
  return out;
}
