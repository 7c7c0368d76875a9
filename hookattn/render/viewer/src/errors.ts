/** What went wrong, in words for the reader of the page: what was expected, what was found, and how to mend it. */
export class ViewerError extends Error {
  override name = "ViewerError";
}

/** The trace cannot be read any more, at any place: there is no sense in asking for the next one. */
export class Unreachable extends ViewerError {
  override name = "Unreachable";
}

/** A field that is not here; says how to have it: by which `capture=`, or in a page that had no room for it. */
export class NotCaptured extends ViewerError {
  override name = "NotCaptured";
  constructor(
    readonly field: string,
    where: string,
    leftOut: boolean,
  ) {
    super(
      leftOut
        ? `“${field}” of ${where} had no room in this page. Make the page with fields=("${field}", …), or open the ` +
            "trace itself with “hookattn view”."
        : `“${field}” of ${where} is not in this trace, and does not follow from what is. ` +
            `Trace again with capture=("${field}", …), or without capture= to keep everything.`,
    );
  }
}

/** A field that a call does not have, as its attention is of another kind; says why. */
export class FieldAbsent extends ViewerError {
  override name = "FieldAbsent";
  constructor(
    readonly field: string,
    where: string,
    why: string,
  ) {
    super(`There is no “${field}” of ${where}: ${why}.`);
  }
}

export function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
