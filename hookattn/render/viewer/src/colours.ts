/** Colours of numbers and of heads, legible in both themes and to people who confuse red and green. */

/** How many colours stay apart in every kind of vision (in style.css). */
const HUES = 8;
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

/** A head's colour and dash. */
export interface Look {
  colour: string;
  dash: string;
}

/**
 * The looks of heads that are shown together, no two alike: each has its own colour of eight, or the next that is free;
 * only where there are more than eight are some dashed.
 */
export function looks(heads: readonly number[]): (head: number) => Look {
  const taken = new Map<number, number>();
  const used = new Set<number>();
  for (const head of [...heads].sort((a, b) => a - b)) {
    const round = Math.floor(taken.size / HUES) * HUES;
    let place = head % HUES;
    while (used.has(round + place)) place = (place + 1) % HUES;
    used.add(round + place);
    taken.set(head, round + place);
  }
  return (head) => {
    const place = taken.get(head) ?? head % HUES;
    return { colour: `var(--h${place % HUES})`, dash: DASHES[Math.floor(place / HUES) % DASHES.length]! };
  };
}

/** From nothing to much; lightness runs one way only. */
const SEQUENTIAL = {
  light: ["#ffffff", "#dbe8f5", "#a6cae6", "#5a9fd0", "#2068ab", "#0a3a73", "#051f42"],
  dark: ["#12161c", "#19324f", "#1b5570", "#2b8185", "#67b184", "#c3d97c", "#fff6b8"],
};
/** The same over a grey picture: from dark to bright, in colours that it does not have. */
const HEAT = ["#1a0b2e", "#5b1a6e", "#b93556", "#f2843a", "#fde74c"];
/** From negative through zero to positive. */
const DIVERGING = {
  light: ["#7a3300", "#c96a1b", "#f2bd85", "#fbfbfa", "#9fc6e4", "#2f79b9", "#083b70"],
  dark: ["#ffc48a", "#d97b2b", "#7d4213", "#14181e", "#1d4f78", "#3f94d1", "#b5defa"],
};
const VOID = { light: "#e9e6df", dark: "#2a2f36" };

/** 256 colours, packed as ImageData holds them, and what stands for “no number here”. */
export interface Ramp {
  colours: Uint32Array;
  void: number;
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
      void: pack(rgb(VOID[theme])),
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
}

/** Decades that a log scale spans below the largest value. */
const DECADES = 5;

/** The domain of a field whose finite values run from `low` to `high`. A log scale is for what is not negative. */
export function domain(field: string, scale: "linear" | "log", low: number, high: number): Domain {
  if (field === "mask") return { kind: "sequential", scale: "linear", low: 0, high: 1 };
  if (Number.isNaN(low)) [low, high] = [0, 1];
  if (low < 0) {
    if (high <= 0) high = 0;
    const far = Math.max(-low, high);
    return { kind: "diverging", scale: "linear", low: -far, high: far };
  }
  high = high > 0 ? high : 1;
  return { kind: "sequential", scale, low: scale === "log" ? high / 10 ** DECADES : 0, high };
}

/** From a number to 0…255. */
export function position(d: Domain, x: number): number {
  const part = d.scale === "log" ? Math.log(x / d.low) / Math.log(d.high / d.low) : (x - d.low) / (d.high - d.low);
  return part <= 0 ? 0 : part >= 1 ? 255 : Math.round(part * 255);
}

/** Paint numbers as pixels, one each; NaN is void. */
export function paint(values: ArrayLike<number>, pixels: Uint32Array, d: Domain, colours: Ramp): void {
  if (d.scale === "log") {
    const [offset, factor] = [Math.log(d.low), 255 / Math.log(d.high / d.low)];
    for (let i = 0; i < pixels.length; i++) {
      const x = values[i]!;
      const place = x <= d.low ? 0 : Math.min(255, (Math.log(x) - offset) * factor);
      pixels[i] = x === x ? colours.colours[place | 0]! : colours.void;
    }
    return;
  }
  const factor = 255 / (d.high - d.low);
  for (let i = 0; i < pixels.length; i++) {
    const x = values[i]!;
    const place = (x - d.low) * factor;
    pixels[i] = x === x ? colours.colours[place <= 0 ? 0 : place >= 255 ? 255 : (place + 0.5) | 0]! : colours.void;
  }
}
