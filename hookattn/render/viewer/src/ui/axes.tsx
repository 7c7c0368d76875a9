/**
 * Names of rows and columns along a matrix: tokens where there is room for each, else every second, fifth or so; where even
 * these would be few of many, positions.
 */
import type { Axis } from "../data/labels";
import { shorten } from "../tokens";
import { labelWidth } from "./lines";

/** The height of a line of names, as large as they are where there is room, and as small as they may be. */
const LINE = 14;
const LEAST = 12;
/** The size of the text in a line of so many pixels. */
function sizeOf(line: number): number {
  return line >= LINE ? 13 : 11;
}
/** Of more names than this each stands for too many others to be read on. */
const SKIPPED = 5;

/** The room that an axis takes beside a matrix, whatever part of it is in view. Numbers need little. */
export function axisRoom(axis: Axis, most: number): number {
  return axis.named ? labelWidth(axis, most) : 46;
}

interface Props {
  axis: Axis;
  /** First entry in view and how many, fractions allowed; the length they have on the screen, and where it begins. */
  first: number;
  count: number;
  length: number;
  start: number;
  /** Where the labels end, across. */
  at: number;
  room: number;
  active: number | null;
  locked: number | null;
}

/** `apart`: how far numbers stand apart at the least. */
function entries({ axis, first, count, length }: Props, apart: number): { i: number; text: string; name: boolean; size: number }[] {
  const cell = length / count;
  const every = nice(LEAST / cell);
  const name = axis.named && every <= SKIPPED;
  const stride = name ? every : nice(apart / cell);
  const size = name ? sizeOf(stride * cell) : 13;
  const out = [];
  for (
    let i = Math.ceil(first / stride) * stride;
    i < Math.min(axis.labels.length, Math.ceil(first + count));
    i += stride
  ) {
    const middle = i + 0.5 - first;
    if (middle >= 0 && middle <= count)
      out.push({ i, text: name || i === axis.sink ? axis.labels[i]!.text : String(axis.positions[i]), name, size });
  }
  const { sink } = axis;
  if (sink === undefined || sink < first || sink >= first + count) return out;
  // The sink is always named; what would overlap it is not.
  const free = out.filter(({ i }) => (sink - i) * cell >= (name ? LEAST : apart));
  return [...free, { i: sink, text: axis.labels[sink]!.text, name, size }];
}

/** 1, 2 or 5 times a power of ten, at least `x`. */
function nice(x: number): number {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, x)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= x)!;
}

/** An entry that an edit names is underlined. */
function mark(i: number, { axis }: Props): string | undefined {
  return axis.edited?.[i] ? "edited" : undefined;
}

function weight(i: number, { active, locked }: Props): number {
  return i === active || i === locked ? 700 : 400;
}

export function Rows(props: Props) {
  const { first, count, length, start, at, room } = props;
  return (
    <g>
      {entries(props, 24).map(({ i, text, size }) => (
        <text
          key={i}
          x={at - 6}
          y={start + ((i + 0.5 - first) / count) * length}
          text-anchor="end"
          dominant-baseline="central"
          style={{ fontSize: `${size}px` }}
          font-weight={weight(i, props)}
          class={mark(i, props)}
        >
          {shorten(text, Math.max(2, Math.floor((room - 8) / 7.2)))}
        </text>
      ))}
    </g>
  );
}

export function Columns(props: Props) {
  const { first, count, length, start, at, room } = props;
  return (
    <g>
      {entries(props, 40).map(({ i, text, name, size }) => {
        const x = start + ((i + 0.5 - first) / count) * length;
        return name ? (
          <text
            key={i}
            transform={`translate(${x} ${at - 6}) rotate(${size < 13 ? -90 : -60})`}
            style={{ fontSize: `${size}px` }}
            dominant-baseline="central"
            font-weight={weight(i, props)}
            class={mark(i, props)}
          >
            {shorten(text, Math.max(2, Math.floor((room - 8) / (size < 13 ? 7.2 : 6.4))))}
          </text>
        ) : (
          <text key={i} x={x} y={at - 7} text-anchor="middle" font-weight={weight(i, props)} class={mark(i, props)}>
            {text}
          </text>
        );
      })}
    </g>
  );
}
