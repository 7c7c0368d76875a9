/** A function that runs in workers, several calls at a time; or on the page, where there are none. */

export interface Crew<A extends unknown[], R> {
  run(...args: A): Promise<R>;
  stop(): void;
}

/** `work` needs nothing but its arguments: workers get it as text. */
export function crew<A extends unknown[], R>(work: (...args: A) => R): Crew<A, R> {
  const program = `const work = ${work.toString()};
onmessage = ({ data: { id, args } }) => postMessage({ id, out: work(...args) });`;
  const waiting = new Map<number, { args: A; settle(out: R): void; fail(error: unknown): void }>();
  let [workers, url, calls]: [Worker[], string, number] = [[], "", 0];
  const here = (id: number) => {
    const one = waiting.get(id);
    waiting.delete(id);
    try {
      one?.settle(work(...one.args));
    } catch (error) {
      one?.fail(error);
    }
  };
  const dismiss = () => {
    for (const worker of workers) worker.terminate();
    if (url !== "") URL.revokeObjectURL(url);
    [workers, url] = [[], ""];
  };
  try {
    url = URL.createObjectURL(new Blob([program], { type: "text/javascript" }));
    const many = Math.max(1, Math.min(4, navigator.hardwareConcurrency || 1));
    workers = Array.from({ length: many }, () => {
      const worker = new Worker(url);
      worker.onmessage = ({ data: { id, out } }: MessageEvent<{ id: number; out: R }>) => {
        waiting.get(id)?.settle(out);
        waiting.delete(id);
      };
      // The page's policy may forbid it, or the work itself failed: the page does it, and has the error.
      worker.onerror = (event) => {
        event.preventDefault();
        dismiss();
        for (const id of [...waiting.keys()]) here(id);
      };
      return worker;
    });
  } catch {
    dismiss();
  }
  return {
    run(...args) {
      const id = calls++;
      return new Promise((settle, fail) => {
        waiting.set(id, { args, settle, fail });
        if (workers.length > 0) workers[id % workers.length]!.postMessage({ id, args });
        else here(id);
      });
    },
    stop: dismiss,
  };
}
