/**
 * What each token of a sequence stands for: special tokens, and the marks that tokenizers write into pieces of words.
 * The rules are those of hookattn/tokens/pieces.py, where they are written down; tests/tokens/cases.json holds both to
 * the same answers.
 */

/** Tokens that end a text or part two, in the spelling of the common tokenizers. */
export const SEPARATORS: ReadonlySet<string> = new Set([
  "[SEP]",
  "</s>",
  "<sep>",
  "<|sep|>",
  "<eos>",
  "<|endoftext|>",
  "<|end_of_text|>",
  "<|eot_id|>",
  "<|im_end|>",
  "<end_of_turn>",
  "<|end|>",
]);

/**
 * How a tokenizer marks where words begin: `Ġcat` (each character is a byte), `▁cat`, `##ing`, `cat</w>`, a space as it
 * is, `wor@@`, or not at all.
 */
export type Marks = "bytes" | "metaspace" | "continuation" | "word_end" | "space" | "joiner" | "none";

/** What one token stands for. */
export interface Piece {
  /**
   * Its text in UTF-8, without the tokenizer's marks; a space in front that the tokenizer wrote is part of it. It may
   * begin or end inside a character.
   */
  data: Uint8Array;
  special: boolean;
  /** Whether it goes on with the word of the token before. */
  joins: boolean;
}

const NAME = String.raw`(?=[^<>]*[A-Za-z])(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?)(?:[.:/][A-Za-z0-9_-]*[A-Za-z0-9_])*`;
const FORMS = [
  String.raw`<[|｜][^<>|｜]*[^<>|｜ ][^<>|｜]*[|｜]>`,
  String.raw`<\|?/?${NAME}/?\|?>`,
  String.raw`\[/?[A-Z](?:[_-]?[A-Z0-9])+\]`,
  `>>${NAME}<<`,
  String.raw`\[(?:unused[0-9]+|control_[0-9]+|[gs]MASK|@BOS@)\]`,
  String.raw`\|(?:ENDOFTEXT|SPEAKER|NEWLINE)\||\|\|\|(?:IP_ADDRESS|EMAIL_ADDRESS|PHONE_NUMBER)\|\|\|`,
];
const SPECIAL = new RegExp(`^▁?(?:${FORMS.join("|")})$`, "u");
const MARKUP =
  /^▁?<\/?(?:a|b|blockquote|br|caption|code|div|em|h[1-6]|hr|i|li|ol|p|pre|span|strong|su[bp]|table|tbody|td|tfoot|th|thead|tr|u|ul)\/?>$/;
const BYTE = /^<0x([0-9A-Fa-f]{2})>$/;
const END = "</w>";

/**
 * The 256 characters that byte-level tokenizers write bytes as: printable Latin-1 as it is, the rest from U+0100 on.
 */
const ALPHABET: ReadonlyMap<string, number> = (() => {
  const printable = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return new Map(Array.from({ length: 256 }, (_, b) => [String.fromCharCode(printable(b) ? b : next++), b]));
})();

const encoder = new TextEncoder();

/** Whether a token is written as special ones are: `[SEP]`, `</s>`, `<|endoftext|>`. */
export function isSpecial(token: string): boolean {
  return SPECIAL.test(token) && token !== END && !BYTE.test(token) && !MARKUP.test(token);
}

/** How the tokenizer marked words that wrote these tokens of one sequence. */
export function marksOf(tokens: readonly string[]): Marks {
  const ordinary = tokens.filter((t) => !isSpecial(t));
  if (isByteLevel(ordinary)) return "bytes";
  if (ordinary.some((t) => t.includes("▁"))) return "metaspace"; // before ##, which SentencePiece has of headings
  if (ordinary.some(continues)) return "continuation";
  if (ordinary.some((t) => t.endsWith(END))) return "word_end";
  if (ordinary.some((t) => t.startsWith(" ") && t.length > 1)) return "space"; // before @@, which a diff has
  return ordinary.some(goesOn) ? "joiner" : "none";
}

/** What each token of a sequence stands for; how one is written depends on its neighbours. */
export function readPieces(tokens: readonly string[]): Piece[] {
  const marks = marksOf(tokens);
  const made: Piece[] = [];
  tokens.forEach((token, i) => {
    const special = isSpecial(token);
    const data = special ? encoder.encode(token) : dataOf(token, marks);
    const first = special || i === 0 || made[i - 1]!.special;
    made.push({ data, special, joins: !first && joins(tokens[i - 1]!, token, data, marks) });
  });
  return made;
}

function dataOf(token: string, marks: Marks): Uint8Array {
  if (marks === "bytes") return inAlphabet(token) ? bytesOf(token) : encoder.encode(token);
  const byte = BYTE.exec(token);
  if (byte !== null) return Uint8Array.of(parseInt(byte[1]!, 16));
  if (marks === "metaspace") return encoder.encode(token.replaceAll("▁", " "));
  if (marks === "continuation" && continues(token)) return encoder.encode(token.slice(2));
  if (marks === "word_end" && token.endsWith(END)) return encoder.encode(token.slice(0, -END.length));
  if (marks === "joiner" && goesOn(token)) return encoder.encode(token.slice(0, -2));
  return encoder.encode(token);
}

function joins(before: string, token: string, data: Uint8Array, marks: Marks): boolean {
  if (marks === "continuation") return continues(token);
  if (marks === "word_end") return !before.endsWith(END);
  if (marks === "joiner") return goesOn(before);
  return marks !== "none" && data[0] !== 0x20 && data[0] !== 0x0a;
}

function continues(token: string): boolean {
  return token.startsWith("##") && [...token].length > 2;
}

function goesOn(token: string): boolean {
  return token.endsWith("@@") && [...token].length > 2;
}

function inAlphabet(token: string): boolean {
  return [...token].every((c) => ALPHABET.has(c));
}

function bytesOf(token: string): Uint8Array {
  return Uint8Array.from([...token], (c) => ALPHABET.get(c)!);
}

/**
 * Whether tokens are bytes: in the alphabet of bytes, and UTF-8 in it, but for a character cut off at either end. Where
 * words begin with its sign for a space, a few may be something else.
 */
function isByteLevel(tokens: readonly string[]): boolean {
  const written = tokens.filter(inAlphabet);
  const whole = written.flatMap((t) => [...bytesOf(t)]);
  const start = whole.findIndex((b) => (b & 0xc0) !== 0x80);
  const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(
    Uint8Array.from(start < 0 ? [] : whole.slice(start)),
  );
  const broken = text.replace(/\ufffd$/, "").split("\ufffd").length - 1;
  const strange = broken + tokens.length - written.length;
  if (strange > 0 && (4 * strange > tokens.length || !written.some((t) => t.startsWith("Ġ")))) return false;
  return /[\u0080-\uffff]/.test(text) || written.some((t) => /[\u0100-\uffff]/.test(t));
}
