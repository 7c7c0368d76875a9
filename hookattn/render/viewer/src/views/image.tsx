import { useState } from "preact/hooks";
import { type App, current } from "../app";
import { domain, look, ramp } from "../colours";
import { where } from "../data/call";
import { weightsOf } from "../data/kinds";
import { axesOver, headsOver, nameOver, rowOver, shownOver } from "../data/over";
import { ofPatches, patches, place } from "../data/patches";
import { presented } from "../data/presented";
import { exact } from "../format";
import { useLoaded, useWidth } from "../ui/hooks";
import { Legend } from "../ui/legend";
import { Notice } from "../ui/notice";
import { Panel, Picker, type Place } from "../ui/patches";
import { usePicture } from "../ui/picture";
import { QueryControl, queryOf } from "../ui/query";
import { name, Tabular } from "../ui/table";
import type { View } from "./view";

const GAP = 14;
const LISTED = 24;

function Image({ app }: { app: App }) {
  const state = app.state.value;
  const { batch, sink, scale, over } = state;
  const { images } = app.options;
  const { call, axes } = current(app);
  const field = weightsOf(call, state.field);
  const [ref, room] = useWidth();
  const [at, setAt] = useState<Place | null>(null);
  const { T, S, B } = call.extents;
  const keys = ofPatches(call, app.options) ? patches(S, images) : null;
  // Queries that stand in the same sequence as the keys lie where these do, all of them or a part.
  const self = call.site.kind === "self";
  const queries = !self ? null : call.queries !== null ? keys : patches(T, images);
  const center = queries === null ? 0 : Math.floor(queries.rows / 2) * queries.cols + Math.floor(queries.cols / 2);
  const first = queries === null ? 0 : queries.prefix > 0 ? 0 : center;
  const query = queries === null ? queryOf(app) : (state.query ?? Math.min(first, T - 1));
  const numbers = state.heads.toSorted((a, b) => a - b).join();
  const { picture, failed } = usePicture(images !== undefined && images.urls.length === B ? images.urls[batch] : undefined);
  const { value, error } = useLoaded(
    async () => {
      const asked = numbers.split(",").map(Number);
      const groups = over === "one" ? asked.map((head) => [head]) : [asked];
      const masks: boolean[] = [];
      const rows = await Promise.all(
        groups.map(async (group): Promise<ArrayLike<number>> => {
          const shown =
            sink === "show"
              ? await rowOver(app.trace, call, field, batch, group, over, query)
              : await shownOver(app.trace, call, field, batch, group, over);
          masks.push(shown.masks);
          const { rows: count, cols, data } = presented(shown.matrix, field, sink, "all", axesOver(call, field, axes));
          // What goes to a sink is on no patch.
          return data.slice(count > 1 ? query * cols : 0, (count > 1 ? query * cols : 0) + S);
        }),
      );
      const heads = groups.map((group) => headsOver(call, group, over)[0]!);
      return { call, field, heads, names: groups.map((group) => nameOver(call, group, over)), rows, masks: masks.includes(true) };
    },
    [app, call, field, batch, numbers, over, query, sink],
  );
  if (keys === null) return <Notice>{why(app)}</Notice>;
  if (error !== null) return <Notice error>{error}</Notice>;
  if (value === null || value.call !== call || room === 0)
    return (
      <div ref={ref} class="quiet">
        Reading …
      </div>
    );
  const { heads, names, rows } = value;
  const blank = value.masks ? (sink === "show" ? "masked" : "masked or left out") : "left out";
  const dark = app.dark.value;
  const strongest = Math.max(...rows.map((row) => most(row, keys.prefix)));
  const weakest = Math.min(0, ...rows.map((row) => -most(Array.from(row, (x) => -x), keys.prefix)));
  const scaling = domain(value.field, scale, weakest, strongest);
  const colours = ramp(weakest < 0 ? "diverging" : picture === null ? "sequential" : "heat", dark);
  const large = room > 2400 ? 1.6 : 1;
  const wanted = large * (heads.length === 1 ? 400 : heads.length <= 4 ? 280 : 200);
  const panels = heads.length + (queries === null ? 0 : 1);
  const fit = Math.max(2, Math.floor((room + GAP) / (0.8 * wanted + GAP)));
  const columns = Math.ceil(panels / Math.ceil(panels / fit));
  const width = Math.min(wanted, Math.floor((room - (columns - 1) * GAP) / columns));
  const asked = queries === null ? name(axes.queries, query) : place(axes.queries.positions[query]!, queries);
  const { positions } = axes.queries;
  const pick = (position: number) => {
    const found = queries === null ? -1 : positions.indexOf(position);
    if (found >= 0) app.set({ query: found });
    return found >= 0;
  };
  const shared = { width, keys, picture, dark, at, setAt, pick };
  return (
    <div ref={ref}>
      {queries === null && <QueryControl app={app} />}
      {failed && <Notice>The picture cannot be read: what is drawn is the grid of its patches.</Notice>}
      <div class="panels" style={{ gap: `${GAP}px` }}>
        {queries !== null && (
          <Picker
            {...shared}
            patches={queries}
            here={positions[query]!}
            has={(position) => positions.includes(position)}
            told={asked}
          />
        )}
        {heads.map((head, i) => (
          <Panel
            key={head}
            {...shared}
            head={head}
            name={names[i]!}
            blank={blank}
            weights={rows[i]!}
            domain={scaling}
            ramp={colours}
            query={self ? positions[query]! : null}
            colour={look(head).colour}
          />
        ))}
      </div>
      <div class="foot">
        <Legend domain={scaling} ramp={colours} dropped={sink !== "show" || value.masks} blank={blank} title={`${value.field} of the patches, ${names.length === 1 ? names[0] : "all heads"}`} />
      </div>
      <div class="readout quiet">
        {at === null
          ? `${keys.rows} × ${keys.cols} patches${keys.prefix > 0 ? ` after ${keys.prefix === 1 ? "a class token" : `${keys.prefix} tokens`}` : ""}` +
            `${keys.guessed ? `, taken from the number of keys, ${S}` : ""}; hover over a patch for its weights`
          : `${asked} → ${place(at.key, keys)}: ` +
            names.map((of, i) => `${of} ${told(rows[i]![at.key]!, blank)}`).join(" · ")}
      </div>
      <div aria-live="polite">
        <Tabular
          summary={`The strongest keys of ${asked}, in ${names.length === 1 ? names[0] : "each head"}`}
          columns={[over === "one" ? "head" : "heads", "key", value.field]}
          rows={listed(rows).map(({ of, key, value: x }) => [over === "one" ? String(heads[of]) : names[of]!, place(key, keys), x])}
        />
      </div>
    </div>
  );
}

function told(weight: number, blank: string): string {
  return Number.isNaN(weight) ? blank : exact(weight);
}

function most(row: ArrayLike<number>, from: number): number {
  let most = 0;
  for (let s = from; s < row.length; s++) if (row[s]! > most) most = row[s]!;
  return most;
}

/** The strongest keys of each head, head by head. */
function listed(rows: readonly ArrayLike<number>[]): { of: number; key: number; value: number }[] {
  const each = Math.max(3, Math.floor(LISTED / rows.length));
  return rows.flatMap((row, of) =>
    Array.from(row, (value, key) => ({ of, key, value }))
      .filter(({ value }) => !Number.isNaN(value))
      .sort((a, b) => b.value - a.value)
      .slice(0, each),
  );
}

function why(app: App): string {
  const { call } = current(app);
  if (!ofPatches(call, app.options))
    return `The keys of ${where(call)} are no patches of a picture. Choose the attention of a vision stack above.`;
  return (
    `The ${call.extents.S} keys of ${where(call)} are not a square of patches with a few tokens before it. ` +
    'Say how they lie: images={"urls": […], "grid": (rows, columns), "prefix": tokens before the first patch}.'
  );
}

export const image: View = {
  id: "image",
  label: "Image",
  help:
    "What one query attends to, drawn over the patches of the picture, a panel for each head. Click a patch, or a " +
    "token beside the picture, to make it the query; arrow keys move it while the picture has the focus.",
  fields: () => ["weights"],
  controls: ["layer", "weights", "heads", "over", "scale", "sink"],
  shows: "heads",
  ownTable: true,
  absent: (app) =>
    app.trace.calls.some((call) => ofPatches(call, app.options)) ? null : "No call attends to patches of a picture.",
  component: Image,
};
