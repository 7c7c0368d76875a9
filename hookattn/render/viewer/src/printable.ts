/** Text of any origin as a page may show it; `hookattn/printable.py` has the rule. */

// Controls, formats that hide text or change its direction, halves of pairs, line breaks. Joiners stay: the words that are
// shown here are of all scripts, and nothing in a page is told by its name.
const SHAPELESS = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Cn}\p{Zl}\p{Zp}]/gu;

export function printable(text: string): string {
  return text.replace(SHAPELESS, (c) => {
    const code = c.codePointAt(0)!;
    const [letter, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
    return `\\${letter}${code.toString(16).padStart(digits as number, "0")}`;
  });
}

// Tokens have labels of their own, and names of tensors are looked up.
const AS_THEY_ARE = new Set(["tokens", "stack_tokens", "fields", "scale", "coding"]);

/** Plain data with every text in it printable, but for tokens and names of tensors. */
export function printableData(value: unknown): unknown {
  if (typeof value === "string") return printable(value);
  if (Array.isArray(value)) return value.map(printableData);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, of]) => [printable(key), AS_THEY_ARE.has(key) ? of : printableData(of)]),
  );
}
