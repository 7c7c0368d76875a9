/** The first screen: what there is, which heads do what, one head, one of its weights and the reason for it. */
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { type App, current } from "../app";
import { atlasOf } from "../data/atlas";
import { fromTwins } from "../data/pairs";
import { ofPatches } from "../data/patches";
import { generation } from "../data/sheet";
import { placeOf, type Side } from "../state";
import { useWidth } from "../ui/hooks";
import { Segments } from "../ui/inputs";
import { useApart } from "../ui/overview/apart";
import { Atlas } from "../ui/overview/atlas";
import { ChosenHead } from "../ui/overview/chosen";
import { linesOf, TokenLine } from "../ui/overview/line";
import { isLarge, useScene } from "../ui/overview/scene";
import { ChosenToken } from "../ui/overview/token";
import { headline } from "../data/sentences";
import type { View } from "./view";

/** Widths from which three columns have room, and two. */
const [THREE, TWO] = [1040, 680];
const GAP = 28;

function Overview({ app }: { app: App }) {
  const state = app.state.value;
  const other = state.side === "b" ? app.other : null;
  const findings = other === null ? app.findings.value : app.otherFindings.value;
  const seen = useMemo(() => (other === null ? findings : fromTwins(app.trace, other, findings)), [app, other, findings]);
  const { call } = current(app);
  const [ref, room] = useWidth();
  useLead(app);
  const stitched = useMemo(() => generation(app.trace, call).length > 1, [app, call]);
  const groups = useMemo(() => atlasOf(app.trace, stitched ? null : state.step), [app, stitched, state.step]);
  const scene = useScene(app, findings);
  const here = useMemo(() => {
    const rows = groups.flatMap((g) => g.rows);
    return rows.find((r) => r.calls.includes(call))?.call ?? null;
  }, [groups, call]);
  const apart = useApart(app, groups);
  const { axes } = scene.sheet;
  const lines = useMemo(() => linesOf(axes, call.site.kind === "self"), [axes, call]);
  const picture = ofPatches(call, app.options);
  const layout = room >= THREE ? "three" : room >= TWO ? "two" : "one";
  const share = { three: [0.3, 0.4, 0.3], two: [0.42, 0.58, 1], one: [1, 1, 1] }[layout];
  const gaps = { three: 2, two: 1, one: 0 }[layout];
  const [atlas, head, token] = share.map((part) => Math.floor(part === 1 ? room : (room - gaps * GAP) * part));
  const [said, foot] = [useRef<HTMLDivElement>(null), useRef<HTMLDivElement>(null)];
  const [most, setMost] = useState(420);
  useLayoutEffect(() => {
    if (said.current === null || foot.current === null) return;
    // What the window shows at once: from below the first sentence to above the text.
    const top = said.current.getBoundingClientRect().bottom + globalThis.scrollY;
    setMost(Math.max(320, Math.min(1600, Math.floor(globalThis.innerHeight - top - foot.current.offsetHeight - 34))));
  });
  const named = lines.every((line) => line.axis.named);
  return (
    <div ref={ref} class={`overview ${layout}`}>
      <div class="said" ref={said}>
        <p class="sentence" data-summary>
          {headline(other ?? app.trace, findings, state.step).map(({ tone, text }) => (
            <span key={text} class={tone}>
              {text}{" "}
            </span>
          ))}
        </p>
        {app.other !== null && (
          <Segments
            name="Shown"
            value={state.side}
            of={
              [
                ["a", "A", app.trace.source.name],
                ["b", "B", app.other.source.name],
                ["difference", "B − A", "What B has more than A, and less"],
              ] as [Side, string, string][]
            }
            pick={(side) => app.set({ side })}
          />
        )}
      </div>
      {room > 0 && (
        <>
          <Atlas
            app={app}
            findings={seen}
            groups={groups}
            here={here}
            room={atlas!}
            most={layout === "one" ? 340 : most - 110}
            apart={apart}
          />
          <ChosenHead app={app} scene={scene} room={head!} most={layout === "one" ? 520 : most} />
          <ChosenToken
            app={app}
            scene={scene}
            groups={groups}
            room={layout === "two" ? (room - GAP) / 2 : token!}
            most={layout === "three" ? most - 410 : 300}
          />
          <div class="lines" ref={foot}>
            {lines
              .filter(({ title }) => !picture || title === "Queries")
              .map((line) => (
                <TokenLine key={line.title} app={app} scene={scene} room={room} {...line} />
              ))}
            {!picture && (
              <p class="quiet hint">
                {named ? "" : "What the tokens are is not in the trace: trace(…, tokens=…) names them. "}
                Hover: what a token looks at. Shift: who looks at it. Click: keep it.
              </p>
            )}
          </div>
        </>
      )}
    </div>
  );
}

/** How long, in milliseconds, another head has to be the most striking, while others are measured, before the page goes on to it. */
const PATIENCE = 600;
/** The same before the first head, where it is a large one: to read it takes longer than to measure a layer. */
const BEFORE_LARGE = 1500;

/** Until the reader chooses, the most striking head is shown: the first at once, and what is found after it in time. */
function useLead(app: App): void {
  const { striking, heads, done, total } = app.findings.value;
  const all = done >= total;
  const chosen = app.chosen.value;
  useEffect(() => {
    const call = striking === null ? undefined : app.trace.calls[striking.call];
    if (chosen || striking === null || call === undefined) return;
    const pair = heads[striking.call]?.[striking.head]?.roles.find((r) => r.pair !== null)?.pair;
    const head = call.headNumbers[striking.head]!;
    const first = !app.led.peek();
    const wait = setTimeout(
      () => {
        app.led.value = true;
        app.lead({ ...placeOf(app.trace, call), heads: [head], ...(pair && { batch: pair.batch }) });
      },
      all ? 0 : first ? (isLarge(call) ? BEFORE_LARGE : 0) : PATIENCE,
    );
    return () => clearTimeout(wait);
  }, [app, chosen, striking?.call, striking?.head, all]);
}

export const overview: View = {
  id: "overview",
  label: "Overview",
  help:
    "All heads by what they do, one head, and why one of its weights is what it is. Choose a head on the left, a token in " +
    "the text below: hover for what it looks at, with shift for who looks at it, click or press Enter to keep it. With the " +
    "focus among the heads or in the text, arrow keys move there.",
  fields: () => [],
  controls: ["weights", "filter", "over", "scale", "sink"],
  shows: "head",
  component: Overview,
};
