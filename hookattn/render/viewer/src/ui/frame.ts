import { useEffect, useRef, useState } from "preact/hooks";
import type { App } from "../app";
import type { Frame } from "../data/frame";

/**
 * The frame follows the state, and the state the frame: at once while it is dragged, and in the link a little later.
 */
export function useFrame(app: App): [Frame | null, (frame: Frame | null) => void] {
  const zoom = app.state.value.zoom;
  const [frame, setFrame] = useState<Frame | null>(zoom);
  const late = useRef<ReturnType<typeof setTimeout>>(undefined);
  useEffect(() => setFrame(zoom), [zoom?.join()]);
  useEffect(() => () => clearTimeout(late.current), []);
  return [
    frame,
    (next) => {
      setFrame(next);
      clearTimeout(late.current);
      late.current = setTimeout(
        () => app.set({ zoom: next === null ? null : (next.map((x) => Number(x.toFixed(3))) as Frame) }),
        200,
      );
    },
  ];
}
