import { ViewerError } from "../errors";
import { Lru, once } from "../lru";
import type { Source } from "./source";

const TYPE = "application/x-hookattn";
/** Bytes of decoded blocks that are kept; the base64 of all of them stays in the page. */
const CACHE = 96 * 2 ** 20;

interface Block {
  start: number;
  end: number;
  element: Element;
}

/**
 * The trace inside the page itself, in `<script type="application/x-hookattn">` blocks; decoded when they are touched.
 */
export function embedded(root: ParentNode = document): Source {
  const blocks = [...root.querySelectorAll(`script[type="${TYPE}"]`)].map(block).sort((a, b) => a.start - b.start);
  let size = 0;
  for (const { start, end } of blocks) {
    if (start !== size || end < start) {
      throw new ViewerError(
        `The page is damaged: a block of the trace starts at byte ${start}, and ${size} was expected.`,
      );
    }
    size = end;
  }
  if (blocks.length === 0) throw new ViewerError("There is no trace in this page: it has no data blocks.");
  const decoded = new Lru<Promise<Uint8Array>>(CACHE);

  function bytes(at: Block): Promise<Uint8Array> {
    return once(decoded, String(at.start), () => decode(at), (block) => block.byteLength);
  }

  return {
    name: blocks[0]!.element.getAttribute("data-name") ?? document.title,
    size,
    async read(start, end) {
      const out = new Uint8Array(end - start);
      const touched = blocks.filter((b) => b.start < end && start < b.end);
      const all = await Promise.all(touched.map(bytes));
      touched.forEach((b, i) => {
        const from = Math.max(start, b.start);
        out.set(all[i]!.subarray(from - b.start, Math.min(end, b.end) - b.start), from - start);
      });
      return out.buffer;
    },
  };
}

function block(element: Element): Block {
  return { start: Number(element.getAttribute("data-start")), end: Number(element.getAttribute("data-end")), element };
}

async function decode({ start, end, element }: Block): Promise<Uint8Array> {
  const codec = element.getAttribute("data-codec");
  let bytes = base64(element.textContent.trim());
  if (codec === "gzip") {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  } else if (codec !== null && codec !== "") {
    throw new ViewerError(`The page holds a block in the coding “${codec}”, and this viewer knows “gzip”.`);
  }
  if (bytes.length !== end - start) {
    throw new ViewerError(
      `The page is damaged: the block at byte ${start} has ${bytes.length} of ${end - start} bytes.`,
    );
  }
  return bytes;
}

function base64(text: string): Uint8Array<ArrayBuffer> {
  const native = Uint8Array as unknown as { fromBase64?: (text: string) => Uint8Array<ArrayBuffer> };
  if (native.fromBase64 !== undefined) return native.fromBase64(text);
  const binary = atob(text);
  const out = new Uint8Array(binary.length);
  for (let i = 0; i < out.length; i++) out[i] = binary.charCodeAt(i);
  return out;
}
