/** A picture and the weights of its patches, on a canvas. */
import { type Domain, paint, position, type Ramp } from "../colours";
import type { Patches } from "../data/patches";
import { useEffect, useState } from "preact/hooks";
import { hatching } from "./hatch";

/** The picture behind an address, once it is there; null while it is not, or where there is none. */
export function usePicture(url: string | undefined): { picture: HTMLImageElement | null; failed: boolean } {
  const [state, setState] = useState<{ url: string; picture: HTMLImageElement | null } | null>(null);
  useEffect(() => {
    if (url === undefined) return;
    let gone = false;
    const image = new Image();
    image.src = url;
    image.decode().then(
      () => gone || setState({ url, picture: image }),
      () => gone || setState({ url, picture: null }),
    );
    return () => {
      gone = true;
    };
  }, [url]);
  const here = state !== null && state.url === url;
  return { picture: here ? state.picture : null, failed: here && state.picture === null };
}

/** The picture alone. */
export function drawPicture(canvas: HTMLCanvasElement, picture: HTMLImageElement): void {
  canvas.getContext("2d")!.drawImage(picture, 0, 0, canvas.width, canvas.height);
}

/** How much of the picture the smallest and the largest weight hide. */
const [FAINT, STRONG] = [0.3, 0.85];

/** The weights as colours; over a picture, which then is grey, the less opaque the smaller they are. */
export function drawWeights(
  canvas: HTMLCanvasElement,
  weights: ArrayLike<number>,
  { rows, cols, prefix }: Patches,
  domain: Domain,
  ramp: Ramp,
  picture: HTMLImageElement | null,
): void {
  const context = canvas.getContext("2d")!;
  const values = Float64Array.from({ length: rows * cols }, (_, i) => weights[prefix + i]!);
  const image = new ImageData(cols, rows);
  paint(values, new Uint32Array(image.data.buffer), domain, ramp);
  context.fillStyle = hatching(ramp, globalThis.devicePixelRatio || 1);
  if (picture === null) context.fillRect(0, 0, canvas.width, canvas.height);
  else {
    context.filter = "grayscale(1) brightness(0.6)";
    drawPicture(canvas, picture);
    context.filter = "none";
    values.forEach((x, i) => {
      if (Number.isNaN(x)) {
        const [wide, high] = [canvas.width / cols, canvas.height / rows];
        return context.fillRect((i % cols) * wide, Math.floor(i / cols) * high, wide, high);
      }
      image.data[4 * i + 3] = 255 * (FAINT + ((STRONG - FAINT) * position(domain, x)) / 255);
    });
  }
  const small = new OffscreenCanvas(cols, rows);
  small.getContext("2d")!.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}
