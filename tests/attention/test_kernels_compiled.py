"""The GPU kernels go through the real compiler for real GPUs, which needs none; nothing runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED = {80: 166_912, 90: 232_448}  # bytes that a block may have, by compute capability (CUDA C Programming Guide)
SUMS = "lse max_score entropy total distance"
VARIANTS = [  # kernel, capability, dtype, width, tensors that are there, causal, window
    ("derive_rows", 90, "bf16", 128, "scores weights", True, False),
    ("derive_rows", 80, "fp16", 256, "scores weights mask scale", False, True),
    ("derive_rows", 90, "fp32", 128, "product scores weights bias sinks rows", True, False),
    ("check_rows", 90, "bf16", 128, "v output found mask sinks", True, False),
    ("check_rows", 80, "fp16", 256, "v output found bias rows", True, True),
    ("sum_rows", 90, "bf16", 128, f"level {SUMS} places ranges parts sets masses rows", True, False),
    ("sum_rows", 80, "bf16", 128, f"level {SUMS} places ranges parts sets masses rows", True, True),
    ("sum_rows", 80, "fp16", 256, f"level {SUMS} places sets masses mask bias sinks", False, False),
    ("sum_rows", 90, "fp32", 128, f"level {SUMS} places ranges parts rows", True, False),
    ("sum_rows", 80, "fp32", 64, f"level {SUMS} places ranges parts sets masses", False, False),
    ("sum_rows", 90, "bf16", 128, f"product level {SUMS} mask", False, False),
    ("receive_keys", 90, "bf16", 128, "level received spans rows", True, False),
    ("receive_keys", 80, "fp16", 256, "level received spans rows", True, True),
    ("receive_keys", 80, "fp32", 128, "level received mask bias scale", False, False),
    ("receive_keys", 90, "fp32", 128, "product level received", False, False),
]


def compiled(
    name: str, capability: int, dtype: str, width: int, given: str, causal: bool, window: bool
) -> dict[str, Any]:
    """What became of one variant: bytes of shared and of local memory, and whether tensor cores multiply q and k."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hookattn.attention.kernels import launch, statistics

    named, kernel = given.split(), getattr(launch.kernels(), name)
    if name in ("derive_rows", "check_rows"):
        tile = launch._CHECK if name == "check_rows" else launch._tile_of(4096, width, "product" in named)
        options = tile.options()
    else:
        exact = dtype == "fp32" and "product" not in named
        tiles = statistics._tile_pair(4096, 0 if "product" in named else width, exact)
        options = tiles[name == "receive_keys"].options()
    sizes = {x: options.pop(x) for x in ("BM", "BN")}
    power = launch.next_power_of_2(width)
    constants: dict[str, Any] = {"CAUSAL": causal, "WINDOWED": window, **sizes, "BD": power, "BE": power, "BC": 16}
    optional = (*"product scores weights scale bias mask sinks rows sets ranges places masses parts spans".split(),)
    constants |= dict.fromkeys((x for x in (*optional, *SUMS.split()) if x not in named), None)
    constants |= {} if "bias" in named else {"softcap": None}
    constants |= dict.fromkeys(("q_d", "k_d", "v_e", "out_e", "mask_s", "bias_s", "scale_s", "product_s"), 1)
    constants = {x: value for x, value in constants.items() if x in kernel.arg_names}
    own = {"mask": "*u8", "rows": "*i64", "spans": "*i64", "places": "*i64", "ranges": "*i32", "sets": "*bf16"}
    own |= dict.fromkeys((*SUMS.split(), "scores", "found", "level", "received", "masses", "parts"), "*fp32")
    own |= {"product": "*fp32"} if name == "derive_rows" else {}
    signature = {x: "constexpr" if x in constants else "i32" for x in kernel.arg_names}
    signature |= {x: own.get(x, f"*{dtype}") for x in ("q", "k", *named)}
    signature |= {x: "fp32" for x in ("factor", "softcap") if x not in constants}
    uneven = {"factor", "softcap", "offset", "window", "start", "step", "N", "R", "per", *constants}
    even = [i for i, x in enumerate(kernel.arg_names) if x not in uneven]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": True},
    )
    code = made.asm["ptx"]
    products = "wgmma.mma" in code or "mma.sync" in code
    return {"shared": made.metadata.shared, "local": local(made.asm["cubin"]), "multiplies": products}


def local(code: bytes) -> int:
    """Bytes of local memory of a thread: what did not fit into registers. By a program that comes with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return max(int(x) for x in re.findall(r"STACK:(\d+)", text))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By a process of its own: the interpreter leaves traces in the language that the compiler reads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("index", range(len(VARIANTS)))
def test_it_compiles(found: list[dict[str, Any]], index: int) -> None:
    name, capability, _, _, given, *_ = VARIANTS[index]
    made = found[index]
    assert made["shared"] <= SHARED[capability]
    if name in ("sum_rows", "receive_keys"):
        assert made["local"] <= 320, "hardly anything of a long sweep may be left to local memory"
    formed = "product" in given.split() and "sets" not in given.split()
    assert made["multiplies"] != formed, "products of q and k, and with sets: on the tensor cores"


if __name__ == "__main__":
    print(json.dumps([compiled(*variant) for variant in VARIANTS]))
