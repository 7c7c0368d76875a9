/** How the patches of a picture lie in a sequence: some tokens before them, such as a class token, then row by row. */
import type { Images, Options } from "../options";
import type { Call } from "./call";

export interface Patches {
  rows: number;
  cols: number;
  /** Tokens before the first patch. */
  prefix: number;
  /** Whether nothing but the number of keys says so. */
  guessed: boolean;
}

/** None; a class token; that and one for distillation, or four registers. Others are to be told. */
const PREFIXES = [0, 1, 2, 5];

/** The patches of a sequence of `length`: of the grid that was handed over, where it fits, else a square; or null. */
export function patches(length: number, images: Images | undefined): Patches | null {
  if (images?.grid !== undefined) {
    const [rows, cols] = images.grid;
    const prefix = images.prefix ?? length - rows * cols;
    if (prefix >= 0 && prefix + rows * cols === length) return { rows, cols, prefix, guessed: false };
  }
  for (const prefix of PREFIXES) {
    const side = Math.sqrt(length - prefix);
    if (Number.isInteger(side) && side > 1) return { rows: side, cols: side, prefix, guessed: true };
  }
  return null;
}

/** Whether the keys of a call are patches, as far as the trace says; pictures that were handed over say it too. */
export function ofPatches({ site, extents }: Call, { images }: Options): boolean {
  if (site.axes === "channels") return false;
  const told = site.axes === "patches" || site.stack === "vision";
  return told || (images?.grid !== undefined && site.stack !== "text" && fits(extents.S, images));
}

function fits(length: number, images: Images): boolean {
  const found = patches(length, images);
  return found !== null && found.rows === images.grid?.[0] && found.cols === images.grid[1];
}

/** What a place in the sequence is called. */
export function place(at: number, { cols, prefix }: Patches): string {
  if (at >= prefix) return `row ${Math.floor((at - prefix) / cols)}, column ${(at - prefix) % cols}`;
  return prefix === 1 ? "class token" : `token ${at}`;
}
