/** How far the heads of two traces are apart, while their difference is shown. */
import type { App } from "../../app";
import { apart } from "../../data/apart";
import type { AtlasGroup } from "../../data/atlas";
import { fieldOf } from "../../data/kinds";
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
        const field = fieldOf(call, "weights");
        for (const { head, variation, largest } of await apart(app.trace, app.other!, call, field, batch, null, slices)) {
          const value = Number.isNaN(variation) ? largest : variation;
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
