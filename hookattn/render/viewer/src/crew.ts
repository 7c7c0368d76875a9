/** Work beside the page, in workers; where there are none, on the page itself, between what it has to do. */
import { derived } from "./data/derive";
import { measure } from "./data/measured";
import { Slices } from "./slices";

/** Each needs nothing but its arguments: workers get these functions as text. */
const WORKS = { derived, measure };
type Works = typeof WORKS;
type Name = keyof Works;

interface Job {
  readonly name: Name;
  readonly args: readonly unknown[];
  settle(out: unknown): void;
  fail(error: unknown): void;
}

/** A worker has so many jobs at the most, the next while one is being done: what is asked for last is done first. */
const EACH = 2;

interface Hand {
  readonly worker: Worker;
  readonly jobs: Map<number, Job>;
}

/** Milliseconds without work after which workers are sent home: they are made anew in a few. */
const IDLE = 10_000;

const PROGRAM = `const works = {${Object.entries(WORKS).map(([name, work]) => `${name}: ${work.toString()}`).join()}};
onmessage = ({ data: { id, name, args } }) => {
  try { const out = works[name](...args); postMessage({ id, out }, [out.buffer]); } catch { postMessage({ id }); }
};`;

let hands: Hand[] | null = null;
/** Whether the page is the only one to do it: there are no workers, or its policy forbids them. */
let alone = false;
const waiting: Job[] = [];
let count = 0;
let rest: ReturnType<typeof setTimeout> | undefined;
let last: Promise<void> = Promise.resolve();
const slices = new Slices();

/** `args` are copied to the worker; the answer is the caller's own. */
export function work<N extends Name>(name: N, ...args: Parameters<Works[N]>): Promise<ReturnType<Works[N]>> {
  return new Promise((settle, fail) => give({ name, args, settle: settle as Job["settle"], fail }));
}

function give(job: Job): void {
  if (hands === null && !alone) hire();
  if (hands === null) return here(job);
  clearTimeout(rest);
  waiting.push(job);
  // Of several that are asked for at once the last is done first, too.
  queueMicrotask(share);
}

function share(): void {
  while (hands !== null && waiting.length > 0) {
    const { jobs, worker } = hands.reduce((a, b) => (b.jobs.size < a.jobs.size ? b : a));
    if (jobs.size >= EACH) return;
    const job = waiting.pop()!;
    const id = count++;
    jobs.set(id, job);
    worker.postMessage({ id, name: job.name, args: job.args.map(own) });
  }
}

/** Of a part of a large array a copy: with the part all of the array would be sent. */
function own(x: unknown): unknown {
  if (ArrayBuffer.isView(x)) return x.byteLength < x.buffer.byteLength ? (x as Uint8Array).slice() : x;
  if (x === null || typeof x !== "object") return x;
  return Object.fromEntries(Object.entries(x).map(([name, of]) => [name, own(of)]));
}

function hire(): void {
  let url = "";
  try {
    url = URL.createObjectURL(new Blob([PROGRAM], { type: "text/javascript" }));
    const many = Math.max(1, Math.min(4, navigator.hardwareConcurrency || 1));
    hands = Array.from({ length: many }, () => {
      const hand: Hand = { worker: new Worker(url), jobs: new Map() };
      hand.worker.onmessage = ({ data: { id, out } }: MessageEvent<{ id: number; out?: unknown }>) => {
        const job = hand.jobs.get(id);
        hand.jobs.delete(id);
        // What failed is done on the page, whose error is the one that is told.
        if (job !== undefined) out === undefined ? here(job) : job.settle(out);
        share();
        if (hands?.every(({ jobs }) => jobs.size === 0)) rest = setTimeout(dismiss, IDLE);
      };
      hand.worker.onerror = (event) => {
        event.preventDefault();
        alone = true;
        dismiss();
      };
      return hand;
    });
  } catch {
    alone = true;
  }
  // Workers that were made have its text by the time that this is done: it is asked for when they are.
  if (url !== "") setTimeout(() => URL.revokeObjectURL(url), IDLE);
}

function dismiss(): void {
  const gone = hands ?? [];
  hands = null;
  for (const { worker } of gone) worker.terminate();
  for (const { jobs } of gone) jobs.forEach(here);
  waiting.splice(0).forEach(here);
}

/** One after the other, with a breath for the page in between. */
function here({ name, args, settle, fail }: Job): void {
  last = last.then(async () => {
    await slices.turn();
    try {
      settle((WORKS[name] as (...of: readonly unknown[]) => unknown)(...args));
    } catch (error) {
      fail(error);
    }
  });
}
