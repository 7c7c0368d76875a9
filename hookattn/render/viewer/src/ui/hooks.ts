import { useEffect, useRef, useState } from "preact/hooks";
import { message } from "../errors";

export interface Loaded<T> {
  /** The newest value there is: while the next one loads, the one before. */
  value: T | null;
  error: string | null;
  /** Whether `value` is not yet what was asked for. */
  stale: boolean;
}

/** The result of `load`, which runs anew when `deps` change; what it began before is aborted. */
export function useLoaded<T>(load: (signal: AbortSignal) => Promise<T>, deps: readonly unknown[]): Loaded<T> {
  const [state, setState] = useState<Loaded<T>>({ value: null, error: null, stale: true });
  useEffect(() => {
    const stop = new AbortController();
    setState((s) => (s.stale ? s : { ...s, stale: true }));
    load(stop.signal).then(
      (value) => stop.signal.aborted || setState({ value, error: null, stale: false }),
      (error: unknown) => stop.signal.aborted || setState({ value: null, error: message(error), stale: false }),
    );
    return () => stop.abort();
  }, deps);
  return state;
}

/** The width of an element in CSS pixels, as it changes. */
export function useWidth(): [{ current: HTMLDivElement | null }, number] {
  const ref = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const element = ref.current!;
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry!.contentRect.width)));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  return [ref, width];
}
