import { useEffect, useState } from "preact/hooks";
import { message } from "../errors";

export interface Loaded<T> {
  /** The newest value there is: while the next one loads, the one before. */
  value: T | null;
  error: string | null;
  /** Whether `value` is not yet what was asked for. */
  stale: boolean;
}

/**
 * The result of `load`, which runs anew when `deps` change; what it began before is aborted. Long work can show what it
 * has so far by `show`.
 */
export function useLoaded<T>(
  load: (signal: AbortSignal, show: (value: T) => void) => Promise<T>,
  deps: readonly unknown[],
): Loaded<T> {
  const [state, setState] = useState<Loaded<T>>({ value: null, error: null, stale: true });
  useEffect(() => {
    const stop = new AbortController();
    setState((s) => (s.stale ? s : { ...s, stale: true }));
    const show = (value: T) =>
      stop.signal.aborted || setState((s) => (s.stale ? { value, error: null, stale: true } : s));
    load(stop.signal, show).then(
      (value) => stop.signal.aborted || setState({ value, error: null, stale: false }),
      (error: unknown) => stop.signal.aborted || setState({ value: null, error: message(error), stale: false }),
    );
    return () => stop.abort();
  }, deps);
  return state;
}

/** The width of an element in CSS pixels, as it changes; the first of the two is its `ref`. */
export function useWidth(): [(element: Element | null) => void, number] {
  const [element, setElement] = useState<Element | null>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    if (element === null) return;
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry!.contentRect.width)));
    observer.observe(element);
    return () => observer.disconnect();
  }, [element]);
  return [setElement, width];
}
