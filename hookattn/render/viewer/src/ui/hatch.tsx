/** The mark of what is masked or left out, in whichever way it is drawn: slanted lines, where others have a colour. */
import type { Ramp } from "../colours";

/** Distance of the lines, across and down, and how thick they are. */
const APART = 6;
const THICK = 1.3;

/** To fill a canvas with; `ratio`: pixels of the canvas to one of the page. */
export function hatching(ramp: Ramp, ratio: number): CanvasPattern {
  const side = Math.round(APART * ratio);
  const tile = new OffscreenCanvas(side, side);
  const context = tile.getContext("2d")!;
  context.fillStyle = ramp.masked;
  context.fillRect(0, 0, side, side);
  context.strokeStyle = ramp.hatch;
  context.lineWidth = THICK * ratio;
  context.beginPath();
  // The lines of the neighbours reach into the corners.
  for (const shift of [-side, 0, side]) {
    context.moveTo(shift - side / 2, side * 1.5);
    context.lineTo(shift + side * 1.5, -side / 2);
  }
  context.stroke();
  return context.createPattern(tile, "repeat")!;
}

/** In an <svg>, to be filled with by `HATCHED`. */
export function Hatching() {
  return (
    <defs>
      <pattern id="hatching" width={APART} height={APART} patternUnits="userSpaceOnUse">
        <rect width={APART} height={APART} fill="var(--masked)" />
        <path d="M-1 1L1 -1M0 6L6 0M5 7L7 5" stroke="var(--hatch)" stroke-width={THICK} fill="none" />
      </pattern>
    </defs>
  );
}

export const HATCHED = "url(#hatching)";
