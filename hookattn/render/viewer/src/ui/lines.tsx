/** Lines between two columns of tokens, and the columns themselves. */
import { LINE, type Look } from "../colours";
import type { Axis } from "../data/labels";
import type { Link } from "../data/strongest";
import type { Scale } from "../state";
import { shorten } from "../tokens";

/** How strongly a weight is drawn, from 0 to 1; on a log scale `least` and what is below are 0. */
export function strength(weight: number, scale: Scale, least = 1e-4): number {
  const x = scale === "log" ? 1 - Math.log10(weight) / Math.log10(least) : weight;
  return x <= 0 ? 0 : Math.min(1, x);
}

/**
 * How much of its opacity a line keeps where there are many: on a log scale thousands of weak ones would be one solid block.
 */
function thinned(lines: number, scale: Scale): number {
  return scale === "log" ? Math.min(1, Math.sqrt(THICKET / lines)) : 1;
}

/** Lines that are still told apart, each in its full strength. */
const THICKET = 100;

/** The dots of a line whose weight is below 0. */
const NEGATIVE = "0.5 4";

/** One line a link, as strong as its weight; `heads` are the numbers of the matrices that links count. */
export function Lines(props: {
  links: readonly Link[];
  heads: readonly number[];
  look(head: number): Look;
  scale: Scale;
  /** The weight that is drawn strongest. */
  unit: number;
  /** The weight, in parts of `unit`, that a log scale begins with. */
  least: number;
  left: number;
  right: number;
  from(query: number): number;
  to(key: number): number;
}) {
  const { heads, left, right, scale, unit } = props;
  const bend = (right - left) * LINE.bend;
  const keeps = thinned(props.links.length, scale);
  return (
    <g fill="none" stroke-linecap="round">
      {props.links.map(({ of, query, key, value }) => {
        const head = heads[of]!;
        const { colour, dash } = props.look(head);
        const s = strength(Math.abs(value) / unit, scale, props.least) * keeps;
        const [y1, y2] = [props.from(query), props.to(key)];
        return (
          <path
            key={`${head} ${query} ${key}`}
            d={`M${left} ${y1}C${left + bend} ${y1} ${right - bend} ${y2} ${right} ${y2}`}
            stroke={colour}
            stroke-dasharray={value < 0 ? NEGATIVE : dash}
            data-value={value}
            stroke-opacity={Math.max(LINE.faintest, s).toFixed(3)}
            stroke-width={(LINE.thinnest + (LINE.thickest - LINE.thinnest) * s).toFixed(2)}
          />
        );
      })}
    </g>
  );
}

/** How near to a line the pointer is at it, in pixels. */
const NEAR = 5;

/** The line that runs through a point between the columns: the strongest of those that are near; or null. */
export function lineAt(
  links: readonly Link[],
  x: number,
  y: number,
  { left, right, from, to }: { left: number; right: number; from(query: number): number; to(key: number): number },
): Link | null {
  // Where a line is at this x: all bend alike, so that they have gone down by the same part.
  const along = (x - left) / (right - left);
  if (along < 0 || along > 1) return null;
  let [low, high] = [0, 1];
  for (let i = 0; i < 20; i++) {
    const t = (low + high) / 2;
    if (3 * (1 - t) * t * (0.4 * (1 - t) + 0.6 * t) + t ** 3 < along) low = t;
    else high = t;
  }
  const part = low * low * (3 - 2 * low);
  let best: Link | null = null;
  for (const link of links) {
    const [y1, y2] = [from(link.query), to(link.key)];
    if (Math.abs(y1 + (y2 - y1) * part - y) > NEAR) continue;
    if (best === null || Math.abs(link.value) > Math.abs(best.value)) best = link;
  }
  return best;
}

/** How high a row of `count` is: as text needs it, lower where there are very many. */
export function rowHeight(count: number): number {
  return count <= 300 ? 20 : Math.max(3, 6000 / count);
}

/** The width that labels take, of those given and at most `most`. */
export function labelWidth(axis: Axis, most: number): number {
  const longest = axis.labels.reduce((n, l) => Math.max(n, Math.min(40, wide(l.text))), 0);
  return Math.min(most, Math.max(24, 8 + longest * 7.4));
}

/** A text's width in Latin letters: ideographs, Hangul and emoji take two. */
function wide(text: string): number {
  let n = 0;
  for (const c of text)
    n +=
      /[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/u.test(
        c,
      )
        ? 2
        : 1;
  return n;
}

interface ColumnProps {
  axis: Axis;
  /** Where the text begins (end: ends). */
  x: number;
  side: "start" | "end";
  width: number;
  height: number;
  y(i: number): number;
  active: number | null;
  locked: number | null;
}

export function Column({ axis, x, side, width, height, y, active, locked }: ColumnProps) {
  const stride = Math.max(1, Math.ceil(15 / height));
  const fit = Math.max(2, Math.floor(width / 7.2));
  const shown = axis.labels
    .map((label, i) => ({ label, i }))
    .filter(({ i }) => i % stride === 0 || i === active || i === locked);
  const left = side === "end" ? x - width : x;
  const band = Math.max(height, 16);
  return (
    <g>
      {[...new Set([active, locked])].map(
        (i) =>
          i !== null && (
            <rect
              key={i}
              x={left}
              y={y(i) - band / 2}
              width={width}
              height={band}
              rx={3}
              fill="var(--hover)"
              stroke={i === locked ? "var(--accent)" : "none"}
            />
          ),
      )}
      {shown.map(({ label, i }) => {
        const near =
          stride > 1 &&
          i !== active &&
          i !== locked &&
          [active, locked].some((a) => a !== null && Math.abs(a - i) * height < 15);
        return near ? null : (
          <text
            key={i}
            x={side === "end" ? x - 5 : x + 5}
            y={y(i)}
            text-anchor={side}
            dominant-baseline="central"
            direction="ltr"
            font-weight={i === active || i === locked ? 600 : 400}
            class={axis.edited?.[i] ? "edited" : undefined}
          >
            {shorten(label.text, fit)}
          </text>
        );
      })}
    </g>
  );
}
