import { Unreachable, ViewerError, message } from "../errors";
import type { Source } from "./source";

/**
 * A trace behind a URL that answers Range requests. A file that changes while it is viewed is an error, not a mixture.
 */
export async function served(url: string): Promise<Source> {
  // Eight bytes, the length of a trace file's header, tell the size of the file and its tag; every later request names the
  // tag.
  const first = await request(url, 0, 8, null);
  const total = /\/(\d+)$/.exec(first.headers.get("Content-Range") ?? "")?.[1];
  if (total === undefined) {
    throw new ViewerError(`${url}: the server does not answer Range requests, so the trace cannot be read in parts.`);
  }
  const tag = first.headers.get("ETag");
  const path = new URL(url, location.href).pathname;
  return {
    name: decodeURIComponent(first.headers.get("X-Name") ?? path.slice(path.lastIndexOf("/") + 1)),
    size: Number(total),
    async read(start, end) {
      if (start >= end) return new ArrayBuffer(0);
      const response = await request(url, start, end, tag);
      const bytes = await response.arrayBuffer().catch((error: unknown) => {
        throw new Unreachable(`${url}: the connection broke off: ${message(error)}. Is the server still running?`);
      });
      if (bytes.byteLength !== end - start) {
        throw new ViewerError(`${url}: asked for bytes ${start} to ${end}, and got ${bytes.byteLength} bytes.`);
      }
      return bytes;
    },
  };
}

async function request(url: string, start: number, end: number, tag: string | null): Promise<Response> {
  const headers: Record<string, string> = { Range: `bytes=${start}-${end - 1}` };
  if (tag !== null) headers["If-Range"] = tag;
  const stop = new AbortController();
  const response = await fetch(url, { headers, cache: "no-store", signal: stop.signal }).catch((error: unknown) => {
    throw new Unreachable(`${url}: no answer (${message(error)}). Is the server still running?`);
  });
  const other = tag !== null && response.headers.get("ETag") !== tag;
  if (response.status === 412 || (tag !== null && response.status === 200) || (response.status === 206 && other)) {
    // A server that holds the file it opened says how to see the new one; from any other it is there after a reload.
    const said = response.status === 412 ? (await response.text().catch(() => "")).trim().slice(0, 300) : "";
    stop.abort();
    throw new Unreachable(
      said || "The file has changed since it was opened. Reload the page to see what it holds now.",
    );
  }
  if (response.status === 404 || response.status === 410) {
    throw new Unreachable("The file is not there any more. Restore it and reload the page.");
  }
  if (response.status !== 206) {
    const text = response.status === 200 ? "" : (await response.text().catch(() => "")).slice(0, 300);
    stop.abort();
    throw new ViewerError(`${url}: expected 206 Partial Content, and got ${response.status}. ${text}`.trim());
  }
  return response;
}
