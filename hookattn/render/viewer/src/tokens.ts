/**
 * Tokens as a person reads them: bytes made text again, the tokenizers' marks of word starts and continuations
 * understood.
 */
import { isSpecial, marksOf, readPieces, SEPARATORS, type Piece } from "./pieces";

export interface Label {
  /** What is drawn. */
  text: string;
  /** The token as it is in the trace. */
  raw: string;
}

/** Marks a piece that continues the word before it, as the library does in tables and figures. */
const JOIN = "…";
/** Scripts that are written without spaces between words: there a piece without one is nothing to be marked. */
const UNSPACED = /^[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}\p{sc=Lao}\p{sc=Khmer}\p{sc=Myanmar}]/u;

export function readable(tokens: readonly string[]): Label[] {
  const pieces = readPieces(tokens);
  const texts = merge(pieces);
  const spaced = ["bytes", "metaspace", "space"].includes(marksOf(tokens));
  return tokens.map((raw, i) => {
    const piece = pieces[i]!;
    if (piece.special) return { text: visible(raw.replace(/^▁/, "")), raw };
    const joins = spaced ? joined(texts[i]!, piece, texts[i - 1]) : piece.joins;
    const text = spaced && /^ \S/u.test(texts[i]!) ? texts[i]!.slice(1) : texts[i]!;
    return { text: visible(joins ? JOIN + text : text), raw };
  });
}

/** In a scheme that marks word starts with a space: whether a piece continues the letters of the one before. */
function joined(text: string, piece: Piece, before: string | undefined): boolean {
  const last = before?.replace(/ \d\/\d$/, "");
  if (!piece.joins || last === undefined || UNSPACED.test(text)) return false;
  return /[\p{L}\p{N}]$/u.test(last) && /^[\p{L}\p{N}]/u.test(text);
}

/** Text of each token; one character spread over several tokens is shown in each, with its part: “猫 1/3”. */
function merge(pieces: readonly Piece[]): string[] {
  const out: string[] = [];
  for (let i = 0; i < pieces.length;) {
    const found = run(pieces, i);
    if (found === null) out.push([...pieces[i]!.data].map((b) => `<${hex(b)}>`).join(""));
    else if (found.length === 1) out.push(found.text);
    else for (let j = 1; j <= found.length; j++) out.push(`${found.text} ${j}/${found.length}`);
    i += found?.length ?? 1;
  }
  return out;
}

/** The shortest run of pieces from `i`, without a special token in it, whose bytes are whole characters. */
function run(pieces: readonly Piece[], i: number): { text: string; length: number } | null {
  let all: number[] = [];
  for (let length = 1; length <= 8; length++) {
    const more = pieces[i + length - 1];
    if (more === undefined || (more.special && length > 1)) return null;
    all = all.concat([...more.data]);
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

/**
 * Which tokens belong to the first (0) and the second (1) of a pair; null where the tokens are no pair. A separator ends
 * the part that it follows and belongs to it, and so do more separators right after it.
 */
export function segments(tokens: readonly string[]): Uint8Array | null {
  let part = 0;
  let begun = false;
  let ended = false;
  let last = 0;
  const parts = tokens.map((token) => {
    const separates = SEPARATORS.has(token);
    if (ended && !separates) {
      part++;
      ended = false;
    }
    begun ||= !separates;
    ended ||= separates && begun;
    // Special tokens at the end, such as padding, are no part of their own.
    if (!isSpecial(token)) last = part;
    return part;
  });
  return last === 1 ? Uint8Array.from(parts, (p) => Math.min(p, 1)) : null;
}
