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
pytestmark = pytest.mark.slow

SHARED = {80: 166_912, 90: 232_448}  # bytes that a block may have, by compute capability (CUDA C Programming Guide)
VARIANTS = [  # capability, dtype, width, tensors that are there, causal, window
    (90, "bf16", 128, "scores weights", True, False),
    (80, "fp16", 256, "weights mask scale", False, True),
    (90, "fp32", 128, "product scores weights bias sinks rows", True, False),
    (90, "bf16", 128, "v output found mask sinks", True, False),
    (80, "fp16", 256, "v output found bias rows", True, True),
]


def compiled(capability: int, dtype: str, width: int, given: str, causal: bool, window: bool) -> dict[str, Any]:
    """What became of one variant: bytes of shared memory, and whether tensor cores multiply."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hookattn.kernels import launch

    named = given.split()
    kernel = launch.kernels().check_rows if "v" in named else launch.kernels().derive_rows
    bm, bn, warps, stages = launch._CHECK if "v" in named else launch._tile(4096, width, "product" in named)
    power = launch._power(width)
    constants: dict[str, Any] = {"CAUSAL": causal, "WINDOWED": window, "BM": bm, "BN": bn, "BD": power, "BE": power}
    optional = ("product", "scores", "weights", "scale", "bias", "mask", "sinks", "rows")
    constants |= dict.fromkeys((name for name in optional if name not in named), None)
    constants |= {} if "bias" in named else {"softcap": None}
    constants |= dict.fromkeys(("q_d", "k_d", "v_e", "out_e", "mask_s", "bias_s", "scale_s"), 1)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    own = {"scores": "*fp32", "product": "*fp32", "found": "*fp32", "mask": "*u8", "rows": "*i64"}
    signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    signature |= {name: own.get(name, f"*{dtype}") for name in ("q", "k", *named)}
    signature |= {name: "fp32" for name in ("factor", "softcap") if name not in constants}
    uneven = {"factor", "softcap", "offset", "window", "start", "step", "N", "per", *constants}
    even = [i for i, name in enumerate(kernel.arg_names) if name not in uneven]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
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
def test_it_compiles(found: list[dict[str, Any]], index: int) -> None:
    assert found[index]["shared"] <= SHARED[VARIANTS[index][0]]
    assert found[index]["multiplies"] == ("product" not in VARIANTS[index][3]), "16-bit products: on the tensor cores"


if __name__ == "__main__":
    print(json.dumps([compiled(*variant) for variant in VARIANTS]))
