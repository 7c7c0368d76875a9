/** All heads at a glance: a square each, in the hue of its role and as strong as its score; or each as a small picture. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type App, focus, stored } from "../../app";
import { domain, ramp } from "../../colours";
import type { AtlasGroup, AtlasRow } from "../../data/atlas";
import type { Call } from "../../data/call";
import { whole } from "../../data/frame";
import { weightsOf } from "../../data/kinds";
import { twinOf } from "../../data/pairs";
import { hue, inOrder, roleOf } from "../../data/rolewords";
import { thumbnail } from "../../data/thumbnail";
import type { Findings, HeadFound } from "../../findings";
import { placeOf, type Tiles } from "../../state";
import { draw } from "../heatmap";
import { Segments } from "../inputs";
import { drawLines } from "../thumblines";
import { Tip, type TipAt } from "../tip";

const LEFT = 30;
const TOP = 18;
const TITLE = 22;
/** Sides of a square and of a small picture that still show something, and how large they get. */
const [LEAST, PICTURE] = [5, 26];
const largest = (room: number, picture: boolean) => (picture ? Math.max(104, Math.min(220, room / 5)) : room > 700 ? 60 : 34);
/** Below this no square has room for its number. */
const NUMBER = 15;

/** A number for each head in place of its role, where two traces are compared. */
export interface Apart {
  /** By the index of the call and the place of the head; undefined: not yet measured. */
  readonly values: ReadonlyMap<string, number>;
  readonly most: number;
}

interface Cell {
  readonly row: AtlasRow;
  readonly i: number;
  readonly call: Call;
  readonly head: number;
  readonly x: number;
  readonly y: number;
}

interface Layout {
  readonly cells: readonly Cell[];
  readonly at: ReadonlyMap<string, Cell>;
  readonly titles: readonly { text: string; y: number; heads: readonly number[] }[];
  readonly names: readonly { text: string; y: number }[];
  readonly size: number;
  readonly width: number;
  readonly height: number;
}

function layoutOf(groups: readonly AtlasGroup[], room: number, most: number, least: number, greatest: number): Layout {
  const rows = groups.reduce((n, g) => n + g.rows.length, 0);
  const columns = Math.max(1, ...groups.map((g) => g.heads.length));
  const titled = groups.length > 1 ? TITLE : 0;
  const fixed = groups.length * (TOP + titled + 6);
  const fit = Math.min((room - LEFT - 2) / columns, (most - fixed) / rows, greatest);
  const size = Math.max(least, fit > 10 ? Math.floor(fit) : Math.floor(fit * 2) / 2);
  const cells: Cell[] = [];
  const at = new Map<string, Cell>();
  const titles: Layout["titles"][number][] = [];
  const names: Layout["names"][number][] = [];
  let y = 0;
  for (const { name, rows: calls, heads } of groups) {
    y += titled;
    titles.push({ text: titled ? name : "", y, heads });
    y += TOP;
    const stride = Math.max(1, Math.ceil(13 / size));
    calls.forEach((row, i) => {
      if (i % stride === 0) names.push({ text: row.name, y: y + size / 2 });
      for (const head of row.call.headNumbers) {
        const cell = { row, i: cells.length, call: row.call, head, x: LEFT + heads.indexOf(head) * size, y };
        cells.push(cell);
        at.set(`${row.call.index} ${head}`, cell);
      }
      y += size;
    });
    y += 6;
  }
  return { cells, at, titles, names, size, width: LEFT + columns * size + 2, height: y };
}

export function Atlas(props: {
  app: App;
  findings: Findings;
  groups: readonly AtlasGroup[];
  /** The call that stands for the chosen one, which may be another step of the same generation. */
  here: Call | null;
  room: number;
  most: number;
  apart: Apart | null;
}) {
  const { app, findings, groups, here, room, most, apart } = props;
  const state = app.state.value;
  // Pictures are of whole heads: unasked they are drawn where there is room, and where so much may be read.
  const whole = groups.flatMap((g) => g.rows).reduce((n, { call: { extents: e } }) => n + e.H * e.T * e.S, 0);
  const few = layoutOf(groups, room, most, LEAST, 104).size >= 56 && whole <= (app.trace.source.ahead ?? Infinity);
  const tiles = state.tiles === "auto" ? (few ? "matrix" : "squares") : state.tiles;
  const pictures = tiles !== "squares";
  const layout = useMemo(
    () => layoutOf(groups, room, most, pictures ? PICTURE : LEAST, largest(room, pictures)),
    [groups, room, most, pictures],
  );
  const chosen = here === null ? undefined : layout.at.get(`${here.index} ${focus(state)}`);
  const list = useRef<HTMLDivElement>(null);
  const [tip, setTip] = useState<(TipAt & { cell: Cell }) | null>(null);
  const found = ({ row, call, head }: Cell) => foundIn(findings, row, stored(call, head));

  const squares = useMemo(
    () =>
      layout.cells.map((cell, i) => (
        <Square
          key={i}
          cell={cell}
          size={layout.size}
          found={found(cell)}
          nothing={findings.missing !== null}
          role={state.role}
          apart={apart}
          framed={pictures}
          chosen={cell === chosen || (chosen === undefined && i === 0)}
          selected={cell === chosen}
        />
      )),
    [layout, findings, state.role, apart, pictures, chosen],
  );
  const pick = (cell: Cell) => {
    app.chosen.value = true;
    app.set({ ...placeOf(app.trace, cell.call), heads: [cell.head], query: null, key: null, zoom: null });
  };
  const find = (event: PointerEvent | MouseEvent): Cell | null => {
    const target = event.target as Element;
    const i = target.getAttribute("data-i");
    return i === null ? null : (layout.cells[Number(i)] ?? null);
  };
  const move = (event: KeyboardEvent) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const from = chosen ?? layout.cells[0];
    if (by === undefined || from === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const next = neighbour(layout, from, by[0]!, by[1]!);
    pick(next);
    list.current!.querySelector<SVGElement>(`[data-i="${next.i}"]`)?.focus();
  };
  return (
    <div class="atlas">
      <div class="heading">
        <h2>All heads</h2>
        <Segments
          name="Heads as"
          value={tiles as Exclude<Tiles, "auto">}
          of={[
            ["squares", "squares", "A square each, in the colour of its role"],
            ["matrix", "matrix", "Each as a small matrix, queries down, keys across"],
            ["lines", "lines", "Each as lines from queries to keys"],
          ]}
          pick={(tiles) => app.set({ tiles })}
        />
      </div>
      <div class="scroll" style={{ maxHeight: `${Math.max(most, 200)}px` }}>
        <div
          ref={list}
          class="plane heads"
          role="listbox"
          aria-label="Heads, layers down, heads across"
          style={{ width: `${layout.width}px`, height: `${layout.height}px`, touchAction: "auto" }}
          onKeyDown={move}
          onClick={(event) => {
            const cell = find(event);
            if (cell !== null) pick(cell);
          }}
          onPointerMove={(event) => {
            const cell = find(event);
            if (cell === tip?.cell) return;
            setTip(
              cell === null
                ? null
                : { cell, x: cell.x + layout.size, y: cell.y + layout.size / 2, text: told(cell, found(cell), findings, apart) },
            );
          }}
          onPointerLeave={() => setTip(null)}
        >
          {pictures && <Pictures app={app} layout={layout} lines={tiles === "lines"} />}
          <svg width={layout.width} height={layout.height} role="presentation">
            {layout.titles.map(({ text, y, heads }) => (
              <g key={y} aria-hidden="true">
                {text && (
                  <text x={0} y={y - 6} font-weight={600}>
                    {text}
                  </text>
                )}
                {headLabels(heads, layout.size).map(({ head, i }) => (
                  <text key={i} class="faint" x={LEFT + (i + 0.5) * layout.size} y={y + 12} text-anchor="middle">
                    {head}
                  </text>
                ))}
                <text class="faint" x={0} y={y + 12}>
                  L\H
                </text>
              </g>
            ))}
            {layout.names.map(({ text, y }) => (
              <text key={y} class="faint" aria-hidden="true" x={LEFT - 6} y={y} text-anchor="end" dominant-baseline="central">
                {text}
              </text>
            ))}
            {squares}
            {chosen !== undefined && (
              <rect
                class="ring"
                x={chosen.x}
                y={chosen.y}
                width={layout.size}
                height={layout.size}
                fill="none"
                stroke="var(--text)"
                stroke-width={layout.size > 12 ? 2.5 : 1.5}
                pointer-events="none"
              />
            )}
          </svg>
          <Tip tip={tip} width={layout.width} />
        </div>
      </div>
      {apart === null ? (
        <Roles app={app} findings={findings} groups={groups} />
      ) : (
        <p class="quiet">
          As strong as the weights are apart (total variation, the mean over the queries; the most is {apart.most.toFixed(2)}
          ).
        </p>
      )}
    </div>
  );
}

/** What is found of a head: of a generation, in the step that stands for it, or in any that was measured. */
function foundIn(findings: Findings, { call, calls }: AtlasRow, place: number): HeadFound | null {
  const of = (c: Call) => findings.heads[c.index]?.[place] ?? null;
  return of(call) ?? calls.map(of).find((f) => f !== null) ?? null;
}

function headLabels(heads: readonly number[], size: number): { head: number; i: number }[] {
  const stride = [1, 2, 4, 8, 16, 32].find((n) => n * size >= NUMBER + (heads.length > 10 ? 4 : 0)) ?? 64;
  return heads.map((head, i) => ({ head, i })).filter(({ i }) => i % stride === 0);
}

/** The nearest head in a direction: in the same row, or in the next row that has any. */
function neighbour({ cells }: Layout, from: Cell, x: number, y: number): Cell {
  const ahead = cells.filter((c) => (x !== 0 ? c.y === from.y && (c.x - from.x) * x > 0 : (c.y - from.y) * y > 0));
  const far = (c: Cell) => Math.abs(c.y - from.y) * 1000 + Math.abs(c.x - from.x);
  return ahead.reduce((best, c) => (best === from || far(c) < far(best) ? c : best), from);
}

function nameOf({ row, head }: Cell): string {
  return row.heads + head;
}

function told(cell: Cell, found: HeadFound | null, findings: Findings, apart: Apart | null): string {
  const name = nameOf(cell);
  if (apart !== null) {
    const value = apart.values.get(`${cell.call.index} ${cell.head}`);
    return value === undefined ? `${name}: not compared` : `${name}: apart by ${value.toFixed(2)}`;
  }
  if (found === null) return `${name}: ${findings.missing === null ? "not measured yet" : "not measured"}`;
  if (found.roles.length === 0) return `${name}: no clear role`;
  const chance = (c: number | null) => (c === null ? "" : ` (uniform ${c.toFixed(2)})`);
  return [`${name}:`, ...found.roles.map((r) => `${r.role} ${r.score.toFixed(2)}${chance(r.chance)}`)].join("\n");
}

function Square(props: {
  cell: Cell;
  size: number;
  found: HeadFound | null;
  nothing: boolean;
  role: string;
  apart: Apart | null;
  /** Whether a picture is inside, so that only the frame has the colour. */
  framed: boolean;
  chosen: boolean;
  selected: boolean;
}) {
  const { cell, size, found, role, apart, framed, chosen, selected } = props;
  const gap = size >= 10 ? 2 : 1;
  const value = apart?.values.get(`${cell.call.index} ${cell.head}`);
  const own = apart === null ? roleOf(found, role) : null;
  const pending = apart === null ? found === null : value === undefined;
  const strength = apart !== null ? (value ?? 0) / (apart.most || 1) : own === null ? 0 : Math.min(1, Math.max(0.3, own.score));
  const colour = apart !== null ? "var(--accent)" : own === null ? "none" : hue(own.role);
  const said = apart !== null ? (value === undefined ? "" : `apart by ${value.toFixed(2)}`) : names(found);
  const box = { x: cell.x + gap / 2, y: cell.y + gap / 2, width: size - gap, height: size - gap };
  const coloured = strength > 0 && colour !== "none";
  return (
    <g>
      <rect
        {...box}
        rx={size >= 10 && !framed ? 2 : 0}
        fill={framed ? "none" : coloured ? colour : "var(--panel)"}
        fill-opacity={coloured && !framed ? strength.toFixed(2) : 1}
        stroke={framed && coloured ? colour : "var(--line)"}
        stroke-width={framed && coloured ? Math.min(4, size / 10) : 1}
        stroke-dasharray={pending && !props.nothing ? "2 2" : undefined}
        pointer-events="none"
      />
      <rect
        x={cell.x}
        y={cell.y}
        width={size}
        height={size}
        fill="transparent"
        role="option"
        class="head"
        data-i={cell.i}
        data-head={`${cell.call.site.layer}.${cell.head}`}
        data-role={own?.role ?? ""}
        data-pending={pending}
        tabindex={chosen ? 0 : -1}
        aria-selected={selected}
        aria-label={`${nameOf(cell)}: ${said || (pending ? "not measured" : "no clear role")}`}
      />
    </g>
  );
}

function names(found: HeadFound | null): string {
  return (found?.roles ?? []).map((r) => `${r.role} ${r.score.toFixed(2)}`).join(", ");
}

/** The roles there are, with how many heads have each; a click leaves those of one alone. */
function Roles({ app, findings, groups }: { app: App; findings: Findings; groups: readonly AtlasGroup[] }) {
  const { role: asked } = app.state.value;
  const counts = new Map<string, number>();
  let none = 0;
  for (const row of groups.flatMap((g) => g.rows))
    for (const place of row.call.headNumbers.keys()) {
      const found = foundIn(findings, row, place);
      if (found !== null && found.roles.length === 0) none++;
      for (const { role } of found?.roles ?? []) counts.set(role, (counts.get(role) ?? 0) + 1);
    }
  const pending = findings.missing === null && findings.done < findings.total;
  return (
    <div class="roles" role="group" aria-label="Roles of heads">
      {inOrder(counts.keys()).map((role) => (
        <button
          key={role}
          type="button"
          aria-pressed={role === asked}
          title={`Show only heads of this role: ${role}`}
          onClick={() => app.set({ role: role === asked ? "" : role })}
        >
          <span class="swatch" style={{ background: hue(role) }} aria-hidden="true" />
          {role} <b>{counts.get(role)}</b>
        </button>
      ))}
      {none > 0 && (
        <span class="quiet">
          <span class="swatch plain" aria-hidden="true" />
          no clear role <b>{none}</b>
        </span>
      )}
      {pending && (
        <span class="quiet" role="status">
          <span class="swatch pending" aria-hidden="true" />
          measuring, {findings.done} of {findings.total}
        </span>
      )}
      {!pending && findings.later > 0 && (
        <span class="quiet">
          <span class="swatch pending" aria-hidden="true" />
          measured when their layer is opened <b>{findings.later}</b>
        </span>
      )}
    </div>
  );
}

/** The heads as small pictures, all on one canvas under the squares. */
function Pictures({ app, layout, lines }: { app: App; layout: Layout; lines: boolean }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const { batch, side, field: asked, sink, filter, scale } = app.state.value;
  const other = side === "b" ? app.other : null;
  const dark = app.dark.value;
  const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
  useEffect(() => {
    const stop = new AbortController();
    const { width, height, size, cells } = layout;
    const element = canvas.current!;
    [element.width, element.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const context = element.getContext("2d")!;
    const ink = getComputedStyle(element).color;
    const wide = Math.max(1, Math.round((size - 4) * ratio));
    const small = document.createElement("canvas");
    [small.width, small.height] = [wide, wide];
    const one = async (cell: Cell) => {
      const { head } = cell;
      const call = other === null ? cell.call : twinOf(app.trace, other, cell.call);
      if (call === null || !call.headNumbers.includes(head)) return;
      const trace = other ?? app.trace;
      const field = weightsOf(call, asked);
      if (!trace.has(call, field)) return;
      const place = Math.min(batch, call.extents.B - 1);
      const made = await thumbnail(trace, call, field, place, stored(call, head), sink, filter, 96, stop.signal);
      if (stop.signal.aborted) return;
      const box = { x: Math.round((cell.x + 2) * ratio), y: Math.round((cell.y + 2) * ratio), width: wide, height: wide };
      context.clearRect(box.x, box.y, wide, wide);
      if (lines) return drawLines(context, made, ink, box);
      const d = domain(field, scale, ...made.extent, made.end);
      draw(small, [made.matrix], whole(made.matrix.cols, made.matrix.rows), d, ramp(d.kind, dark));
      context.drawImage(small, box.x, box.y);
    };
    // What cannot be read is an empty square; the chosen head says why.
    for (const cell of cells) one(cell).catch(() => undefined);
    return () => stop.abort();
  }, [app, layout, lines, batch, other, asked, sink, filter, scale, dark, ratio]);
  return (
    <canvas
      ref={canvas}
      aria-hidden="true"
      style={{ width: `${layout.width}px`, height: `${layout.height}px`, color: "var(--accent)" }}
    />
  );
}
