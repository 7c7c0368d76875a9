/** The colour of each role, and the role that a head is drawn by. */
import type { HeadFound, RoleFound } from "../findings";
import { ALL } from "./roles";

/** The hue of a role, as style.css has it; a role of somebody else's has that of all others. */
export function hue(role: string): string {
  const place = ALL.indexOf(role);
  return `var(--r${place < 0 ? ALL.length - 1 : place})`;
}

export function inOrder(roles: Iterable<string>): string[] {
  const place = (role: string) => (ALL.indexOf(role) + ALL.length + 1) % (ALL.length + 1);
  return [...roles].sort((a, b) => place(a) - place(b) || (a < b ? -1 : 1));
}

/** The role that a head is drawn by: the one that is asked for, or its most telling; null: it has none of it. */
export function roleOf(found: HeadFound | null, asked: string): RoleFound | null {
  return found?.roles.find((r) => asked === "" || r.role === asked) ?? null;
}
