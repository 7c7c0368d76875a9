/**
 * The text as a line of tokens. Under the pointer, or with the focus, a token shades what it looks at; with shift, who
 * looks at it. What is under the pointer is painted without rendering anything anew.
 */
import { effect } from "../../signals";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import type { App, Cursor } from "../../app";
import { type Axis } from "../../data/labels";
import type { Matrix } from "../../data/matrix";
import { shorten } from "../../tokens";
import { name } from "../table";
import type { Scene } from "./scene";

const [ROW, PAD, GAP, LETTER] = [26, 5, 3, 18];
/** Characters of a token, and rows of a text that is shown whole; a longer one is a line that scrolls. */
const [LONGEST, ROWS] = [28, 4];
/** Pixels beside what is in view that are there already. */
const BESIDE = 400;

/** Which rows and columns of the matrix a token is: −1 for none. */
export interface Places {
  readonly rows: Int32Array;
  readonly columns: Int32Array;
}

interface Box {
  readonly x: number;
  readonly y: number;
  readonly width: number;
  readonly text: string;
  /** “A” or “B” before the first token of a sentence of a pair. */
  readonly letter: string;
}

/** The lines of a scene: one for a sequence that looks at itself, two where queries and keys are two. */
export function linesOf(axes: Scene["sheet"]["axes"], self: boolean): { title: string; axis: Axis; places: Places }[] {
  const { queries, keys } = axes;
  const all = (length: number, is: boolean) => Int32Array.from({ length }, (_, i) => (is ? i : -1));
  const at = new Map(keys.positions.map((p, i) => [p, i]));
  if (self && queries.positions.every((p) => at.has(p))) {
    const rows = all(keys.labels.length, false);
    queries.positions.forEach((p, t) => (rows[at.get(p)!] = t));
    return [{ title: "The text", axis: keys, places: { rows, columns: all(keys.labels.length, true) } }];
  }
  const side = (title: string, axis: Axis, isQuery: boolean) => {
    const n = axis.labels.length;
    return { title, axis, places: { rows: all(n, isQuery), columns: all(n, !isQuery) } };
  };
  return [side("Queries", queries, true), side("Keys", keys, false)];
}

export function TokenLine({
  app,
  scene,
  title,
  axis,
  places,
  room,
}: {
  app: App;
  scene: Scene;
  title: string;
  axis: Axis;
  places: Places;
  room: number;
}) {
  const scroller = useRef<HTMLDivElement>(null);
  const [font, setFont] = useState("13px sans-serif");
  useLayoutEffect(() => setFont(`13px ${getComputedStyle(scroller.current!).fontFamily}`), []);
  const { boxes, width, rows } = useMemo(() => layout(axis, font, room), [axis, font, room]);
  const scrolls = rows === 1 && width > room;
  const [view, setView] = useState<[number, number]>([0, 0]);
  const [from, to] = scrolls ? view : [0, boxes.length];
  const look = () => {
    const left = scroller.current!.scrollLeft;
    const first = lowest(boxes, left - BESIDE);
    setView((v) => {
      const next: [number, number] = [first, lowest(boxes, left + room + BESIDE)];
      return v[0] === next[0] && v[1] === next[1] ? v : next;
    });
  };
  const indexOf = (row: number | null, column: number | null) => {
    const i = row === null ? -1 : places.rows.indexOf(row);
    return i >= 0 || column === null ? i : places.columns.indexOf(column);
  };
  const main = Math.max(0, indexOf(scene.row, scene.column));
  const reveal = (i: number) => {
    const [box, element] = [boxes[i], scroller.current];
    if (box === undefined || element === null) return;
    const { scrollLeft: left } = element;
    if (box.x < left + 40 || box.x + box.width > left + room - 40) element.scrollLeft = box.x + box.width / 2 - room / 2;
  };
  useLayoutEffect(() => {
    if (scrolls) reveal(main);
    look();
  }, [boxes, main, scrolls]);

  const pointer = useRef<number | null>(null);
  const point = (i: number | null, shift: boolean) => {
    pointer.current = i;
    const [row, column] = i === null ? [-1, -1] : [places.rows[i]!, places.columns[i]!];
    const asQuery = row >= 0 && (!shift || column < 0);
    app.cursor.value = { query: asQuery ? row : null, key: asQuery || column < 0 ? null : column };
  };
  const lock = (i: number, shift: boolean) => {
    const [row, column] = [places.rows[i]!, places.columns[i]!];
    const { query, key } = app.state.peek();
    if (row >= 0 && (!shift || column < 0))
      scene.pick(query !== null && row === scene.row && !shift ? null : row, column < 0 && key !== null ? scene.column : null);
    else if (column >= 0) scene.pick(row < 0 && query !== null ? scene.row : null, key !== null && column === scene.column ? null : column);
  };
  useEffect(() => {
    const shift = (event: KeyboardEvent) => {
      if (event.key === "Shift" && pointer.current !== null) point(pointer.current, event.type === "keydown");
    };
    for (const type of ["keydown", "keyup"] as const) addEventListener(type, shift);
    return () => {
      for (const type of ["keydown", "keyup"] as const) removeEventListener(type, shift);
    };
  }, [places, app]);

  const tokens = useRef<HTMLDivElement>(null);
  const matrix = scene.numbers?.matrix ?? null;
  const { row, column } = scene;
  useLayoutEffect(
    () => effect(() => shade(tokens.current!, app.cursor.value, { row, column, matrix, places })),
    [app, row, column, matrix, places, boxes, from, to],
  );
  const index = (event: Event): number | null => {
    const i = (event.target as Element).closest("[data-i]")?.getAttribute("data-i");
    return i == null ? null : Number(i);
  };
  const drawn = useMemo(
    () =>
      boxes.slice(from, to).map((box, n) => {
        const i = from + n;
        const segment = axis.segments?.[i];
        return (
          <span key={i}>
            {box.letter && (
              <b class={`letter of-${box.letter}`} style={{ left: `${box.x - LETTER}px`, top: `${box.y}px` }} aria-hidden="true">
                {box.letter}
              </b>
            )}
            <span
              role="option"
              class={segment === undefined ? "tok" : `tok of-${"AB"[segment]}`}
              data-i={i}
              dir="auto"
              tabIndex={i === main ? 0 : -1}
              aria-selected={i === main}
              title={name(axis, i)}
              style={{ left: `${box.x}px`, top: `${box.y}px`, width: `${box.width}px` }}
            >
              {box.text}
            </span>
          </span>
        );
      }),
    [boxes, from, to, main, axis],
  );
  const move = (event: KeyboardEvent) => {
    const i = index(event);
    if (i === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const last = boxes.length - 1;
    const next = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: last }[event.key];
    if (next !== undefined) {
      const at = Math.min(last, Math.max(0, next));
      if (scrolls) {
        reveal(at);
        look();
      }
      // What has come into view is there once this is rendered.
      requestAnimationFrame(() => tokens.current?.querySelector<HTMLElement>(`[data-i="${at}"]`)?.focus({ preventScroll: true }));
    } else if (event.key === "Enter" || event.key === " ") lock(i, event.shiftKey);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return (
    <div class="line">
      <div class="quiet name">{title}</div>
      <div
        ref={scroller}
        class={scrolls ? "scroller scrolls" : "scroller"}
        style={{ height: `${rows * ROW + (scrolls ? 14 : 0)}px` }}
        onScroll={look}
      >
        <div
          ref={tokens}
          class="toks"
          role="listbox"
          aria-label={`${title}, ${boxes.length} tokens`}
          aria-orientation="horizontal"
          style={{ width: `${width}px`, height: `${rows * ROW}px` }}
          onPointerMove={(event) => {
            const i = index(event);
            if (i !== null) point(i, event.shiftKey);
          }}
          onPointerLeave={() => point(null, false)}
          onFocusIn={(event) => point(index(event), false)}
          onFocusOut={() => point(null, false)}
          onClick={(event) => {
            const i = index(event);
            if (i !== null) lock(i, event.shiftKey);
          }}
          onKeyDown={move}
        >
          {drawn}
        </div>
      </div>
    </div>
  );
}

/** Where each token stands: in at most a few rows, else all in one. */
function layout(axis: Axis, font: string, room: number): { boxes: Box[]; width: number; rows: number } {
  const context = document.createElement("canvas").getContext("2d")!;
  context.font = font;
  const pieces = axis.labels.map((label, i) => {
    const text = shorten(label.text, LONGEST);
    const segment = axis.segments?.[i];
    const letter = segment !== undefined && segment !== axis.segments![i - 1] ? "AB"[segment]! : "";
    return { text, letter, width: Math.ceil(context.measureText(text).width) + 2 * PAD + 2 };
  });
  const most = room < 600 ? 1 : ROWS;
  for (const limit of [room, Infinity]) {
    let [x, row, width] = [0, 0, 0];
    const boxes = pieces.map(({ text, letter, width: wide }): Box => {
      const before = letter === "" ? 0 : LETTER;
      if (x > 0 && x + before + wide > limit) [x, row] = [0, row + 1];
      const box = { x: x + before, y: row * ROW, width: wide, text, letter };
      x += before + wide + GAP;
      width = Math.max(width, x - GAP);
      return box;
    });
    if (row < most) return { boxes, width, rows: row + 1 };
  }
  return { boxes: [], width: 0, rows: 1 };
}

/** The first token that ends at `x` or right of it, of tokens in one row. */
function lowest(boxes: readonly Box[], x: number): number {
  let [low, high] = [0, boxes.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (boxes[middle]!.x + boxes[middle]!.width < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The strongest ground that a word is still read on, in percent of the colour. */
const GROUND = 46;

function shade(
  tokens: HTMLElement,
  cursor: Cursor,
  { row, column, matrix, places }: { row: number | null; column: number | null; matrix: Matrix | null; places: Places },
): void {
  const hovered = cursor.query !== null || cursor.key !== null;
  const from = hovered ? cursor.query : row;
  const to = hovered ? cursor.key : column;
  for (const token of tokens.querySelectorAll<HTMLElement>(".tok")) {
    const i = Number(token.dataset["i"]);
    const [t, s] = [places.rows[i]!, places.columns[i]!];
    let value = 0;
    if (matrix !== null && from !== null && s >= 0) value = matrix.data[from * matrix.cols + s]!;
    else if (matrix !== null && from === null && to !== null && t >= 0) value = matrix.data[t * matrix.cols + to]!;
    // By its root, so that a twentieth of the attention is still seen.
    const strength = Number.isNaN(value) ? 0 : Math.sqrt(Math.min(1, Math.abs(value)));
    const colour = from === null ? "var(--cursor)" : "var(--accent)";
    token.style.background = strength < 0.05 ? "" : `color-mix(in srgb, ${colour} ${(GROUND * strength).toFixed(1)}%, var(--bg))`;
    token.classList.toggle("from", t >= 0 && t === from);
    token.classList.toggle("to", s >= 0 && s === to);
    token.dataset["weight"] = Number.isNaN(value) ? "" : String(value);
  }
}
