"""The subprocess of the pool: imports everything once, then answers each case with its row."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys

import torch
import transformers

from .beside import check_beside
from .check import check


def main() -> None:
    """Read cases until the input ends; with ``--beside`` each is followed beside its replays."""
    beside = "--beside" in sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what models print is not an answer
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        model_type, implementation = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            row = (check_beside(model_type) if beside else check(model_type, implementation)).to_json()
        print(json.dumps(row), file=answers, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
