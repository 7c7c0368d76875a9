/** The JSON document of a trace file, as docs/trace-format.md describes it, and how it is read. */
import { ViewerError } from "../errors";
import { printableData } from "../printable";
import type { Source } from "../source/source";

export interface Site {
  path: string;
  layer: number | null;
  stack: string;
  kind: string;
  module: string;
  axes: string;
  layers: number | null;
}

export interface Certificate {
  status: "faithful" | "unfaithful" | "unverified";
  output_error: number | string | null;
  weights_error: number | string | null;
  row_sum_error: number | string | null;
  tolerance: number | string | null;
  weights_tolerance?: number | string | null;
  rows: number;
  of_rows: number;
  basis: string;
}

/** One edit of one call; null: all heads, queries, keys or batch entries (format 1.3). */
export interface Edit {
  edit: string;
  field: string;
  heads: number[] | null;
  queries: number[] | null;
  keys: number[] | null;
  batch: number[] | null;
  note: string;
}

export interface CallDocument {
  site: Site;
  step: number;
  tap: string;
  dtype: string;
  /** Where the scores are no product of queries and keys it says nothing. */
  scale: number | { tensor: string };
  softcap: number | null;
  causal: boolean | null;
  window: number | null;
  dropout: number;
  heads: number[] | null;
  queries: number[] | null;
  of_queries?: number;
  kv_heads: number[] | null;
  own_scores: boolean;
  mixed: boolean;
  /** What the scores are, `dot` by default; and what makes weights of them, `softmax` by default (format 1.3). */
  score?: string;
  normalizer?: string;
  /** For B, H, T, S and G how it is known which axis that is: kernel, adapter, followed, guessed (format 1.3). */
  basis?: Record<string, string>;
  /** Path of the outermost module whose forward was the step; empty or absent: the traced model (format 1.3). */
  entry?: string;
  /** What was changed in it while the model ran, in the order in which it was done (format 1.3). */
  edits?: Edit[];
  fields: Record<string, string | null>;
  derivable: string[];
  keys?: number;
  certificate: Certificate | null;
  notes: string[];
}

export interface Coding {
  kind: string;
  error?: number;
  /** Of `steps8`: what a code of each head counts, and the columns of a head that count it doubled so often. */
  step?: number[];
  doubled?: [number, number, number][];
}

export interface TraceDocument {
  format: string;
  format_version: [number, number];
  model: { class?: string; module?: string; versions?: Record<string, string> };
  tokens: string[][] | null;
  /** Of single stacks: each in the form of `tokens`, of the sequence that this stack reads (format 1.3). */
  stack_tokens?: Record<string, string[][]>;
  /** Of a pair of texts, for each of `tokens` the number of its text, −1 for padding (format 1.3). */
  segments?: number[][] | null;
  notes: string[];
  compact: boolean;
  skipped: { path: string; reason: string; steps?: number[] }[];
  calls: CallDocument[];
  coding?: Record<string, Coding>;
  /** Fields of the trace that a page had no room for. */
  left_out?: string[];
}

export interface Entry {
  dtype: string;
  shape: number[];
  /** From the start of the file. */
  begin: number;
  end: number;
}

export interface Header {
  document: TraceDocument;
  entries: Map<string, Entry>;
}

const MAJOR = 1;
const HEADER_LIMIT = 100_000_000;

/** Read and check the header of a trace. */
export async function readHeader(source: Source): Promise<Header> {
  if (source.size < 8) throw new ViewerError(`${source.name}: ${source.size} bytes are too few for a trace.`);
  const length = Number(new DataView(await source.read(0, 8)).getBigUint64(0, true));
  if (length > HEADER_LIMIT || length + 8 > source.size) {
    throw new ViewerError(
      `${source.name}: not a whole safetensors file: its header has ${length} bytes, the file ${source.size}.`,
    );
  }
  const text = new TextDecoder().decode(await source.read(8, 8 + length));
  let header: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;
  try {
    header = JSON.parse(text);
  } catch {
    throw new ViewerError(`${source.name}: not a safetensors file: its header is not JSON.`);
  }
  const metadata = header["__metadata__"] as unknown as Record<string, string> | undefined;
  const json = metadata?.["hookattn"];
  if (json === undefined)
    throw new ViewerError(`${source.name}: a safetensors file, but not a trace: it has no document.`);
  const document = printableData(parse(json)) as TraceDocument;
  if (document.format !== "hookattn-trace")
    throw new ViewerError(`${source.name}: the format is “${document.format}”, not a trace.`);
  if (document.format_version[0] > MAJOR) {
    const version = document.format_version.join(".");
    throw new ViewerError(
      `${source.name}: written in format ${version}, and this viewer reads ${MAJOR}.x. Get a newer hookattn.`,
    );
  }
  const entries = new Map<string, Entry>();
  for (const [
    name,
    {
      dtype,
      shape,
      data_offsets: [begin, end],
    },
  ] of Object.entries(header).filter(([k]) => k !== "__metadata__")) {
    const needed = 8 + length + end;
    if (needed > source.size) {
      throw new ViewerError(`${source.name}: cut short: “${name}” ends at byte ${needed} of ${source.size}.`);
    }
    entries.set(name, { dtype, shape, begin: 8 + length + begin, end: 8 + length + end });
  }
  return { document, entries };
}

/** JSON as Python writes it: NaN and the infinities, which JSON has no word for, become strings. */
function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return JSON.parse(
      text.replace(/"(?:[^"\\]|\\.)*"|-?\b(?:NaN|Infinity)\b/g, (found) => (found[0] === '"' ? found : `"${found}"`)),
    );
  }
}
