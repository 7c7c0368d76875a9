/** Heads made small: the largest of what falls together, a few at a time, and kept. */
import { Lru } from "../lru";
import { rangeOf } from "../scale";
import { Slices } from "../slices";
import type { Filter, Sink } from "../state";
import type { Call } from "./call";
import { axesOf } from "./labels";
import type { Matrix } from "./matrix";
import { poolTo, pooling } from "./pool";
import { firstOf, presented } from "./presented";
import { shownHead } from "./shown";
import type { Trace } from "./trace";

export interface Thumbnail {
  matrix: Matrix;
  /** Of the whole head, not of what is left when it is made small: its smallest and largest, and where its colours end. */
  extent: [number, number];
  end: number;
}

/** Heads that are read at the same time: a large one takes long, and the cache holds only a few. */
const AT_ONCE = 3;
const CACHE = 32 * 2 ** 20;

const kept = new WeakMap<Trace, Lru<Thumbnail>>();
let running = 0;
const waiting: (() => void)[] = [];

/** `head` counted among those stored; at most `size` rows and columns. */
export async function thumbnail(
  trace: Trace,
  call: Call,
  field: string,
  batch: number,
  head: number,
  sink: Sink,
  filter: Filter,
  size: number,
  signal: AbortSignal,
): Promise<Thumbnail> {
  const key = [call.index, field, batch, head, sink, filter, size].join(" ");
  let cache = kept.get(trace);
  if (cache === undefined) kept.set(trace, (cache = new Lru(CACHE)));
  const known = cache.get(key);
  if (known !== undefined) return known;
  await turn();
  try {
    signal.throwIfAborted();
    const read = await shownHead(trace, call, field, batch, head);
    const whole = presented(read.matrix, field, sink, filter, axesOf(trace, call, batch));
    const matrix = await poolTo(whole, size, size, new Slices(8, signal), pooling(call, field));
    // A small head is its own thumbnail, and not to be kept a second time.
    const { low, high, end } = await rangeOf(whole, firstOf(read.matrix, field, sink), new Slices(8, signal));
    const made: Thumbnail = {
      matrix: matrix === whole ? { ...matrix, data: matrix.data.slice() } : matrix,
      extent: [low, high],
      end: field === "scores" ? Infinity : end,
    };
    cache.set(key, made, made.matrix.data.byteLength);
    return made;
  } finally {
    running--;
    waiting.shift()?.();
  }
}

async function turn(): Promise<void> {
  while (running >= AT_ONCE) await new Promise<void>((resolve) => waiting.push(resolve));
  running++;
}
