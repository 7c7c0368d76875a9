"""What ``import hookattn`` costs and pulls in. Which way its imports point: see test_architecture.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hookattn

ROOT = Path(hookattn.__file__).parent
OPTIONAL = (
    "accelerate",
    "anywidget",
    "IPython",
    "lightning",
    "matplotlib",
    "pandas",
    "PIL",
    "plotly",
    "pyarrow",
    "scipy",
    "starlette",
    "traitlets",
    "transformers",
    "uvicorn",
    "wandb",
)
NOT_AT_IMPORT = (
    "click",
    "rich",
    *OPTIONAL,
    "hookattn_adapters",
    "hookattn.store",
    "hookattn.cli",
    "hookattn.demo",
    "torch._dynamo",
    "torch.nn.attention.flex_attention",
)


def run(code: str) -> str:
    """In a fresh interpreter, with the same hookattn that is tested here."""
    # Python keeps what it compiled, as it does for a user: an import is measured and no compilation.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, "PYTHONPATH": str(ROOT.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


MEASURE = """
import json, sys, time
begin = time.process_time()
import torch, einops, safetensors
middle = time.process_time()
import torch.nn.attention.flex_attention as flex
base = set(sys.modules)
def state():
    f, o = torch.nn.functional, torch.overrides
    owners = [(torch, n) for n in dir(torch)] + [(f, n) for n in dir(f)] + [(o, n) for n in dir(o)]
    owners += [(torch.Tensor, n) for n in dir(torch.Tensor)] + [(torch.nn.Module, n) for n in dir(torch.nn.Module)]
    owners += [(flex, n) for n in dir(flex)]
    found = {(id(a), n): getattr(a, n) for a, n in owners if n[0] != "_" or n.startswith("__torch")}
    codes = {key: getattr(x, "__code__", None) for key, x in found.items()}
    hooks = {n: len(x) for n, x in vars(torch.nn.modules.module).items() if n.startswith("_global_") and len(x or ())}
    return {k: id(x) for k, x in found.items() if callable(x) and not hasattr(x, "__self__")}, codes, hooks, (
        torch._C._len_torch_function_stack(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
        torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype())
import threading, warnings, signal
before = state(), threading.active_count(), list(warnings.filters), signal.getsignal(signal.SIGINT), sys.excepthook
again = time.process_time()
import hookattn
end = time.process_time()
after = state(), threading.active_count(), list(warnings.filters), signal.getsignal(signal.SIGINT), sys.excepthook
print(json.dumps({"torch": middle - begin, "own": end - again, "untouched": before == after,
                  "new": sorted(set(sys.modules) - base)}))
"""


@pytest.fixture(scope="module")
def imports() -> list[dict[str, object]]:
    return [json.loads(run(MEASURE)) for _ in range(3)]


def test_the_import_is_light(imports: list[dict[str, object]]) -> None:
    """At most a quarter of what torch, einops and safetensors take: processor time, and of each the least of three, as
    other work on the machine only ever adds to it."""
    least = {name: min(float(str(m[name])) for m in imports) for name in ("own", "torch")}
    share = least["own"] / least["torch"]
    assert share <= 0.25, f"{share:.0%} of the time that torch, einops and safetensors take"


def test_the_import_has_no_effects(imports: list[dict[str, object]]) -> None:
    assert all(m["untouched"] for m in imports)


def test_nothing_heavy_is_imported(imports: list[dict[str, object]]) -> None:
    found = run("import sys, hookattn; print(*sorted(sys.modules))").split()
    heavy = [name for name in found if any(name == n or name.startswith(n + ".") for n in NOT_AT_IMPORT)]
    assert "hookattn.api" in found and not heavy, heavy
    new = {str(name).partition(".")[0] for name in imports[0]["new"]}  # type: ignore[attr-defined]
    foreign = new - set(sys.stdlib_module_names) - {"hookattn", "torch", "safetensors", "einops"}
    assert not foreign, f"neither the standard library's nor declared: {foreign}"


@pytest.mark.parametrize(
    "module", ["hookattn.cli.commands", "hookattn.analyze", "hookattn.render", "hookattn.testing", "hookattn.training"]
)
def test_what_is_around_the_core_imports_nothing_optional(module: str) -> None:
    if module == "hookattn.cli.commands":
        pytest.importorskip("click")
    found = run(f"import sys, {module}; print(*sorted(sys.modules))").split()
    assert module in found and not {name.partition(".")[0] for name in found} & {*OPTIONAL}


def test_all_names_are_there() -> None:
    assert sorted(hookattn.__all__) == sorted(set(hookattn.__all__))
    assert all(hasattr(hookattn, name) for name in hookattn.__all__)
    for name in ("trace", "tracing", "load", "Trace", "Adapter", "register"):
        assert name in hookattn.__all__ and getattr(hookattn, name).__doc__
