/**
 * Attention flow (Abnar & Zuidema 2020): the maximum flow from a token of the last layer to an input token, where an
 * edge from token i of one layer to token j of the one before has the capacity A_ij. By Dinic's algorithm (1970): the
 * shortest paths that can take more, all of one length at a time. Capacities are integers of 2^−30, as in
 * hookattn/analyze/tables/flow.py: these are exact, and floats would leave crumbs on edges that are full.
 */
import type { Matrix } from "./matrix";

const UNIT = 2 ** 30;

export interface Flow {
  value: number;
  /** What goes along each edge, as the layers: T × T. */
  edges: Matrix[];
}

/** The capacities of `layers` as integers, to be used for several flows. */
export function capacities(layers: readonly Matrix[]): Float64Array[] {
  return layers.map(({ data }) => Float64Array.from(data, (x) => Math.round(x * UNIT)));
}

/** `width`: tokens of a layer. Node (l, i), token i of level l, is number l·width + i; level 0 is the input. */
export function maximumFlow(capacity: readonly Float64Array[], width: number, query: number, key: number): Flow {
  const depth = capacity.length;
  // Edges join neighbouring layers alone, so that each layer is a dense matrix in place of lists of edges.
  // What edge (l + 1, i) → (l, j) can still take, and what flows along it, which can be taken back.
  const free = capacity.map((c) => c.slice());
  const used = capacity.map((c) => new Float64Array(c.length));
  const source = depth * width + query;
  const away = new Int32Array((depth + 1) * width);
  const next = new Int32Array(away.length);
  const queue = new Int32Array(away.length);
  const path: number[] = [];
  let value = 0;

  /** How far each node is from the input token, in edges that can take more; whether the source is reached. */
  const search = (): boolean => {
    away.fill(-1);
    away[key] = 0;
    queue[0] = key;
    let end = 1;
    for (let n = 0; n < end; n++) {
      const node = queue[n]!;
      if (node === source) return true;
      const [l, j] = [Math.floor(node / width), node % width];
      if (l < depth) {
        const edges = free[l]!;
        for (let i = 0, e = j, from = (l + 1) * width; i < width; i++, e += width, from++) {
          if (away[from]! >= 0 || edges[e]! <= 0) continue;
          away[from] = away[node]! + 1;
          queue[end++] = from;
        }
      }
      if (l > 0) {
        const edges = used[l - 1]!;
        for (let i = 0, e = j * width, from = (l - 1) * width; i < width; i++, e++, from++) {
          if (away[from]! >= 0 || edges[e]! <= 0) continue;
          away[from] = away[node]! + 1;
          queue[end++] = from;
        }
      }
    }
    return false;
  };

  /** The next arc of a node that leads nearer to the input token: 0 to width down, width to 2·width back up. */
  const advance = (node: number): number => {
    const [l, i] = [Math.floor(node / width), node % width];
    const nearer = away[node]! - 1;
    let a = next[node]!;
    if (l > 0) {
      const edges = free[l - 1]!;
      const to = (l - 1) * width;
      for (; a < width; a++) if (edges[i * width + a]! > 0 && away[to + a] === nearer) return a;
    }
    if (l < depth) {
      const edges = used[l]!;
      const to = (l + 1) * width;
      for (a = Math.max(a, width); a < 2 * width; a++)
        if (edges[(a - width) * width + i]! > 0 && away[to + a - width] === nearer) return a;
    }
    return 2 * width;
  };

  /** Send what the path can take; the path then ends where it can take no more. */
  const augment = (): void => {
    const arcs = path.slice(0, -1).map((node) => {
      const [l, i, a] = [Math.floor(node / width), node % width, next[node]!];
      return a < width
        ? { from: free[l - 1]!, to: used[l - 1]!, e: i * width + a }
        : { from: used[l]!, to: free[l]!, e: (a - width) * width + i };
    });
    const least = Math.min(...arcs.map(({ from, e }) => from[e]!));
    for (const { from, to, e } of arcs) {
      from[e]! -= least;
      to[e]! += least;
    }
    value += least;
    path.length = arcs.findIndex(({ from, e }) => from[e]! <= 0) + 1;
  };

  // A phase: nodes are numbered by their distance to the input token, and paths go along falling numbers alone. An arc
  // that leads nowhere is not tried again in the phase, which is what bounds its work.
  while (search()) {
    next.fill(0);
    path.push(source);
    while (path.length > 0) {
      const node = path.at(-1)!;
      if (node === key) {
        augment();
        continue;
      }
      const a = (next[node] = advance(node));
      if (a < 2 * width) {
        const l = Math.floor(node / width);
        path.push(a < width ? (l - 1) * width + a : (l + 1) * width + a - width);
        continue;
      }
      path.pop();
      if (path.length > 0) next[path.at(-1)!]!++;
    }
  }
  const edges = used.map((flow) => ({ rows: width, cols: width, data: flow.map((x) => x / UNIT) }));
  return { value: value / UNIT, edges };
}
