"""The GPU kernels go through the real compiler for real GPUs, which needs none; nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED = {80: 166_912, 90: 232_448}  # bytes that a block may have, by compute capability (CUDA C Programming Guide)
VARIANTS = [  # dtype, width, tensors that are there, causal, window
    ("bf16", 128, "scores weights", True, False),
    ("fp16", 256, "weights", True, True),
    ("bf16", 64, "scores weights scale bias mask sinks rows", False, True),
    ("fp32", 128, "product scores weights bias mask", True, False),
    ("fp32", 80, "product weights", False, False),
]


def compiled(dtype: str, width: int, given: str, causal: bool, window: bool, capability: int) -> dict[str, Any]:
    """What became of one variant: bytes of shared memory, and whether tensor cores multiply."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hookattn.kernels import launch

    kernel, named = launch.kernels().derive_rows, given.split()
    own = {"scores": "*fp32", "product": "*fp32", "weights": f"*{dtype}", "mask": "*u8", "rows": "*i64"}
    bm, bn, warps, stages = launch._tile(4096, width, "product" in named)
    constants: dict[str, Any] = {"CAUSAL": causal, "WINDOWED": window, "BM": bm, "BN": bn}
    constants["BD"] = 1 << (width - 1).bit_length()
    optional = ("product", "scores", "weights", "scale", "bias", "mask", "sinks", "rows")
    constants |= dict.fromkeys((name for name in optional if name not in named), None)
    constants |= {} if "bias" in named else {"softcap": None}
    signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    signature |= {name: own.get(name, f"*{dtype}") for name in ("q", "k", *named)}
    signature |= {name: "fp32" for name in ("factor", "softcap") if name not in constants}
    made = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    code = made.asm["ptx"]
    return {"shared": made.metadata.shared, "multiplies": "wgmma.mma" in code or "mma.sync" in code}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By a process of its own: the interpreter leaves traces in the language that the compiler reads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("index", range(len(VARIANTS)))
@pytest.mark.parametrize("capability", SHARED)
def test_it_compiles(found: list[dict[str, Any]], capability: int, index: int) -> None:
    made = found[list(SHARED).index(capability) * len(VARIANTS) + index]
    assert made["shared"] <= SHARED[capability]
    assert made["multiplies"] == ("product" not in VARIANTS[index][2]), "16-bit products belong on the tensor cores"


if __name__ == "__main__":
    print(json.dumps([compiled(*variant, capability) for capability in SHARED for variant in VARIANTS]))
