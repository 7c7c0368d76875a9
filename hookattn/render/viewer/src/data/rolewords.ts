/** The colour of each role, and the role that a head is drawn by. */
import type { HeadFound, RoleFound } from "../findings";
import { ALL, rankOf } from "./roles";

/** The hue of a role, as style.css has it; a role of somebody else's has that of all others. */
export function hue(role: string): string {
  return `var(--r${Math.min(rankOf(role), ALL.length - 1)})`;
}

export function inOrder(roles: Iterable<string>): string[] {
  return [...roles].sort((a, b) => rankOf(a) - rankOf(b) || (a < b ? -1 : 1));
}

/** The role that a head is drawn by: the one that is asked for, or its most telling; null: it has none of it. */
export function roleOf(found: HeadFound | null, asked: string): RoleFound | null {
  return found?.roles.find((r) => asked === "" || r.role === asked) ?? null;
}
