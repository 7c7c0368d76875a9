/** How far the heads of two traces are apart, while their difference is shown. */
import type { App } from "../../app";
import { stored } from "../../app";
import type { AtlasGroup } from "../../data/atlas";
import { areShares, fieldOf } from "../../data/kinds";
import { distance, misfit, twinOf } from "../../data/pairs";
import { Slices } from "../../slices";
import { useLoaded } from "../hooks";
import type { Apart } from "./atlas";

export function useApart(app: App, groups: readonly AtlasGroup[]): Apart | null {
  const { side, batch } = app.state.value;
  const asked = app.other !== null && side === "difference";
  const { value } = useLoaded(
    async (signal, show: (made: Apart | null) => void): Promise<Apart | null> => {
      if (!asked) return null;
      const slices = new Slices(10, signal);
      const values = new Map<string, number>();
      const made = (): Apart => ({ values: new Map(values), most: Math.max(0, ...values.values()) });
      for (const { call } of groups.flatMap((g) => g.rows)) {
        const twin = twinOf(app.trace, app.other!, call);
        const field = fieldOf(call, "weights");
        if (twin === null || misfit(call, twin) !== null || !app.trace.has(call, field) || !app.other!.has(twin, field)) continue;
        const [one, two] = [call, twin].map((c) => Math.min(batch, c.extents.B - 1)) as [number, number];
        for (const head of call.headNumbers.filter((h) => twin.headNumbers.includes(h))) {
          const [a, b] = [stored(call, head), stored(twin, head)];
          const masks = await Promise.all([
            app.trace.has(call, "mask") ? app.trace.optional(call, "mask", one, a) : null,
            app.other!.has(twin, "mask") ? app.other!.optional(twin, "mask", two, b) : null,
          ]);
          const [p, q] = await Promise.all([app.trace.head(call, field, one, a), app.other!.head(twin, field, two, b)]);
          const far = await distance(p, q, masks, slices, areShares(call, field) && areShares(twin, field));
          const value = Number.isNaN(far.variation) ? far.largest : far.variation;
          if (!Number.isNaN(value)) values.set(`${call.index} ${head}`, value);
        }
        show(made());
      }
      return made();
    },
    [app, groups, asked, batch],
  );
  return asked ? (value ?? { values: new Map(), most: 0 }) : null;
}
