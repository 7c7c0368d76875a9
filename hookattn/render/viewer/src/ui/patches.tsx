/** The panels of the image view: the picture in which the query is chosen, and the weights of a head over it. */
import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";
import { type Domain, type Ramp } from "../colours";
import { type Patches, place } from "../data/patches";
import { number } from "../format";
import { drawPicture, drawWeights } from "./picture";

/** The key that the pointer is at. */
export interface Place {
  key: number;
}

interface Shared {
  width: number;
  keys: Patches;
  picture: HTMLImageElement | null;
  dark: boolean;
  at: Place | null;
  setAt(at: Place | null): void;
  /** Makes the entry of the sequence the query; false if its row is not in the trace. */
  pick(position: number): boolean;
}

/** A canvas of the patches' shape with marks above it; `find` gives the place in the sequence under the pointer. */
function Plane(props: {
  patches: Patches;
  width: number;
  label: string;
  draw(canvas: HTMLCanvasElement): void;
  marks: ComponentChildren;
  onAt(at: number | null): void;
  onPick(at: number): unknown;
}) {
  const { patches, label, draw, marks } = props;
  const { rows, cols, prefix } = patches;
  const [width, height] = size(props.width, patches);
  const ref = useRef<HTMLCanvasElement>(null);
  useLayoutEffect(() => {
    const canvas = ref.current!;
    const ratio = globalThis.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    draw(canvas);
  });
  const find = (event: PointerEvent | MouseEvent) => {
    const box = ref.current!.getBoundingClientRect();
    const col = Math.floor(((event.clientX - box.left) / box.width) * cols);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return col >= 0 && col < cols && row >= 0 && row < rows ? prefix + row * cols + col : null;
  };
  return (
    <div
      class="plane"
      style={{ width: `${width}px`, height: `${height}px`, touchAction: "auto" }}
      onPointerMove={(event) => props.onAt(find(event))}
      onPointerLeave={() => props.onAt(null)}
      onClick={(event) => {
        const found = find(event);
        if (found !== null) props.onPick(found);
      }}
    >
      <canvas ref={ref} style={{ width: `${width}px`, height: `${height}px` }} role="img" aria-label={label} />
      <svg width={width} height={height} aria-hidden="true">
        <rect x={0.5} y={0.5} width={width - 1} height={height - 1} fill="none" stroke="var(--line)" />
        {marks}
      </svg>
    </div>
  );
}

function size(most: number, { rows, cols }: Patches): [number, number] {
  return rows > cols ? [Math.round((most * cols) / rows), most] : [most, Math.round((most * rows) / cols)];
}

/** The outline of one patch: light within dark, so that it is seen on any picture. */
function Mark({ at, patches, most, colour }: { at: number | null; patches: Patches; most: number; colour: string }) {
  const { rows, cols, prefix } = patches;
  if (at === null || at < prefix || at >= prefix + rows * cols) return null;
  const [width, height] = size(most, patches);
  const [row, col] = [Math.floor((at - prefix) / cols), (at - prefix) % cols];
  const box = { x: (col * width) / cols, y: (row * height) / rows, width: width / cols, height: height / rows };
  return (
    <g fill="none">
      <rect {...box} stroke="#000000" stroke-width={4} stroke-opacity={0.6} />
      <rect {...box} stroke={colour} stroke-width={2} />
    </g>
  );
}

const QUERY = "#ffffff";
const POINTER = "#ff9d5c";

/** Where the query is chosen: a patch, or one of the tokens before them. */
export function Picker({
  width: most,
  patches,
  has,
  picture,
  here,
  told,
  dark,
  pick,
}: Shared & { patches: Patches; here: number; has(position: number): boolean; told: string }) {
  const { rows, cols, prefix } = patches;
  const [width, height] = size(most, patches);
  const lines = cols <= 40 && rows <= 40;
  return (
    <div
      class="panel"
      tabIndex={0}
      role="group"
      aria-label={`The query: ${told}. Arrow keys move it over the patches.`}
      onKeyDown={(event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -cols, ArrowDown: cols }[event.key];
        if (by === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
        const i = here - prefix;
        const sideways = Math.abs(by) === 1 && cols > 1;
        const fits = sideways ? Math.floor((i + by) / cols) === Math.floor(i / cols) : true;
        const next = here < prefix ? prefix : fits ? here + by : here;
        if (next >= prefix && next < prefix + rows * cols) pick(next);
        event.preventDefault();
        event.stopPropagation();
      }}
    >
      <div class="label">query: {told}</div>
      <Plane
        patches={patches}
        width={most}
        label={`The ${picture === null ? "grid" : "picture"} of ${rows} × ${cols} patches`}
        draw={(canvas) => {
          if (picture !== null) return drawPicture(canvas, picture);
          const context = canvas.getContext("2d")!;
          context.fillStyle = dark ? "#2a2f36" : "#eef0f3";
          context.fillRect(0, 0, canvas.width, canvas.height);
        }}
        marks={
          <>
            {lines && (
              <path
                d={
                  Array.from({ length: cols - 1 }, (_, i) => `M${((i + 1) * width) / cols} 0V${height}`).join("") +
                  Array.from({ length: rows - 1 }, (_, i) => `M0 ${((i + 1) * height) / rows}H${width}`).join("")
                }
                stroke={picture === null ? "var(--line)" : "#ffffff"}
                stroke-opacity={picture === null ? 1 : 0.25}
                fill="none"
              />
            )}
            <Mark at={here} patches={patches} most={most} colour={QUERY} />
          </>
        }
        onAt={() => undefined}
        onPick={pick}
      />
      <div class="chips">
        {Array.from({ length: prefix }, (_, i) => (
          <button
            key={i}
            type="button"
            class="token"
            aria-pressed={here === i}
            disabled={!has(i)}
            onClick={() => pick(i)}
          >
            {place(i, patches)}
          </button>
        ))}
      </div>
    </div>
  );
}

/** The weights of one head. */
export function Panel({
  width,
  keys,
  picture,
  at,
  setAt,
  head,
  name,
  blank,
  weights,
  domain,
  ramp,
  query,
  colour,
  pick,
}: Shared & { head: number; name: string; blank: string; weights: ArrayLike<number>; domain: Domain; ramp: Ramp; query: number | null; colour: string }) {
  let inside = 0;
  for (let s = keys.prefix; s < weights.length; s++) inside += weights[s]! || 0;
  const before = Array.from({ length: Math.min(keys.prefix, 5) }, (_, i) => i);
  return (
    <div class="panel" data-head={head}>
      <div class="label" style={{ borderColor: colour }}>
        {name}
      </div>
      <Plane
        patches={keys}
        width={width}
        label={`Weights of ${name} over the patches`}
        draw={(canvas) => drawWeights(canvas, weights, keys, domain, ramp, picture)}
        marks={
          <>
            <Mark at={query} patches={keys} most={width} colour={QUERY} />
            <Mark at={at?.key ?? null} patches={keys} most={width} colour={POINTER} />
          </>
        }
        onAt={(key) => setAt(key === null ? null : { key })}
        onPick={pick}
      />
      <div class="label faint">patches {number(inside)}</div>
      {before.map((i) => (
        <div key={i} class="label faint">
          {place(i, keys)} {Number.isNaN(weights[i]!) ? blank : number(weights[i]!)}
        </div>
      ))}
    </div>
  );
}
