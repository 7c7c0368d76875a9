"""What becomes of memory that was freed: the allocator as it is, and one that keeps it for what is allocated next.

With glibc's defaults large blocks go back to the system, and taking new pages costs from nothing to more than the
forward, most of all on virtual machines. That is what users have, and is measured first. What an allocator saves that
keeps freed memory, for everybody in the run alike, is measured in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}


def keeps() -> bool:
    """Whether this process keeps freed memory because it was told so."""
    return KEEPING.items() <= os.environ.items()


def name() -> str:
    """What becomes of freed memory in this process."""
    if keeps():
        return "freed memory kept"
    chosen = KEEPING.keys() & os.environ.keys() or "LD_PRELOAD" in os.environ
    return "an allocator of your choice" if chosen else "the allocator's defaults"


def can_keep() -> bool:
    """Whether another process can be told to keep freed memory, and nobody has chosen an allocator already."""
    return sys.platform == "linux" and name() == "the allocator's defaults"


def run_keeping(arguments: Sequence[str]) -> dict[str, Any]:
    """``python -m benchmarks`` with these arguments in a process that keeps freed memory: what it writes as JSON."""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.json")
        command = [sys.executable, "-m", "benchmarks", *arguments, "--json", os.fspath(path)]
        subprocess.run(command, env={**os.environ, **KEEPING}, check=True)
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
