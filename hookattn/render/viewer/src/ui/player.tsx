/** Through the steps of a trace: a slider, and a button that plays them one after the other. */
import { useEffect } from "preact/hooks";
import type { App } from "../app";
import { stepName, steps, toStep } from "../steps";
import { shorten } from "../tokens";
import { Slider } from "./inputs";

/** Milliseconds that each step is shown. */
const PACE = 700;
const ROOM = 16;

export function Player({ app }: { app: App }) {
  const { step } = app.state.value;
  const playing = app.playing.value;
  const all = steps(app);
  useEffect(() => {
    if (!playing) return;
    const next = all[all.indexOf(step) + 1];
    if (next === undefined) {
      app.playing.value = false;
      return;
    }
    const timer = setTimeout(() => app.set(toStep(app, next)), PACE);
    return () => clearTimeout(timer);
  }, [app, playing, step]);
  if (all.length < 2) return null;
  const said = playing ? "Stop" : "Play the steps";
  return (
    <div class="control player">
      <Slider
        name="Step"
        values={all}
        value={step}
        text={(s) => shorten(stepName(app, s), ROOM)}
        pick={(s) => {
          app.playing.value = false;
          app.set(toStep(app, s));
        }}
      />
      <button aria-label={said} title={`${said} (p)`} onClick={() => play(app)}>
        <svg width={12} height={12} viewBox="0 0 12 12" fill="currentColor" aria-hidden="true">
          {playing ? <path d="M2 1h3v10h-3zM7 1h3v10h-3z" /> : <path d="M2 0.5v11l9-5.5z" />}
        </svg>
      </button>
    </div>
  );
}

/** Begin to play, from the first step if the last one is shown; or stop. */
export function play(app: App): void {
  const all = steps(app);
  const on = !app.playing.peek() && all.length > 1;
  if (on && app.state.peek().step === all.at(-1)) app.set(toStep(app, all[0]!));
  app.playing.value = on;
}
