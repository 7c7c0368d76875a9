import { Unreachable, ViewerError } from "../errors";
import type { Source } from "./source";

/** What anywidget hands to `render`: the part of it that is used here. */
export interface WidgetModel {
  get(name: string): unknown;
  set(name: string, value: unknown): void;
  save_changes(): void;
  send(content: unknown): void;
  on(event: string, listener: (...args: never[]) => void): void;
  off(event: string, listener: (...args: never[]) => void): void;
}

interface Answer {
  kind: string;
  id: string;
  message?: string;
}

/** Milliseconds. The kernel answers between two cells at the soonest, so that a running cell is waited for. */
const TIMEOUT = 60_000;

/** A kernel may be far away, and answers nothing else meanwhile: four million numbers are 16 MiB. */
const AHEAD = 2 ** 22;

/** A trace that the kernel holds, the first or the second, read by custom messages. `close` stops listening. */
export function asked(
  model: WidgetModel,
  of: "trace" | "compare",
  { name, size }: Pick<Source, "name" | "size">,
): Source & { close(): void } {
  const waiting = new Map<string, { resolve(bytes: ArrayBuffer): void; reject(error: unknown): void }>();
  // Several views of one model hear each other's answers: ids must not meet.
  const prefix = Math.random().toString(36).slice(2);
  let count = 0;

  function hear(answer: Answer, buffers: DataView[]): void {
    const asker = waiting.get(answer.id);
    if (asker === undefined) return;
    waiting.delete(answer.id);
    const view = buffers[0];
    if (answer.kind !== "bytes" || view === undefined) {
      asker.reject(new ViewerError(answer.message ?? "The kernel could not read the trace."));
      return;
    }
    asker.resolve(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) as ArrayBuffer);
  }

  model.on("msg:custom", hear);
  return {
    name,
    size,
    ahead: AHEAD,
    close() {
      model.off("msg:custom", hear);
    },
    read(start, end) {
      const id = `${prefix}-${count++}`;
      return new Promise((resolve, reject) => {
        const late = setTimeout(() => {
          waiting.delete(id);
          reject(new Unreachable("The kernel does not answer. Is it busy, or was it stopped? Run the cell again; hookattn.render.save_page " +
              "writes a page that needs none."));
        }, TIMEOUT);
        const done =
          <T>(pass: (value: T) => void) =>
          (value: T) => (clearTimeout(late), pass(value));
        waiting.set(id, { resolve: done(resolve), reject: done(reject) });
        model.send({ kind: "read", id, of, start, end });
      });
    },
  };
}
