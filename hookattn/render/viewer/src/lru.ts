/** A cache that is bounded by the weight of what it holds; what was used longest ago goes first. */
export class Lru<V> {
  private readonly items = new Map<string, { value: V; weight: number }>();
  private total = 0;

  constructor(private readonly limit: number) {}

  get(key: string): V | undefined {
    const item = this.items.get(key);
    if (item === undefined) return undefined;
    this.items.delete(key);
    this.items.set(key, item);
    return item.value;
  }

  /** The newest item stays, however heavy it is. */
  set(key: string, value: V, weight: number): void {
    this.delete(key);
    this.items.set(key, { value, weight });
    this.total += weight;
    for (const oldest of this.items.keys()) {
      if (this.total <= this.limit || oldest === key) break;
      this.delete(oldest);
    }
  }

  delete(key: string): void {
    const item = this.items.get(key);
    if (item === undefined) return;
    this.total -= item.weight;
    this.items.delete(key);
  }
}

/**
 * What `make` gives, kept under a key: who asks while it is being made waits for the same. Its weight counts once it is
 * known, and what failed is forgotten, so that the next one tries again.
 */
export function once<V>(
  cache: Lru<Promise<V>>,
  key: string,
  make: () => Promise<V>,
  weight: (made: V) => number,
): Promise<V> {
  const known = cache.get(key);
  if (known !== undefined) return known;
  const made = make();
  cache.set(key, made, 0);
  made.then(
    (value) => cache.set(key, made, weight(value)),
    () => cache.delete(key),
  );
  return made;
}
