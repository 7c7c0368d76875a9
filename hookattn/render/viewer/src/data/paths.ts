/** The paths from one token of the last layer to the input tokens, or one of them: by rollout, or a maximum flow. */
import { Slices } from "../slices";
import type { Through } from "../state";
import type { Matrix } from "./matrix";
import { capacities, maximumFlow } from "./maxflow";
import { reachOf, sharesOf } from "./rollout";
import { strongest, type Strongest } from "./strongest";

/** Edges times input tokens: up to this many, all of them get their maximum flow, in a few seconds. */
const WORK = 2 ** 26;
const LINES = 1500;
/** The least that a line carries, of what goes through a layer. */
const FLOOR = 2e-3;

export interface Paths {
  /** The token of the last layer, and the input token that the lines lead to; null: to all. */
  query: number;
  key: number | null;
  /** What comes of each input token; null where it is not known. */
  values: (number | null)[];
  /** What the lines carry in all. */
  total: number;
  /** What passes through each token of each level, the input first. */
  nodes: Float64Array[];
  lines: Strongest;
}

export async function pathsOf(
  layers: readonly Matrix[],
  through: Through,
  query: number,
  key: number | null,
  signal: AbortSignal,
): Promise<Paths> {
  const found = through === "rollout" ? rolled(layers, query, key) : flowing(layers, query, key);
  const { edges, ...rest } = found;
  return { query, ...rest, lines: await strongest(edges, LINES, FLOOR * found.total, new Slices(10, signal)) };
}

type Found = Omit<Paths, "query" | "lines"> & { edges: Matrix[] };

function rolled(layers: readonly Matrix[], query: number, key: number | null): Found {
  const shares = sharesOf(layers, query);
  const reach = key === null ? null : reachOf(layers, key);
  const T = layers[0]!.rows;
  const edges = layers.map(({ data }, l) => {
    const [above, below] = [shares[l + 1]!, reach?.[l]];
    const carried = new Float32Array(T * T);
    for (let i = 0; i < T; i++) {
      if (above[i] === 0) continue;
      for (let j = 0, e = i * T; j < T; j++, e++) carried[e] = above[i]! * data[e]! * (below === undefined ? 1 : below[j]!);
    }
    return { rows: T, cols: T, data: carried };
  });
  return {
    key,
    values: [...shares[0]!],
    total: key === null ? 1 : shares[0]![key]!,
    nodes: reach === null ? shares : shares.map((level, l) => level.map((x, i) => x * reach[l]![i]!)),
    edges,
  };
}

/** Without a key: to the input token that the rollout has most of. */
function flowing(layers: readonly Matrix[], query: number, asked: number | null): Found {
  const T = layers[0]!.rows;
  const shares = sharesOf(layers, query)[0]!;
  const key = asked ?? shares.indexOf(Math.max(...shares));
  const { value, edges } = maximumFlow(capacities(layers), T, query, key);
  // What reaches a token of a level comes from the level above; the last level has the token alone.
  const nodes = edges.map(({ data }) => {
    const into = new Float64Array(T);
    data.forEach((x, e) => (into[e % T]! += x));
    return into;
  });
  nodes.push(Float64Array.from({ length: T }, (_, i) => (i === query ? value : 0)));
  return { key, values: Array.from({ length: T }, (_, j) => (j === key ? value : null)), total: value, nodes, edges };
}

/** Whether the maximum flow to each input token is a matter of seconds. */
export function flowsToAll(layers: readonly Matrix[]): boolean {
  return layers.length * layers[0]!.rows ** 3 <= WORK;
}

/** The maximum flow from one token of the last layer to each input token. */
export async function toAll(layers: readonly Matrix[], query: number, signal: AbortSignal): Promise<number[]> {
  const slices = new Slices(10, signal);
  const capacity = capacities(layers);
  const values: number[] = [];
  for (let key = 0; key < layers[0]!.rows; key++) {
    values.push(maximumFlow(capacity, layers[0]!.rows, query, key).value);
    await slices.turn();
  }
  return values;
}
