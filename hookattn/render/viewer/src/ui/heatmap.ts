/** Painting the part of a pyramid that is in view onto a canvas. */
import { type Domain, paint, type Ramp } from "../colours";
import type { Frame } from "../data/frame";
import { thereOf } from "../data/matrix";
import type { Pyramid } from "../data/pool";
import { hatching } from "./hatch";

/** The finest level of which a cell is not smaller than a pixel, so that no number is lost between pixels. */
export function levelFor(pyramid: Pyramid, [, , keys, queries]: Frame, width: number, height: number): number {
  const fine = Math.max(0, Math.ceil(Math.log2(Math.max(keys / width, queries / height))));
  return Math.min(fine, pyramid.length - 1);
}

/** Draw into `canvas`, whose width and height are device pixels, `ratio` to one of the page; NaN is hatched, what is not read yet blank. */
export function draw(
  canvas: HTMLCanvasElement,
  pyramid: Pyramid,
  frame: Frame,
  domain: Domain,
  ramp: Ramp,
  ratio = globalThis.devicePixelRatio || 1,
): void {
  const [k, q, keys, queries] = frame;
  const level = levelFor(pyramid, frame, canvas.width, canvas.height);
  const { data, rows, cols } = pyramid[level]!;
  const size = 2 ** level;
  const [left, top] = [Math.floor(k / size), Math.floor(q / size)];
  const wide = Math.min(cols, Math.ceil((k + keys) / size)) - left;
  const high = Math.min(rows, Math.ceil((q + queries) / size)) - top;
  const there = thereOf(pyramid[level]!) - top;
  const small = new OffscreenCanvas(wide, high);
  const image = new ImageData(wide, high);
  const pixels = new Uint32Array(image.data.buffer);
  for (let y = 0; y < Math.min(high, there); y++) {
    const from = (top + y) * cols + left;
    paint(data.subarray(from, from + wide), pixels.subarray(y * wide, (y + 1) * wide), domain, ramp);
  }
  small.getContext("2d")!.putImageData(image, 0, 0);
  const context = canvas.getContext("2d")!;
  context.imageSmoothingEnabled = false;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = hatching(ramp, ratio);
  context.fillRect(0, 0, canvas.width, canvas.height);
  const [x, y] = [canvas.width / keys, canvas.height / queries];
  context.drawImage(small, (left * size - k) * x, (top * size - q) * y, wide * size * x, high * size * y);
  if (there < high) {
    const read = Math.max(0, (top + there) * size - q) * y;
    context.clearRect(0, read, canvas.width, canvas.height - read);
  }
}
