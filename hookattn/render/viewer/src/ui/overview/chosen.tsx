/** The chosen head: what it does in a sentence, and its matrix, or the picture whose patches it looks at. */
import { computed } from "@preact/signals";
import { useMemo, useState } from "preact/hooks";
import { type App, stored } from "../../app";
import { type Domain, domain, ramp } from "../../colours";
import { at, thereOf } from "../../data/matrix";
import { nameOver } from "../../data/over";
import { ofPatches, patches, place as patchName } from "../../data/patches";
import { hue, roleOf } from "../../data/rolewords";
import { absence } from "../../data/shown";
import { headName, pairSentence } from "../../data/sentences";
import { number } from "../../format";
import { useFrame } from "../frame";
import { Legend } from "../legend";
import { Notice } from "../notice";
import { Panel, Picker, type Place } from "../patches";
import { usePicture } from "../picture";
import { levelOf, place, Plane } from "../plane";
import { name } from "../table";
import { two } from "./numbers";
import type { Scene } from "./scene";

export function ChosenHead({ app, scene, room, most }: { app: App; scene: Scene; room: number; most: number }) {
  const { call, head, error, numbers, reading } = scene;
  return (
    <div class="chosen" aria-busy={reading}>
      <div class="heading">
        <h2>The chosen head</h2>
      </div>
      <p class="sentence" aria-live="polite">
        <Sentence app={app} scene={scene} />
      </p>
      {error !== null ? (
        <Notice error>{error}</Notice>
      ) : numbers === null ? (
        <div class="quiet" style={{ minHeight: `${Math.min(most, room)}px` }}>
          Reading {headName(scene.trace, call, stored(call, head))} …
        </div>
      ) : ofPatches(call, app.options) && patches(call.extents.S, app.options.images) !== null && scene.other === null ? (
        <Patches app={app} scene={scene} room={room} />
      ) : (
        <Numbers app={app} scene={scene} room={room} most={most} />
      )}
    </div>
  );
}

/** `L1H2 · induction · from the 2nd “43” it looks at what followed the 1st “43”, 1.00`. */
function Sentence({ app, scene }: { app: App; scene: Scene }) {
  const { call, head, found, sheet, numbers, row, column } = scene;
  const { over, heads } = app.state.value;
  // What was found is of one head.
  const alone = scene.other === null && over === "one";
  const roles = alone ? (found?.roles ?? []) : [];
  const shown = alone ? (roleOf(found, app.state.value.role) ?? roles[0] ?? null) : null;
  const keys = ofPatches(call, app.options) ? patches(call.extents.S, app.options.images) : null;
  const value =
    numbers === null || row === null || column === null || row >= thereOf(numbers.matrix)
      ? null
      : at(numbers.matrix, row, column);
  const pair = () => {
    if (row === null || column === null || value === null) return "";
    const [from, to] =
      keys === null
        ? [name(sheet.axes.queries, row), name(sheet.axes.keys, column)]
        : [call.site.kind === "self" ? patchName(row, keys) : name(sheet.axes.queries, row), patchName(column, keys)];
    if (numbers!.of !== null) {
      const [a, b] = numbers!.of.map((m) => at(m, row, column));
      return `from ${from} to ${to}: ${two(a!)} in A, ${two(b!)} in B, ${two(value)} apart`;
    }
    if (Number.isNaN(value)) return `from ${from} it may not look at ${to}`;
    if (Math.abs(value) < 0.1) return `from ${from} it gives ${to} ${two(value)}`;
    const told = keys === null ? pairSentence(shown?.role ?? null, sheet.axes, row, column) : `from ${from} it looks at ${to}`;
    return `${told}, ${two(value)}`;
  };
  const side = app.other === null ? "" : { a: "A", b: "B", difference: "B − A" }[app.state.value.side];
  return (
    <>
      <b>
        {over === "one"
          ? headName(scene.trace, call, stored(call, head))
          : `Layer ${call.site.layer ?? call.site.path}, ${nameOver(call, heads, over)}`}
      </b>
      {side && ` · ${side}`}
      {shown !== null && (
        <>
          {" · "}
          <span class="swatch" style={{ background: hue(shown.role) }} aria-hidden="true" />
          {shown.role} {two(shown.score)}
        </>
      )}
      {shown === null && alone && found !== null && " · no clear role"}
      {value !== null && ` · ${pair()}`}
    </>
  );
}

function Numbers({ app, scene, room, most }: { app: App; scene: Scene; room: number; most: number }) {
  const { sheet, numbers: made, field, call, head, row, column } = scene;
  const { matrix, levels, range, masked, left, of } = made!;
  const { low, high, end } = range;
  const [frame, setFrame] = useFrame(app);
  // The plane speaks of the sheet: its rows may be queries of many steps.
  const shown = useMemo<App>(
    () => ({
      ...app,
      state: computed(() => ({ ...app.state.value, query: row, key: column })),
      set: ({ query, key }) => scene.pick(query ?? null, key ?? null),
    }),
    [app, row, column, sheet],
  );
  const layout = place(matrix.rows, matrix.cols, sheet.axes, room, Math.max(160, most - 170), frame);
  const far = Math.max(-low, high) || 1;
  const scaling: Domain =
    of === null
      ? domain(field, app.state.value.scale, low, high, end)
      : { kind: "diverging", scale: "linear", low: -far, high: far, clipped: false };
  const size = 2 ** levelOf(levels, layout);
  const colours = ramp(scaling.kind, app.dark.value);
  return (
    <>
      <Plane
        app={shown}
        levels={levels}
        axes={sheet.axes}
        layout={layout}
        frame={frame}
        setFrame={setFrame}
        domain={scaling}
        ramp={colours}
        label={`${field} of ${headName(scene.trace, call, stored(call, head))}, queries down, keys across`}
        told={(query, key) => {
          const value = at(matrix, query, key);
          const said = Number.isNaN(value) ? absence({ matrix, masks: masked }, query, key) : number(value);
          return [
            `query ${name(sheet.axes.queries, query)}`,
            `key ${name(sheet.axes.keys, key)}`,
            `${of === null ? field : "B − A"} ${said}`,
          ].join("\n");
        }}
      />
      <Legend
        domain={scaling}
        ramp={colours}
        dropped={masked || left}
        blank={masked ? (left ? "masked or left out" : "masked") : "left out"}
        title={`${of === null ? field : "B − A"}, ${nameOver(call, app.state.value.heads, app.state.value.over)}${size > 1 ? `, the largest of ${size}×${size}` : ""}`}
      />
    </>
  );
}

/** The picture: the patch that asks, and what it looks at. */
function Patches({ app, scene, room }: { app: App; scene: Scene; room: number }) {
  const { call, sheet, numbers, field, head, row, batch } = scene;
  const [at, setAt] = useState<Place | null>(null);
  const { images } = app.options;
  const { picture, failed } = usePicture(images?.urls.length === call.extents.B ? images.urls[batch] : undefined);
  const keys = patches(call.extents.S, images)!;
  const self = call.site.kind === "self";
  const { positions } = sheet.axes.queries;
  const query = row ?? 0;
  const { cols, data } = numbers!.matrix;
  const weights = Float64Array.from(data.subarray(query * cols, (query + 1) * cols));
  let strongest = 0;
  for (let s = keys.prefix; s < weights.length; s++) if (weights[s]! > strongest) strongest = weights[s]!;
  const scaling = domain(field, app.state.value.scale, Math.min(0, ...weights), strongest);
  const colours = ramp(scaling.kind === "diverging" ? "diverging" : picture === null ? "sequential" : "heat", app.dark.value);
  const apart = room >= 420 && self;
  const width = Math.min(420, apart ? Math.floor((room - 14) / 2) : room);
  const pick = (position: number) => {
    const found = self ? positions.indexOf(position) : -1;
    if (found >= 0) scene.pick(found, null);
    return found >= 0;
  };
  const shared = { width, keys, picture, dark: app.dark.value, at, setAt, pick };
  return (
    <>
      {failed && <Notice>The picture cannot be read: what is drawn is the grid of its patches.</Notice>}
      <div class="panels" style={{ gap: "14px" }}>
        {self && (
          <Picker
            {...shared}
            patches={keys}
            here={positions[query]!}
            has={(position) => positions.includes(position)}
            told={patchName(positions[query]!, keys)}
          />
        )}
        <Panel
          {...shared}
          head={head}
          name={nameOver(call, app.state.value.heads, app.state.value.over)}
          blank={numbers!.masked ? "masked" : "left out"}
          weights={weights}
          domain={scaling}
          ramp={colours}
          query={self ? positions[query]! : null}
          colour="transparent"
        />
      </div>
      <p class="readout quiet">
        {at === null
          ? images === undefined
            ? "The grid of the patches; the picture itself is shown with images=."
            : "Click a patch to see what it looks at."
          : `${patchName(at.key, keys)}: ${number(weights[at.key]!)}`}
      </p>
      <Legend domain={scaling} ramp={colours} dropped={false} title={`${field} of the patches`} />
    </>
  );
}
