/** What went wrong, in words for the reader of the page: what was expected, what was found, and how to mend it. */
export class ViewerError extends Error {
  override name = "ViewerError";
}

/** A field that the trace does not hold; says which `capture=` keeps it. */
export class NotCaptured extends ViewerError {
  override name = "NotCaptured";
  constructor(
    readonly field: string,
    where: string,
  ) {
    super(
      `“${field}” of ${where} is not in this trace, and does not follow from what is. ` +
        `Trace again with capture=("${field}", …), or without capture= to keep everything.`,
    );
  }
}

export function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
