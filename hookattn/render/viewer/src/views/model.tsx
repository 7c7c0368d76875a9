import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { type App, current, focus, stored } from "../app";
import { domain, look, ramp } from "../colours";
import type { Call } from "../data/call";
import { whole } from "../data/frame";
import { fieldOf } from "../data/kinds";
import { type Thumbnail, thumbnail } from "../data/thumbnail";
import { number } from "../format";
import { type Measure, measures, rolesOf } from "../options";
import { placeOf } from "../state";
import { draw } from "../ui/heatmap";
import { drawLines } from "../ui/thumblines";
import { useLoaded, useWidth } from "../ui/hooks";
import { editsOfHead, tell } from "../data/edits";
import { Badge, Edits } from "../ui/notice";
import type { View } from "./view";

const PIXELS = 96;
const GAP = 6;

interface Item {
  call: Call;
  /** The model's number of the head. */
  head: number;
  value: number | null;
}

function Model({ app }: { app: App }) {
  const state = app.state.value;
  const [ref, room] = useWidth();
  const calls = app.trace.calls
    .filter((c) => c.step === state.step && c.site.stack === state.stack && c.site.kind === state.kind)
    .sort((a, b) => (a.site.layer ?? -1) - (b.site.layer ?? -1) || a.index - b.index);
  const measure = measures(app.options.scores).find(([name]) => name === state.sort)?.[1] ?? null;
  const items = calls.flatMap((call) =>
    call.headNumbers.map((head): Item => ({ call, head, value: valueOf(measure, call, head) })),
  );
  const shown =
    measure === null
      ? items
      : items
          .filter((i) => i.value !== null && (state.least === null || i.value >= state.least))
          .sort((a, b) => b.value! - a.value!);
  const columns = Math.max(1, ...calls.map((c) => c.headNumbers.length));
  const side = measure === null ? 76 : 0;
  const least = measure === null ? 44 : 84;
  const tile = Math.max(least, Math.min(116, Math.floor((room - side - 4) / Math.max(columns, 6)) - GAP));
  const many = Math.max(1, Math.floor(room / (tile + GAP)));
  const grid =
    measure === null
      ? `${side - GAP}px repeat(${columns}, ${tile}px)`
      : `repeat(${Math.min(many, Math.max(1, shown.length))}, ${tile}px)`;
  const item = (i: Item) => (
    <Tile key={`${i.call.index} ${i.head}`} app={app} item={i} measure={measure} width={tile} />
  );
  return (
    <div ref={ref}>
      {room > 0 && (
        <div class="grid" style={{ gridTemplateColumns: grid, gap: `8px ${GAP}px` }}>
          {measure === null
            ? calls.map((call) => [
                <div key={call.index} class="row-name">
                  <div class="label" title={call.site.path}>
                    {rowName(call, calls)}
                  </div>
                  <Badge call={call} short /> <Edits call={call} short />
                </div>,
                ...Array.from({ length: columns }, (_, i) => {
                  const found = call.headNumbers[i];
                  return found === undefined ? (
                    <span key={`none ${call.index} ${i}`} />
                  ) : (
                    item({ call, head: found, value: null })
                  );
                }),
              ])
            : shown.map(item)}
        </div>
      )}
      <p class="readout quiet">
        {measure === null
          ? `${items.length} heads, each in a colour scale of its own, what is masked hatched; click one to see its matrix`
          : `${shown.length} of ${items.length} heads. ${measure.description}`}
      </p>
    </div>
  );
}

function rowName(call: Call, calls: readonly Call[]): string {
  const { layer, path } = call.site;
  const alone = layer !== null && calls.filter((c) => c.site.layer === layer).length === 1;
  return alone ? `Layer ${layer}` : path.split(".").slice(-2).join(".") || "model";
}

function valueOf(measure: Measure | null, call: Call, head: number): number | null {
  return measure?.values[call.index]?.[stored(call, head)] ?? null;
}

function Tile({ app, item, measure, width }: { app: App; item: Item; measure: Measure | null; width: number }) {
  const { call, head, value } = item;
  const state = app.state.value;
  const ref = useRef<HTMLButtonElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const seen = useSeen(ref);
  const { batch, sink, filter, scale, thumbs } = state;
  const field = fieldOf(call, state.field);
  const { value: small, error } = useLoaded(
    async (signal) => {
      if (!seen) return null;
      if (!app.trace.has(call, field)) throw app.trace.lacks(field, call);
      return thumbnail(
        app.trace,
        call,
        field,
        Math.min(batch, call.extents.B - 1),
        stored(call, head),
        sink,
        filter,
        PIXELS,
        signal,
      );
    },
    [app, call, head, batch, field, sink, filter, seen],
  );
  const dark = app.dark.value;
  useLayoutEffect(() => {
    if (canvas.current === null || small === null) return;
    if (thumbs === "lines" && field !== "scores" && field !== "mask") return lines(canvas.current, small, head);
    const d = domain(field, scale, ...small.extent, small.end);
    const ratio = canvas.current.width / (canvas.current.clientWidth || canvas.current.width);
    draw(canvas.current, [small.matrix], whole(small.matrix.cols, small.matrix.rows), d, ramp(d.kind, dark), ratio);
  }, [small, scale, thumbs, head, field, dark]);
  const roles = rolesOf(app.options.scores, call.index, stored(call, head));
  const place = `layer ${call.site.layer ?? call.site.path}, head ${head}`;
  const here = current(app).call === call && focus(state) === head;
  const edits = editsOfHead(call, head).map((edit) => `edited: ${tell(edit)}`);
  const said = value === null ? "" : `, ${number(value)}${measure?.unit ? ` ${measure.unit}` : ""}`;
  return (
    <button
      ref={ref}
      type="button"
      class="tile"
      style={{ width: `${width}px` }}
      aria-current={here}
      title={[place + said, ...edits, ...roles, error ?? ""].filter(Boolean).join("\n")}
      onClick={(event) => {
        // The tile goes with its view: the keys are to go on working.
        event.currentTarget.closest<HTMLElement>(".ha")?.focus({ preventScroll: true });
        app.set({
          ...placeOf(app.trace, call),
          heads: [head],
          query: null,
          key: null,
          zoom: null,
          view: "matrix",
        });
      }}
    >
      <canvas ref={canvas} width={2 * PIXELS} height={2 * PIXELS} />
      <span class="hidden">{place}: </span>
      <span class="label">
        {measure === null ? (width < 70 ? head : `head ${head}`) : `${call.site.layer ?? "–"}.${head}`}
        {value !== null && ` · ${number(value)}`}
        {edits.length > 0 && <span class="mark">✎</span>}
      </span>
      {roles.map((role) => (
        <span key={role} class="value label">
          {" "}
          <span class="role">{role}</span>
        </span>
      ))}
    </button>
  );
}

/** In the colour that the head has everywhere. */
function lines(canvas: HTMLCanvasElement, small: Thumbnail, head: number): void {
  const context = canvas.getContext("2d")!;
  context.clearRect(0, 0, canvas.width, canvas.height);
  const colour = getComputedStyle(canvas).getPropertyValue(look(head).colour.slice(4, -1));
  drawLines(context, small, colour, { x: 0, y: 0, width: canvas.width, height: canvas.height });
}

/** Whether an element has been in view, or nearly. */
function useSeen(ref: { current: Element | null }): boolean {
  const [seen, setSeen] = useState(false);
  useEffect(() => {
    if (seen) return;
    const observer = new IntersectionObserver((entries) => entries.some((e) => e.isIntersecting) && setSeen(true), {
      rootMargin: "200px",
    });
    observer.observe(ref.current!);
    return () => observer.disconnect();
  }, [seen]);
  return seen;
}

export const model: View = {
  id: "model",
  label: "Model",
  help:
    "Every head of the model as a thumbnail, layers down, heads across. Order and filter them by what an analyzer " +
    "measured; click one to see its matrix.",
  fields: (state) => [state.field],
  controls: ["field", "filter", "sort", "scale", "sink", "thumbs"],
  component: Model,
};
