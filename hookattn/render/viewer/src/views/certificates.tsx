import { useState } from "preact/hooks";
import { type App, current } from "../app";
import { type Call, where } from "../data/call";
import { edited } from "../data/edits";
import { guessed, hasApplied } from "../data/kinds";
import { measured } from "../format";
import { placeOf } from "../state";
import { Segments } from "../ui/inputs";
import { Badge } from "../ui/notice";
import type { View } from "./view";

/** Calls listed; a long generation has tens of thousands. */
const MOST = 300;
const RANK = { unfaithful: 0, unverified: 1, faithful: 2 };

type Order = "run" | "worst";

function Certificates({ app }: { app: App }) {
  const [order, setOrder] = useState<Order>("run");
  const { calls } = app.trace;
  const here = current(app).call;
  const sorted = order === "run" ? calls : calls.toSorted((a, b) => rank(a) - rank(b) || share(b) - share(a));
  const listed = sorted.slice(0, MOST);
  const count = (status: Status) => calls.filter((c) => statusOf(c) === status).length;
  const unsure = calls.filter((c) => guessed(c).length > 0).length;
  const changed = calls.filter((c) => edited(c) !== "").length;
  const told = (["faithful", "unfaithful", "unverified"] as const)
    .map((status) => `${count(status)} ${status}`)
    .filter((text) => !text.startsWith("0 "));
  return (
    <div>
      <p class="readout">
        {calls.length} {calls.length === 1 ? "call" : "calls"}: {told.join(", ")}
        {unsure > 0 && `; the axes of ${unsure === calls.length ? "all" : unsure} were guessed`}
        {changed > 0 && `; ${changed === calls.length ? "all" : changed} were edited`}
        {calls.length > MOST && `; the first ${MOST} of them are listed`}
      </p>
      {calls.length > 1 && (
        <Segments<Order>
          name="Order"
          value={order}
          of={[
            ["run", "as they ran"],
            ["worst", "worst first", "Unfaithful ones, unverified ones, then by the error as a part of its tolerance"],
          ]}
          pick={setOrder}
        />
      )}
      <table class="certificates">
        <thead>
          <tr>
            <th scope="col">call</th>
            <th scope="col">certificate</th>
            <th scope="col">weights·v off by</th>
            <th scope="col">weights off by</th>
            <th scope="col">row sums off by</th>
            <th scope="col">rows checked</th>
            <th scope="col">basis and notes</th>
          </tr>
        </thead>
        <tbody>
          {listed.map((call) => (
            <Row key={call.index} app={app} call={call} here={call === here} />
          ))}
        </tbody>
      </table>
    </div>
  );
}

type Status = keyof typeof RANK;

function statusOf({ certificate }: Call): Status {
  return certificate?.status ?? "unverified";
}

function rank(call: Call): number {
  return RANK[statusOf(call)] ?? 0;
}

/** The output's error as a part of its tolerance; one that is no number is the worst. */
function share({ certificate }: Call): number {
  const { output_error: error, tolerance } = certificate ?? {};
  if (error == null || tolerance == null) return 0;
  return typeof error === "number" && typeof tolerance === "number" && tolerance > 0 ? error / tolerance : Infinity;
}

function Row({ app, call, here }: { app: App; call: Call; here: boolean }) {
  const c = call.certificate;
  const letters = guessed(call);
  const against = (error: Measured, tolerance: Measured) =>
    error == null ? "–" : `${measured(error)}${tolerance == null ? "" : `, allowed ${measured(tolerance)}`}`;
  return (
    <tr aria-current={here}>
      <th scope="row">
        <button
          class="label"
          title="Show this call"
          onClick={() => app.set({ ...placeOf(app.trace, call), query: null, key: null, zoom: null })}
        >
          {where(call)}
        </button>
      </th>
      <td class="label">
        <Badge call={call} short />
        <span class="quiet"> {statusOf(call)}</span>
      </td>
      <td class="label" data-name="weights·v off by">
        {c === null ? "–" : against(c.output_error, c.tolerance)}
      </td>
      <td class="label" data-name="weights off by">
        {c === null ? "–" : against(c.weights_error, c.weights_tolerance)}
      </td>
      <td class="label" data-name="row sums off by">
        {measured(c?.row_sum_error)}
      </td>
      <td class="label" data-name="rows checked">
        {c === null ? "–" : `${c.rows} of ${c.of_rows}`}
      </td>
      <td class="said">
        <span class="label">
          {c?.basis ?? "no certificate"}{" "}
          <span class="quiet">
            ({call.tap}, {call.dtype})
          </span>
        </span>
        {letters.length > 0 && <p class="guessed">axes guessed: {letters.join(" ")}, which no certificate can tell</p>}
        {edited(call) !== "" && <p class="edited">{edited(call, true)}</p>}
        {kindOf(call) !== "" && <p>{kindOf(call)}</p>}
        {call.notes.map((note) => (
          <p key={note}>{note}</p>
        ))}
      </td>
    </tr>
  );
}

/** What is no softmax of products of queries and keys, and what was changed after it. */
function kindOf(call: Call): string {
  const { score = "dot", normalizer = "softmax" } = call;
  return [
    score === "dot" ? "" : `scores: ${score}`,
    normalizer === "softmax" ? "" : `normalizer: ${normalizer}`,
    hasApplied(call) ? "weights changed after the softmax (applied)" : "",
  ]
    .filter(Boolean)
    .join("; ");
}

type Measured = number | string | null | undefined;

export const certificates: View = {
  id: "certificates",
  label: "Certificates",
  help:
    "What was measured of each call: how far what was rebuilt is from what the model's own kernel returned, against " +
    "the tolerance for its dtype. Choose a call to look at it in the other views.",
  fields: () => [],
  controls: [],
  ownTable: true,
  component: Certificates,
};
