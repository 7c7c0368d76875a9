/** Which query a view of one query shows, and the control that chooses it. */
import { type App, current } from "../app";
import { Slider } from "./inputs";
import { name } from "./table";

/** The locked query, else the last. */
export function queryOf(app: App): number {
  return app.state.value.query ?? current(app).call.extents.T - 1;
}

export function QueryControl({ app }: { app: App }) {
  const { call, axes } = current(app);
  return (
    <Slider
      name="Query"
      values={Array.from({ length: call.extents.T }, (_, t) => t)}
      value={queryOf(app)}
      text={(t) => name(axes.queries, t)}
      pick={(query) => app.set({ query })}
    />
  );
}
