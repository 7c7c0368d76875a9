import type { Coding } from "./document";

/** Numbers as a reader of the page needs them: nothing is narrowed, nothing is rounded. */
export type Numbers = Float32Array | Float64Array | Uint8Array;

interface Dtype {
  size: number;
  decode(bytes: ArrayBuffer): Numbers;
}

/** A table of all values of a narrow type: the quickest way to decode millions of them. It is made when first used. */
function table(bits: 8 | 16, value: (code: number) => number): Dtype {
  let values: Float32Array | undefined;
  return {
    size: bits / 8,
    decode(bytes) {
      values ??= Float32Array.from({ length: 2 ** bits }, (_, code) => value(code));
      const codes = bits === 8 ? new Uint8Array(bytes) : new Uint16Array(bytes);
      const out = new Float32Array(codes.length);
      for (let i = 0; i < out.length; i++) out[i] = values[codes[i]!]!;
      return out;
    },
  };
}

/**
 * A floating type of a sign bit, `exponent` bits and `mantissa` bits; `special`: whether the top exponent is inf and
 * nan.
 */
function floating(
  exponent: number,
  mantissa: number,
  bias: number,
  special: "ieee" | "fn" | "fnuz",
): (code: number) => number {
  const top = 2 ** exponent - 1;
  const full = 2 ** mantissa - 1;
  return (code) => {
    const sign = code >> (exponent + mantissa) ? -1 : 1;
    const e = (code >> mantissa) & top;
    const m = code & full;
    if (special === "ieee" && e === top) return m ? NaN : sign * Infinity;
    if (special === "fn" && e === top && m === full) return NaN;
    if (special === "fnuz" && sign < 0 && e === 0 && m === 0) return NaN;
    return e === 0 ? sign * m * 2 ** (1 - bias - mantissa) : sign * (1 + m / 2 ** mantissa) * 2 ** (e - bias);
  };
}

function plain(size: number, view: new (bytes: ArrayBuffer) => ArrayLike<number | bigint>): Dtype {
  return { size, decode: (bytes) => Float64Array.from(new view(bytes) as ArrayLike<number>, Number) };
}

/** By the name that safetensors gives them; the values are little-endian, as is every machine with a browser. */
export const DTYPES: Readonly<Record<string, Dtype>> = {
  BOOL: { size: 1, decode: (bytes) => new Uint8Array(bytes) },
  U8: { size: 1, decode: (bytes) => new Uint8Array(bytes) },
  F32: { size: 4, decode: (bytes) => new Float32Array(bytes) },
  F64: { size: 8, decode: (bytes) => new Float64Array(bytes) },
  F16: table(16, floating(5, 10, 15, "ieee")),
  BF16: table(16, floating(8, 7, 127, "ieee")),
  F8_E4M3: table(8, floating(4, 3, 7, "fn")),
  F8_E5M2: table(8, floating(5, 2, 15, "ieee")),
  F8_E4M3FNUZ: table(8, floating(4, 3, 8, "fnuz")),
  F8_E5M2FNUZ: table(8, floating(5, 2, 16, "fnuz")),
  F8_E8M0: table(8, (code) => (code === 255 ? NaN : 2 ** (code - 127))),
  I8: plain(1, Int8Array),
  I16: plain(2, Int16Array),
  U16: plain(2, Uint16Array),
  I32: plain(4, Int32Array),
  U32: plain(4, Uint32Array),
  I64: plain(8, BigInt64Array),
  U64: plain(8, BigUint64Array),
};

const SQUARES = Float32Array.from({ length: 256 }, (_, code) => (code / 255) ** 2);

/** Codings of a narrowed tensor, named in the document under `coding`; `first`: the place of the first code in it. */
export const CODINGS: Readonly<
  Record<string, (codes: Uint8Array, coding: Coding, shape: readonly number[], first: number) => Numbers>
> = {
  // Codes are of the square root, as most weights are small: near 0 their steps are 1/65025, near 1 they are 1/128. The
  // colours of a picture could not show less, and a page of bytes is a quarter of one of floats.
  sqrt8: (codes) => {
    const out = new Float32Array(codes.length);
    for (let i = 0; i < out.length; i++) out[i] = SQUARES[codes[i]!]!;
    return out;
  },
  // Doubles, as what follows from q and k is to be rounded as it was when the page was made.
  steps8: (codes, { step = [], doubled = [] }, shape, first) => {
    const [heads, rows, cols] = shape.slice(-3) as [number, number, number];
    const steps = Array.from(step, (size) => new Float64Array(cols).fill(size));
    for (const [head, col, times] of doubled) steps[head]![col]! *= 2 ** times;
    const out = new Float64Array(codes.length);
    // What is read begins where a row does.
    for (let i = 0, row = first / cols; i < out.length; row++) {
      const own = steps[Math.floor(row / rows) % heads]!;
      for (let col = 0; col < cols; col++, i++) out[i] = ((codes[i]! << 24) >> 24) * own[col]!;
    }
    return out;
  },
};

/** The kind of weights of which what follows from q and k was taken off: code − round(255·√w), modulo 256. */
export const SQRT8_LESS = "sqrt8-less-qk";

/** Codes of weights put together from what follows and what was left. */
export function together(rest: Uint8Array, weights: Numbers): Uint8Array {
  return rest.map((code, i) => code + Math.round(255 * Math.sqrt(weights[i]!)));
}
