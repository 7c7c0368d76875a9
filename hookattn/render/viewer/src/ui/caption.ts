/** What a picture that leaves the page has to say of itself: its title, and the name of its file. */
import { type App, current, focus } from "../app";
import { edited } from "../data/edits";
import { fieldOf, guessed, weightsOf } from "../data/kinds";
import { headsOver, nameOver } from "../data/over";
import { measured } from "../format";
import type { View } from "../views/view";
import { name } from "./table";

/** The heads that a view shows of the selection; none where it shows the whole trace. */
function headsOf(app: App, view: View): readonly number[] {
  const state = app.state.value;
  if (overOf(app, view) !== null) return headsOver(current(app).call, state.heads, state.over);
  const shows = view.shows ?? (view.controls.includes("heads") ? "head" : "trace");
  return shows === "trace" ? [] : shows === "head" ? [focus(state)] : state.heads.toSorted((a, b) => a - b);
}

/** Whether what is shown is the mean or the largest over heads. */
function overOf(app: App, view: View): "mean" | "max" | null {
  const { over } = app.state.value;
  return view.controls.includes("over") && over !== "one" ? over : null;
}

/** Numbers that follow each other as a range: 0-3.7 */
function ranges(numbers: readonly number[]): string {
  const parts: [number, number][] = [];
  for (const n of numbers) {
    const last = parts.at(-1);
    if (last !== undefined && n === last[1] + 1) last[1] = n;
    else parts.push([n, n]);
  }
  return parts.map(([a, b]) => (a === b ? a : `${a}-${b}`)).join(".");
}

/** The field that a view draws, where one can be chosen; null: it draws several. */
function fieldShown(app: App, view: View): string | null {
  const { field } = app.state.value;
  const { call } = current(app);
  if (view.controls.includes("field")) return fieldOf(call, field);
  return view.controls.includes("weights") ? weightsOf(call, field) : null;
}

/** `run-matrix-L1H2-scores-q6-k2`, without an ending. */
export function fileName(app: App, view: View): string {
  const state = app.state.value;
  const { call } = current(app);
  const heads = headsOf(app, view);
  const field = fieldShown(app, view);
  const { source } = app.trace;
  const several = new Set(app.trace.calls.map((c) => c.step)).size > 1;
  const parts = [
    source.name.replace(/\.(safetensors|html)$/, "") || "attention",
    view.id,
    heads.length > 0 && `L${state.layer ?? "-"}H${ranges(heads)}`,
    overOf(app, view) ?? false,
    several && `step${state.step}`,
    call.extents.B > 1 && `batch${state.batch}`,
    heads.length > 0 && field !== null && field !== "weights" && field,
    heads.length > 0 && state.query !== null && `q${state.query}`,
    heads.length > 0 && state.key !== null && `k${state.key}`,
  ];
  return parts
    .filter((part) => part !== false)
    .join("-")
    .replace(/[^\p{L}\p{N}._-]+/gu, "-");
}

/** The title of the picture, in parts: trace and model, view, layer and heads, field, what is locked, certificate. */
export function caption(app: App, view: View): string[] {
  const state = app.state.value;
  const { call, axes } = current(app);
  const { source, document } = app.trace;
  const heads = headsOf(app, view);
  const one = heads.length > 0;
  const { layer, stack, kind, path } = call.site;
  const several = new Set(app.trace.calls.map((c) => c.step)).size > 1;
  return [
    app.other !== null && view.id === "compare" ? `A: ${source.name}, B: ${app.other.source.name}` : source.name,
    document.model.class ?? "",
    view.label,
    one ? `${layer === null ? path || "the model itself" : `layer ${layer}`}, ${stack} ${kind}` : "",
    overOf(app, view) !== null
      ? nameOver(call, state.heads, state.over)
      : one ? `${heads.length === 1 ? "head" : "heads"} ${ranges(heads).replaceAll(".", ", ")}` : "",
    several ? `step ${state.step}` : "",
    call.extents.B > 1 ? `batch entry ${state.batch}` : "",
    fieldShown(app, view) ?? "",
    one && state.query !== null ? `query ${name(axes.queries, state.query)}` : "",
    one && state.key !== null ? `key ${name(axes.keys, state.key)}` : "",
    one ? certificate(app) : ofAll(app),
    one ? edited(call) : app.trace.calls.some((c) => edited(c) !== "") ? "edited" : "",
  ].filter(Boolean);
}

const SIGN = { faithful: "✓", unfaithful: "✗", unverified: "?" };

function certificate(app: App): string {
  const { call } = current(app);
  const found = call.certificate;
  const status = found?.status ?? "unverified";
  const sizes =
    found === null || status === "unverified"
      ? ""
      : ` ${measured(found.output_error)} ${status === "faithful" ? "≤" : "against"} ${measured(found.tolerance)}`;
  const axes = guessed(call).length > 0 ? `, axes guessed: ${guessed(call).join(" ")}` : "";
  return `${SIGN[status]} ${status}${sizes}${axes}`;
}

/** Of a picture of all calls: how many of them are what. */
function ofAll(app: App): string {
  const { calls } = app.trace;
  const of = (status: string) => calls.filter((c) => (c.certificate?.status ?? "unverified") === status).length;
  const told = (["faithful", "unfaithful", "unverified"] as const).filter((s) => of(s) > 0);
  return told.map((s) => `${SIGN[s]} ${of(s)} of ${calls.length} calls ${s}`).join(", ");
}
