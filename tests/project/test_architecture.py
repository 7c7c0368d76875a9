"""Which way the arrows inside the package point. The packages stand here in their order, as data: each imports only
what stands above it. A new module of a package is held to its package's place, and a new package has to be given one.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import hookattn

ROOT = Path(hookattn.__file__).parent
ADAPTERS = ROOT.parent / "adapters" / "hookattn_adapters"

# The flow of a trace: find -> tap -> record -> keep -> read -> show. docs/architecture.md says what each is.
ORDER = (
    "printable",
    "cached",
    "errors",
    "version",
    "checks",
    "optional",
    "torch_internals",
    "tokens",
    "attention",
    "statistics",
    "calls",
    "taps",
    "models",
    "generation",
    "interop",
    "store",
    "merging",
    "recording",
    "planning",
    "traces",
    "edit",
    "api",
    "pretrained",
    "__init__",
    "analyze",
    "render",
    "training",
    "testing",
    "serving",
    "console",
    "demo",
    "cli",
)
CORE = ORDER[: ORDER.index("analyze")]
# What the core may import; heavy optional libraries are imported by the outer packages alone.
CORE_LIBRARIES = {"torch", "einops", "safetensors", "triton", *sys.stdlib_module_names}

# Own modules that are imported late, in a function, and why. Such an import is an arrow like any other.
LATE = {
    "attention.kernels": "triton is heavy, and only a GPU needs it",
    "statistics.fused": "likewise",
    "store": "a trace in memory writes no file, and `import hookattn` shall not pay for it",
    "generation": "`import hookattn` shall not pay for what only a generation of many steps needs",
    "merging": "`import hookattn` shall not pay for what only a run of several ranks needs",
    "interop": "other libraries' shapes are for who has them",
    "render": "figures and pages each need a library of their own",
    "analyze": "pandas is heavy",
    "cli": "click is an extra",
    "demo": "its model is read only where the demo runs",
}
# Models' names have no place in the core.
FAMILIES = re.compile(r"gpt|llama|bert|mistral|mixtral|gemma|qwen|whisper|bloom|falcon|t5|swin|deepseek")
# What is private of torch: modules and names with an underscore, those of nn.Module's dictionaries and of a tensor's
# counters too. What is not: operators (`torch._native_multi_head_attention` as the name of what dispatches,
# `torch.ops.aten._softmax`), which files of exported programs name as well, and private names of other libraries.
PRIVATE_NAMES = re.compile(r"torch\.(?!ops\.)(?:\w+\.)*_[a-zA-Z]\w*(?:\.|$)")
PRIVATE_ATTRIBUTES = {
    *("_modules", "_parameters", "_buffers", "_call_impl", "_version", "_cdata"),
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
# What exchanges or reads code, or walks frames. To ask whether something is a Python function is neither, nor is where
# an error was raised.
CODE = {"__code__", "CodeType", "FrameType", "_getframe", "currentframe", "f_back", "f_locals", "co_names"}


class Import(NamedTuple):
    """One arrow: from a module to a module, both named below the package."""

    source: str
    target: str
    line: int
    late: bool
    types_only: bool


def name_of(path: Path, root: Path) -> str:
    """``taps.sdpa`` for hookattn/taps/sdpa.py, ``taps`` for its ``__init__``, ``__init__`` for the package's own."""
    parts = path.relative_to(root).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def sources(root: Path) -> dict[str, Path]:
    found = (path for path in root.rglob("*.py") if "node_modules" not in path.parts)
    return {name_of(path, root): path for path in sorted(found)}


def imports(root: Path, package: str = "hookattn") -> Iterator[Import]:
    """Every import of an own module, late ones and those for types alone included."""
    modules = sources(root)
    for source, path in modules.items():
        tree = ast.parse(path.read_text())
        inner: dict[int, str] = {}
        for node in ast.walk(tree):
            kind = "late" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else ""
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                kind = "types"
            if kind:
                inner.update((id(child), kind) for child in ast.walk(node))
        parents = [package, *path.relative_to(root).with_suffix("").parts[:-1]]
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = parents[: len(parents) - node.level + 1] if node.level else []
                stem = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
                names = [f"{stem}.{alias.name}" for alias in node.names]
            for name in names:
                if name != package and not name.startswith(package + "."):
                    continue
                below = name.removeprefix(package).removeprefix(".")
                while below and below not in modules:  # a name in a module
                    below = below.rpartition(".")[0]
                target = below or "__init__"
                if target != source:
                    kind = inner.get(id(node), "")
                    yield Import(source, target, getattr(node, "lineno", 0), kind == "late", kind == "types")


def place(module: str, order: Sequence[str] = ORDER) -> int:
    return order.index(module.partition(".")[0])


def upward(found: Iterator[Import] | list[Import], order: Sequence[str] = ORDER) -> list[str]:
    """Imports of what stands below, as text."""
    return [
        f"{x.source}:{x.line} imports {x.target}, which stands below it"
        for x in found
        if place(x.target, order) > place(x.source, order)
    ]


def circles(found: Iterator[Import] | list[Import]) -> list[list[str]]:
    """Sets of modules that import each other, directly or not (Tarjan's components of more than one module)."""
    graph: dict[str, set[str]] = {}
    for x in found:
        graph.setdefault(x.source, set()).add(x.target)
        graph.setdefault(x.target, set())

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    reach = {module: reached(module) for module in graph}
    tied = {
        tuple(sorted(m for m in reach[module] if module in reach[m])) for module in graph if module in reach[module]
    }
    return sorted(map(list, tied))


@pytest.fixture(scope="module")
def arrows() -> list[Import]:
    return list(imports(ROOT))


def test_every_package_has_its_place() -> None:
    tops = {name.partition(".")[0] for name in sources(ROOT)}
    assert tops == set(ORDER), "a package or module is missing from ORDER, or ORDER names one that is gone"
    loose = list(ROOT.glob("*.py"))
    assert len(loose) <= 12, f"{len(loose)} modules directly in hookattn/: {[path.name for path in loose]}"
    bare = [d for d in ROOT.rglob("*") if d.is_dir() and list(d.glob("*.py")) and not (d / "__init__.py").exists()]
    assert not bare, f"packages without an __init__.py: {bare}"


def test_every_package_says_what_it_is() -> None:
    for name, path in sources(ROOT).items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no caption"


def test_imports_point_one_way(arrows: list[Import]) -> None:
    found = upward(arrows)
    assert not found, "\n".join(found)


def test_no_module_is_in_a_circle(arrows: list[Import]) -> None:
    assert circles(arrows) == []


def test_late_imports_have_a_reason(arrows: list[Import]) -> None:
    def excused(x: Import) -> bool:
        return any(x.target == name or x.target.startswith(name + ".") for name in LATE)

    found = [f"{x.source}:{x.line} imports {x.target} late" for x in arrows if x.late and not excused(x)]
    assert not found, "\n".join(found)
    used = {name for name in LATE for x in arrows if x.late and (x.target + ".").startswith(name + ".")}
    assert used == set(LATE), f"no longer needed: {set(LATE) - used}"


def test_adapters_use_the_public_api_alone() -> None:
    found = []
    for path in sorted(ADAPTERS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import) and any(a.name.startswith("hookattn.") for a in node.names):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and not node.level:
                top, _, rest = (node.module or "").partition(".")
                public = not rest and {a.name for a in node.names} <= set(hookattn.__all__)
                if top == "hookattn" and not public:
                    found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


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


def core() -> dict[str, Path]:
    """Without interop/ and pretrained/, whose files are of other libraries, which are imported where they are used."""
    return {
        name: path
        for name, path in sources(ROOT).items()
        if name.partition(".")[0] in CORE and not name.startswith(("interop.", "pretrained."))
    }


def test_the_core_names_no_model() -> None:
    found = [
        f"{name}:{line}: {word}"
        for name, path in core().items()
        for line, word in words(path)
        if FAMILIES.search(word.lower())
    ]
    assert not found, "\n".join(found)


def test_the_core_needs_nothing_heavy() -> None:
    found = []
    for name, path in core().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found += [f"{name}: {n}" for n in names if n.partition(".")[0] not in CORE_LIBRARIES]
    assert not found, "own modules by a full name, or foreign ones:\n" + "\n".join(found)


def private_of_torch(path: Path) -> list[tuple[int, str]]:
    """Lines on which a file goes past torch's public names, or into code objects and frames; docstrings left out."""
    tree = ast.parse(path.read_text())
    docstrings: set[int] = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        dotted: list[str] = []
        names: set[str] = set()
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            dotted, names = [ast.unparse(node)], {node.attr}
        elif isinstance(node, ast.Name):
            names = {node.id}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            dotted, names = [node.value], {node.value}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "FunctionType":
            names = {"CodeType"}  # a function made of code
        if names & (PRIVATE_ATTRIBUTES | CODE) or any(PRIVATE_NAMES.match(name) for name in dotted):
            found.append((getattr(node, "lineno", 0), ast.unparse(node)))
    return sorted(set(found))


def test_what_is_private_of_torch_is_in_one_package() -> None:
    """Of the whole package, `testing` and `analyze` included: see hookattn/torch_internals."""
    found = [
        f"{name}:{line}: {text}"
        for name, path in sources(ROOT).items()
        if not name.startswith("torch_internals")
        for line, text in private_of_torch(path)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.utils._pytree import tree_leaves",
        "from types import FrameType",
        "Patch(torch._C.ScriptFunction, '__call__', 1)",
        "sys.modules.get('torch._dynamo.eval_frame')",
        "vars(module)['_forward_hooks']",
        "module._modules.values()",
        "x.untyped_storage()._cdata",
        "getattr(forward, '__code__')",
        "types.FunctionType(code, {})",
        "sys._getframe(1)",
    ],
)
def test_what_is_private_of_torch_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "module.py").write_text(line + "\n")
    assert private_of_torch(tmp_path / "module.py")


@pytest.mark.parametrize(
    "line",
    [
        '"""The fast path: ``torch._native_multi_head_attention``, module._modules."""',
        "kernels = {'_native_multi_head_attention': handle}",
        "torch.ops.aten._softmax.default",
        "self._modules_seen = x._replace(mask=None)",
        "isinstance(function, FunctionType)",
        "torch.nn.functional.softmax(x)",
    ],
)
def test_what_is_public_is_let_be(tmp_path: Path, line: str) -> None:
    (tmp_path / "module.py").write_text(line + "\n")
    assert not private_of_torch(tmp_path / "module.py")


def test_no_module_hides_a_public_name() -> None:
    """``from .flow import flow`` in a package with a module ``flow`` makes ``package.flow`` the one or the other."""
    modules = sources(ROOT)
    for name, path in modules.items():
        if path.name != "__init__.py":
            continue
        package = "" if name == "__init__" else name + "."
        inside = {m.removeprefix(package) for m in modules if m.startswith(package)}
        inside = {m for m in inside if "." not in m and m not in ("__init__", name)}
        public: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                stem = node.module or ""
                public |= {a.asname or a.name for a in node.names if stem}
        assert not public & inside, f"{name}: {sorted(public & inside)} are modules and functions at once"


def test_these_checks_see_what_they_are_for(tmp_path: Path) -> None:
    root = tmp_path / "hookattn"
    (root / "taps").mkdir(parents=True)
    (root / "calls").mkdir()
    for package in (root, root / "taps", root / "calls"):
        (package / "__init__.py").write_text('"""A package."""\n')
    (root / "taps" / "one.py").write_text(
        '"""Like GPT-2."""\nfrom ..calls import call\nimport rich.table\nx = "LlamaAttention"\n'
    )
    (root / "calls" / "call.py").write_text("def f():\n    from ..taps.one import x\n    return x\n")
    found = list(imports(root))
    assert [(x.source, x.target, x.late) for x in found] == [
        ("calls.call", "taps.one", True),
        ("taps.one", "calls.call", False),
    ]
    order = ("calls", "taps")
    assert upward(found, order) == ["calls.call:2 imports taps.one, which stands below it"]
    assert circles(found) == [["calls.call", "taps.one"]]
    assert [w for _, w in words(root / "taps" / "one.py") if FAMILIES.search(w.lower())] == ['"LlamaAttention"']
