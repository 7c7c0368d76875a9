import type { ComponentChildren } from "preact";
import type { App } from "../app";
import type { Call } from "../data/call";
import type { Certificate } from "../data/document";
import { edited } from "../data/edits";
import { areShares, guessed, hasApplied, isSoftmax, normalizerOf, weightsOf } from "../data/kinds";
import { measured } from "../format";

export function Notice({ error, children }: { error?: boolean; children: ComponentChildren }) {
  return (
    <div class={error ? "notice error" : "notice"} role={error ? "alert" : "note"}>
      {children}
    </div>
  );
}

const SIGN = { faithful: "✓", unfaithful: "✗", unverified: "?" };

/** A call's certificate, wherever something of the call is drawn. `short`: only its sign. */
export function Badge({ call, short }: { call: Call; short?: boolean }) {
  const { certificate } = call;
  const status = certificate?.status ?? "unverified";
  const letters = guessed(call);
  const sign = (SIGN[status] ?? "?") + (letters.length > 0 && status !== "unverified" ? " ?" : "");
  const axes = letters.length > 0 ? `axes guessed: ${letters.join(" ")}` : "";
  const said = certificate === null ? "no certificate" : describe(certificate);
  const told = axes === "" ? said : `${said}. ${axes}, by convention, which no certificate can tell`;
  // Nothing speaks against a guess, and nothing for it, as where nothing was verified.
  const look = axes !== "" && status === "faithful" ? "unverified" : status;
  return (
    <span class={`badge ${look}`} title={told} {...(short && named(`${status}: ${told}`))} data-status={status} data-axes={axes}>
      <span aria-hidden="true">{sign}</span>
      {!short && <span>{status}</span>}
      {!short && certificate !== null && status !== "unverified" && (
        <span>
          {measured(certificate.output_error)} {status === "faithful" ? "≤" : "against"}{" "}
          {measured(certificate.tolerance)}
        </span>
      )}
      {!short && axes !== "" && <span>· {axes}</span>}
    </span>
  );
}

/** A sign that stands for words. */
function named(words: string) {
  return { role: "img", "aria-label": words } as const;
}

/** What was edited in a call, beside its certificate; nothing where nothing was. `short`: only a sign. */
export function Edits({ call, short }: { call: Call; short?: boolean }) {
  const told = edited(call);
  if (told === "") return null;
  const all = edited(call, true);
  return (
    <span class="badge edited" title={all} {...(short && named(all))} data-edited={all}>
      <span aria-hidden="true">✎</span>
      {!short && <span>{told}</span>}
    </span>
  );
}

function describe(c: Certificate): string {
  const weights = c.weights_error == null ? "" : `, weights off by ${measured(c.weights_error)}`;
  return (
    `weights·v differ from the kernel's output by ${measured(c.output_error)} ` +
    `(tolerance ${measured(c.tolerance)})${weights}, ` +
    `row sums by ${measured(c.row_sum_error)}; ${c.rows} of ${c.of_rows} rows checked. ${c.basis}`
  );
}

/** What a reader has to know before trusting what is drawn of `fields`. */
export function Notices({ app, call, fields }: { app: App; call: Call; fields: readonly string[] }) {
  const { skipped, notes, calls } = app.trace.document;
  const unfaithful = calls.filter((c) => c.certificate?.status === "unfaithful").length;
  const shown = weightsOf(call, app.state.value.field);
  const ofWeights = fields.some((field) => field === "weights" || field === "applied");
  const coded = [...new Set(fields)].flatMap((field) => {
    const coding = app.trace.coding(call, field);
    return coding === null ? [] : [`${field} by at most ${measured(coding.error)}`];
  });
  const narrow = app.trace.entries.get(call.fields["weights"] ?? "")?.dtype;
  return (
    <>
      {call.certificate?.status === "unfaithful" && (
        <Notice error>What was rebuilt of this call is not what the model did: {describe(call.certificate)}</Notice>
      )}
      {unfaithful > 0 && call.certificate?.status !== "unfaithful" && (
        <Notice>
          {unfaithful} of the {calls.length} calls in this trace are unfaithful; this one is not among them.
        </Notice>
      )}
      {guessed(call).length > 0 && (
        <Notice>
          Which axis is which was guessed here ({guessed(call).join(", ")}), by convention: no certificate can tell. Trace
          again with layout={"{"}"{call.site.path}": "BTHD"{"}"}, the axes of q as it enters the dot product, or with an
          adapter.
        </Notice>
      )}
      {ofWeights && hasApplied(call) && (
        <Notice>
          The model changed these weights after the softmax.{" "}
          {shown === "applied" ? "Shown is “applied”, what met the values" : "Shown are the weights before that"};{" "}
          {shown === "applied" ? "“weights” are those before." : "“applied” is what met the values."}
        </Notice>
      )}
      {ofWeights && !isSoftmax(call) && (
        <Notice>
          These weights are no softmax of the scores (normalizer: {normalizerOf(call)})
          {areShares(call, "weights") ? "." : ": they are no shares of the attention, and need not sum to 1."}
        </Notice>
      )}
      {coded.length > 0 && (
        <Notice>The numbers are rounded to 8 bits to keep the page small: off are {coded.join(", ")}.</Notice>
      )}
      {coded.length === 0 && narrow === "F16" && call.dtype !== "float16" && (
        <Notice>The weights are rounded to 16 bits (float16).</Notice>
      )}
      {skipped.length > 0 && (
        <Notice>
          <details>
            <summary>
              {skipped.length === 1 ? "One module" : `${skipped.length} modules`} with attention could not be read:
              nothing of {skipped.length === 1 ? "it" : "them"} is shown
            </summary>
            <ul>
              {skipped.map((s) => (
                <li key={s.path}>
                  {s.path || "the model itself"}: {s.reason}
                </li>
              ))}
            </ul>
          </details>
        </Notice>
      )}
      {[...notes, ...call.notes].length > 0 && (
        <Notice>
          <details>
            <summary>Notes</summary>
            <ul>
              {[...notes, ...call.notes].map((note) => (
                <li key={note}>{note}</li>
              ))}
            </ul>
          </details>
        </Notice>
      )}
    </>
  );
}
