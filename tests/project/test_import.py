"""What ``import hookattn`` costs and pulls in, and which way the arrows inside of it point."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import hookattn

ROOT = Path(hookattn.__file__).parent
CORE = sorted([*ROOT.glob("*.py"), *ROOT.glob("taps/*.py"), *ROOT.glob("store/*.py")])
OUTER = ("cli", "demo", "analyze", "render", "testing")
OPTIONAL = (
    "anywidget",
    "IPython",
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
FAMILIES = re.compile(r"gpt|llama|bert|mistral|mixtral|gemma|qwen|whisper|bloom|falcon|t5|swin|deepseek")


def run(code: str) -> str:
    """In a fresh interpreter, with the same hookattn that is tested here."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
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
    """At most a quarter of what torch, einops and safetensors take, in processor time, as machines are busy."""
    share = statistics.median(float(str(m["own"])) / float(str(m["torch"])) for m in imports)
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


@pytest.mark.parametrize("module", ["hookattn.cli.app", "hookattn.analyze", "hookattn.render", "hookattn.testing"])
def test_what_is_around_the_core_imports_nothing_optional(module: str) -> None:
    if module == "hookattn.cli.app":
        pytest.importorskip("click")
    found = run(f"import sys, {module}; print(*sorted(sys.modules))").split()
    assert module in found and not {name.partition(".")[0] for name in found} & {*OPTIONAL}


def test_all_names_are_there() -> None:
    assert sorted(hookattn.__all__) == sorted(set(hookattn.__all__))
    assert all(hasattr(hookattn, name) for name in hookattn.__all__)
    for name in ("trace", "tracing", "load", "Trace", "Adapter", "register"):
        assert name in hookattn.__all__ and getattr(hookattn, name).__doc__


# ------------------------------------------------------------------------------------------------ the arrows


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Names and strings of a file, without comments and docstrings."""
    source = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.STRING) and token.start[0] not in docstrings:
            yield token.start[0], token.string


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, by its full name."""
    package = [*path.relative_to(ROOT.parent).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_names_no_model_and_points_outward_never(path: Path) -> None:
    named = [(line, word) for line, word in words(path) if FAMILIES.search(word.lower())]
    assert not named, f"names a model: {named}"
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in ("hookattn_adapters", "transformers", "click", "rich", "matplotlib", "PIL", "numpy"), name
        assert top != "hookattn" or not rest or rest[0] not in OUTER, f"core imports {name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("taps/*.py")), ids=lambda path: path.name)
def test_a_tap_knows_nothing_of_the_rest(path: Path) -> None:
    """A kernel and the record of it: no session, no selection, no file, no site."""
    outside = (
        "session",
        "api",
        "selection",
        "trace",
        "store",
        "site",
        "registry",
        "adapter",
        "hooks",
        "traces",
        "keeper",
        "certificate",
        "describe",
    )
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] != "hookattn" or len(parts) == 1 or parts[1] not in outside, f"a tap imports {name}"


def test_these_checks_see_what_they_are_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "hookattn")
    path = tmp_path / "hookattn" / "taps" / "made_up.py"
    path.parent.mkdir(parents=True)
    path.write_text('"""Like GPT-2."""\nfrom ..cli import app  # bert\nimport rich.table\nx = "LlamaAttention"\n')
    assert [word for _, word in words(path) if FAMILIES.search(word.lower())] == ['"LlamaAttention"']
    assert list(imported(path)) == ["hookattn.cli.app", "rich.table"]
