"""The subprocess of the pool: imports everything once, then answers each case with its row."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback

import torch
import transformers

from .check import check


def main() -> None:
    """Read cases until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what models print is not an answer
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        model_type, implementation = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            row = one(model_type, implementation)
        print(json.dumps(row), file=answers, flush=True)
        gc.collect()


def one(model_type: str, implementation: str) -> dict[str, object]:
    """The row of one case, whatever happens in it."""
    try:
        return check(model_type, implementation).to_json()
    except Exception as error:  # noqa: BLE001 - a case that fails is a row that says so
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({where})"
        return {"model_type": model_type, "implementation": implementation, "status": "unbuilt", "reason": text}


if __name__ == "__main__":
    main()
