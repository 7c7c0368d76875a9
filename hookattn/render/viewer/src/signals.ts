/**
 * Values that are followed: a component, or an effect, that reads one while it runs is run anew when that is set. What it
 * follows is what it has read the last time.
 */
import { type Component, options } from "preact";

export interface ReadonlySignal<T> {
  /** Reading it follows it. */
  readonly value: T;
  /** The same without following it. */
  peek(): T;
}

export interface Signal<T> extends ReadonlySignal<T> {
  value: T;
}

interface Follower {
  again(): void;
  readonly of: Set<Set<Follower>>;
}

let reading: Follower | null = null;

export function signal<T>(first: T): Signal<T> {
  let now = first;
  const followers = new Set<Follower>();
  return {
    get value() {
      if (reading !== null) {
        followers.add(reading);
        reading.of.add(followers);
      }
      return now;
    },
    set value(next) {
      if (next === now) return;
      now = next;
      for (const follower of [...followers]) follower.again();
    },
    peek: () => now,
  };
}

/** What follows from signals; made whenever it is read. */
export function computed<T>(make: () => T): ReadonlySignal<T> {
  return {
    get value() {
      return make();
    },
    peek: () => within(null, make),
  };
}

/** Runs now, and whenever what it has read is set; returns what ends that. */
export function effect(run: () => void): () => void {
  const follower: Follower = {
    again() {
      leave(follower);
      within(follower, run);
    },
    of: new Set(),
  };
  follower.again();
  return () => leave(follower);
}

function within<T>(follower: Follower | null, run: () => T): T {
  const before = reading;
  reading = follower;
  try {
    return run();
  } finally {
    reading = before;
  }
}

function leave(follower: Follower): void {
  for (const followers of follower.of) followers.delete(follower);
  follower.of.clear();
}

/** What the pinned preact calls before a component renders, after it has, when it throws and when it goes. */
interface Hooks {
  __r?(node: Node): void;
  diffed?(node: Node): void;
  __e?(...told: unknown[]): void;
  unmount?(node: Node): void;
}

interface Node {
  __c?: Component | null;
}

let follows = false;

/** From now on components follow what they read. */
export function follow(): void {
  if (follows) return;
  follows = true;
  const hooks = options as unknown as Hooks;
  const known = new WeakMap<Component, Follower>();
  const { __r: before, diffed: after, __e: failed, unmount: gone } = hooks;
  hooks.__r = (node) => {
    before?.(node);
    const component = node.__c!;
    let follower = known.get(component);
    if (follower === undefined) known.set(component, (follower = { again: () => component.forceUpdate(), of: new Set() }));
    leave(follower);
    reading = follower;
  };
  hooks.diffed = (node) => {
    reading = null;
    after?.(node);
  };
  hooks.__e = (...told) => {
    reading = null;
    failed?.(...told);
  };
  hooks.unmount = (node) => {
    const follower = node.__c && known.get(node.__c);
    if (follower) leave(follower);
    gone?.(node);
  };
}
