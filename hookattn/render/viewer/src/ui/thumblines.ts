/** A head as lines on a small canvas: queries on the left, keys on the right, a line as strong as its weight. */
import type { Thumbnail } from "../data/thumbnail";

/** Lines that can be told apart in so small a picture. */
const LINES = 240;
const FLOOR = 0.02;

/** Draws into a box of the canvas, in its own pixels. */
export function drawLines(
  context: CanvasRenderingContext2D,
  { matrix, extent }: Thumbnail,
  colour: string,
  box: { x: number; y: number; width: number; height: number },
): void {
  const { rows, cols, data } = matrix;
  const most = Math.max(Math.abs(extent[0]), Math.abs(extent[1])) || 1;
  const found: [number, number][] = [];
  for (let i = 0; i < data.length; i++) {
    const size = Math.abs(data[i]!) / most;
    if (size >= FLOOR) found.push([size, i]);
  }
  // The strongest are drawn last, over the others.
  const drawn = found.sort((a, b) => b[0] - a[0]).slice(0, LINES).reverse();
  const { x, y, width, height } = box;
  const inset = Math.max(1, width * 0.06);
  const [left, right] = [x + inset, x + width - inset];
  context.save();
  context.strokeStyle = colour;
  context.lineWidth = Math.max(0.75, width / 90);
  for (const [size, i] of drawn) {
    const from = y + ((Math.floor(i / cols) + 0.5) / rows) * height;
    const to = y + (((i % cols) + 0.5) / cols) * height;
    context.globalAlpha = Math.min(1, size);
    context.beginPath();
    context.moveTo(left, from);
    context.bezierCurveTo(left + width / 3, from, right - width / 3, to, right, to);
    context.stroke();
  }
  context.restore();
}
