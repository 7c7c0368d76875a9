/** Numbers as text: four significant digits, an exponent where the zeros would not be readable. */
export function number(x: number, digits = 4): string {
  if (!Number.isFinite(x)) return Number.isNaN(x) ? "not a number" : x > 0 ? "∞" : "−∞";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text =
    size < 1e-3 || size >= 1e6 ? x.toExponential(2) : size >= 10 ** digits ? x.toFixed(0) : x.toPrecision(digits);
  return text.replace("e+", "e").replaceAll("-", "−");
}

/** A number inside a sentence: three significant digits. */
export function short(x: number): string {
  return number(x, 3);
}

/** All digits of a number that was stored in 32 bits: nine tell it from its neighbours. */
export function exact(x: number): string {
  return Number.isFinite(x) ? String(Number(x.toPrecision(9))).replaceAll("-", "−") : number(x);
}

export function percent(x: number): string {
  return `${x > 0 && x < 0.001 ? "<0.1" : (100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
}

/** What a certificate holds: a number, or a word for what JSON cannot write. */
export function measured(x: number | string | null | undefined): string {
  if (x == null) return "–";
  return typeof x === "number" ? (x === 0 ? "0" : x.toExponential(1).replace("-", "−")) : x;
}
