/** A weight in two digits behind the point, and no more than that says. */
export function two(x: number): string {
  if (Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  if (size > 0 && size < 0.005) return x < 0 ? "−<0.01" : "<0.01";
  return x.toFixed(2).replace("-", "−");
}
