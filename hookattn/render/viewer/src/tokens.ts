/**
 * Tokens as a person reads them: bytes made text again, the tokenizers' marks of word starts and continuations
 * understood.
 */
export interface Label {
  /** What is drawn. */
  text: string;
  /** The token as it is in the trace. */
  raw: string;
}

/**
 * The 256 characters that byte-level tokenizers write bytes as: printable Latin-1 as it is, the rest from U+0100 on.
 */
const BYTES: ReadonlyMap<string, number> = (() => {
  const printable = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return new Map(Array.from({ length: 256 }, (_, b) => [String.fromCharCode(printable(b) ? b : next++), b]));
})();
const HEX = /^<0x([0-9A-Fa-f]{2})>$/;
/** Marks a piece that continues the word before it: an undertie. */
const JOIN = "‿";
/** Scripts that are written without spaces between words: there a piece without one is nothing to be marked. */
const UNSPACED = /^[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}\p{sc=Lao}\p{sc=Khmer}\p{sc=Myanmar}]/u;
const SPECIAL = /^(?:<[|a-z/].*>|\[[A-Z0-9_]+\])$/i;

export function readable(tokens: readonly string[]): Label[] {
  const level = byteLevel(tokens);
  const texts = merge(
    tokens.map((token) => bytesOf(token, level)),
    tokens,
  );
  const pieces = tokens.some((t) => t.startsWith("##"));
  const words = level ? texts.some((t) => /^ ./.test(t)) : tokens.some((t) => t.startsWith("▁"));
  return tokens.map((raw, i) => {
    let text = texts[i]!;
    if (pieces && raw.length > 2 && raw.startsWith("##")) text = JOIN + raw.slice(2);
    else if (!level && raw.startsWith("▁")) text = raw.replaceAll("▁", " ");
    if (words) text = joined(text, raw, texts[i - 1]);
    return { text: visible(text), raw };
  });
}

/** In a scheme that marks word starts with a space: the space goes, and a word's continuation is marked instead. */
function joined(text: string, raw: string, before: string | undefined): string {
  if (/^ \S/u.test(text)) return text.slice(1);
  const last = before?.replace(/ \d\/\d$/, "");
  const continues =
    last !== undefined && /[\p{L}\p{N}]$/u.test(last) && /^[\p{L}\p{N}]/u.test(text) && !UNSPACED.test(text);
  return continues && !SPECIAL.test(raw) ? JOIN + text : text;
}

/** Whether a token is written in the byte alphabet, or may be. */
function inBytes(token: string): boolean {
  return token !== "" && [...token].every((c) => BYTES.has(c));
}

/**
 * Whether the tokens are bytes: some sign of it is there, and as bytes they are sound UTF-8. Added tokens may be
 * anything.
 */
function byteLevel(tokens: readonly string[]): boolean {
  const bytes = tokens.filter(inBytes);
  if (bytes.length < tokens.length / 2 || !bytes.some((t) => /[\u0100-\u0143]/.test(t))) return false;
  const text = new TextDecoder().decode(Uint8Array.from(bytes.flatMap((t) => [...t].map((c) => BYTES.get(c)!))));
  // A window of tokens may begin or end inside a character.
  return (text.match(/\ufffd/g)?.length ?? 0) <= 2;
}

/** A token's bytes, where it is written as bytes. */
function bytesOf(token: string, level: boolean): number[] | null {
  if (level && inBytes(token)) return [...token].map((c) => BYTES.get(c)!);
  const hex = HEX.exec(token);
  return hex === null ? null : [parseInt(hex[1]!, 16)];
}

/** Text of each token; one character spread over several tokens is shown in each, with its part: “猫 1/3”. */
function merge(bytes: (number[] | null)[], tokens: readonly string[]): string[] {
  const out: string[] = [];
  for (let i = 0; i < tokens.length;) {
    const found = run(bytes, i);
    if (found === null) out.push(bytes[i] === null ? tokens[i]! : bytes[i]!.map((b) => `<${hex(b)}>`).join(""));
    else if (found.length === 1) out.push(found.text);
    else for (let j = 1; j <= found.length; j++) out.push(`${found.text} ${j}/${found.length}`);
    i += found?.length ?? 1;
  }
  return out;
}

/** The shortest run of tokens from `i` whose bytes are whole characters. */
function run(bytes: (number[] | null)[], i: number): { text: string; length: number } | null {
  let all: number[] = [];
  for (let length = 1; length <= 8; length++) {
    const more = bytes[i + length - 1];
    if (more == null) return null;
    all = all.concat(more);
    try {
      return { text: new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(all)), length };
    } catch {
      continue;
    }
  }
  return null;
}

function hex(byte: number): string {
  return byte.toString(16).toUpperCase().padStart(2, "0");
}

const NAMED: Readonly<Record<string, string>> = { "\n": "↵", "\t": "⇥", "\r": "␍", " ": "␣", "\u00a0": "⍽" };

/**
 * Whitespace and what has no shape of its own, made visible. Joiners inside a word stay: scripts and emoji need them.
 */
function visible(text: string): string {
  if (text === "") return "∅";
  if (/^[\s\u00a0]+$/u.test(text)) return [...text].map((c) => NAMED[c] ?? code(c)).join("");
  const shown = text.replace(/[\n\t\r]/g, (c) => NAMED[c]!).replace(/[\p{Cc}\u202a-\u202e\u2066-\u2069\ufeff]/gu, code);
  return /^[\p{Cf}\p{Mn}]+$/u.test(shown) ? [...shown].map(code).join("") : shown;
}

function code(c: string): string {
  return `U+${c.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** At most `length` characters; what is cut off is an ellipsis. Characters are whole, also with marks and joiners. */
export function shorten(text: string, length: number): string {
  if (text.length <= length) return text;
  const characters = [...new Intl.Segmenter(undefined, { granularity: "grapheme" }).segment(text)].map(
    (s) => s.segment,
  );
  return characters.length <= length ? text : `${characters.slice(0, length - 1).join("")}…`;
}

const SEPARATOR = /^(?:\[SEP\]|<\/s>|<sep>|<\|sep\|>|<\|endoftext\|>)$/i;

/** Which tokens belong to the first (0) and the second (1) of a pair; null where the tokens are no pair. */
export function segments(tokens: readonly string[]): Uint8Array | null {
  const end = tokens.findIndex((t) => SEPARATOR.test(t));
  let second = end + 1;
  while (second < tokens.length && SEPARATOR.test(tokens[second]!)) second++;
  const words = tokens.slice(second).some((t) => !SPECIAL.test(t));
  if (end < 1 || !words) return null;
  return Uint8Array.from(tokens, (_, i) => (i < second ? 0 : 1));
}
