/** Colours of numbers and of heads, legible in both themes and to people who confuse red and green. */

/** Shared with figures, where the light ones are used. */
import palette from "../../palette.json";

/** A head's colour and dash. */
export interface Look {
  colour: string;
  dash: string;
}

const HUES = palette.heads.light.length;
/** Pixels of a dash of one line width. */
const DASH = 2;

/** How a weight is drawn as a line. */
export const LINE = palette.line;

/** The look of a head, by its number in the model: it stays whichever others are shown. The first 32 all differ. */
export function look(head: number): Look {
  const dash = palette.dashes[Math.floor(head / HUES) % palette.dashes.length]!;
  return { colour: `var(--h${head % HUES})`, dash: dash.map((part) => part * DASH).join(" ") };
}

/** The colours that a style sheet names: of heads, of what is masked, and its hatching. */
export function variables(): string {
  const of = (theme: "light" | "dark") =>
    [
      ...palette.heads[theme].map((colour, i) => `--h${i}: ${colour};`),
      `--masked: ${palette.masked[theme]}; --hatch: ${palette.hatch[theme]};`,
    ].join(" ");
  return `.ha { ${of("light")} }\n.ha[data-theme="dark"] { ${of("dark")} }\n`;
}

/** From nothing to much; lightness runs one way only. */
const SEQUENTIAL = palette.sequential;
/** The same over a grey picture: from dark to bright, in colours that it does not have. */
const HEAT = ["#1a0b2e", "#5b1a6e", "#b93556", "#f2843a", "#fde74c"];
/** From negative through zero to positive. */
const DIVERGING = palette.diverging;

/** 256 colours, packed as ImageData holds them; where there is no number, `masked` is hatched with `hatch`. */
export interface Ramp {
  colours: Uint32Array;
  masked: string;
  hatch: string;
  stops: readonly string[];
}

const made = new Map<string, Ramp>();

const RAMPS = { sequential: SEQUENTIAL, heat: { light: HEAT, dark: HEAT }, diverging: DIVERGING };

export function ramp(kind: keyof typeof RAMPS, dark: boolean): Ramp {
  const theme = dark ? "dark" : "light";
  const key = `${kind} ${theme}`;
  let known = made.get(key);
  if (known === undefined) {
    const stops = RAMPS[kind][theme];
    known = {
      colours: Uint32Array.from({ length: 256 }, (_, i) => between(stops, i / 255)),
      masked: palette.masked[theme],
      hatch: palette.hatch[theme],
      stops,
    };
    made.set(key, known);
  }
  return known;
}

function between(stops: readonly string[], x: number): number {
  const place = x * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [rgb(stops[i]!), rgb(stops[i + 1]!)];
  return pack(a.map((from, c) => Math.round(from + (b[c]! - from) * (place - i))));
}

function rgb(hex: string): number[] {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function pack([r, g, b]: number[]): number {
  return (255 << 24) | (b! << 16) | (g! << 8) | r!;
}

/** Where a number lies on its ramp. */
export interface Domain {
  kind: "sequential" | "diverging";
  scale: "linear" | "log";
  low: number;
  high: number;
  /** Whether there are numbers farther from 0 than the ramp goes; they have its last colours. */
  clipped: boolean;
}

/** Decades that a log scale spans below the largest value. */
const DECADES = 5;

/**
 * The domain of a field whose finite values run from `low` to `high`, and whose linear colours end at `end` (scale.ts). A
 * log scale is for what is not negative.
 */
export function domain(field: string, scale: "linear" | "log", low: number, high: number, end = Infinity): Domain {
  if (field === "mask") return { kind: "sequential", scale: "linear", low: 0, high: 1, clipped: false };
  if (Number.isNaN(low)) [low, high] = [0, 1];
  const far = Math.max(-low, high, 0);
  const last = Number.isFinite(end) && end > 0 ? end : far || 1;
  const clipped = far > last;
  if (low < 0) return { kind: "diverging", scale: "linear", low: -last, high: last, clipped };
  if (scale === "linear") return { kind: "sequential", scale, low: 0, high: last, clipped };
  return { kind: "sequential", scale, low: (far || 1) / 10 ** DECADES, high: far || 1, clipped: false };
}

/** From a number to 0…255. */
export function position(d: Domain, x: number): number {
  const part = d.scale === "log" ? Math.log(x / d.low) / Math.log(d.high / d.low) : (x - d.low) / (d.high - d.low);
  return part <= 0 ? 0 : part >= 1 ? 255 : Math.round(part * 255);
}

/** Paint numbers as pixels, one each; NaN is transparent. */
export function paint(values: ArrayLike<number>, pixels: Uint32Array, d: Domain, colours: Ramp): void {
  if (d.scale === "log") {
    const [offset, factor] = [Math.log(d.low), 255 / Math.log(d.high / d.low)];
    for (let i = 0; i < pixels.length; i++) {
      const x = values[i]!;
      const place = x <= d.low ? 0 : Math.min(255, (Math.log(x) - offset) * factor);
      pixels[i] = x === x ? colours.colours[place | 0]! : 0;
    }
    return;
  }
  const factor = 255 / (d.high - d.low);
  for (let i = 0; i < pixels.length; i++) {
    const x = values[i]!;
    const place = (x - d.low) * factor;
    pixels[i] = x === x ? colours.colours[place <= 0 ? 0 : place >= 255 ? 255 : (place + 0.5) | 0]! : 0;
  }
}
