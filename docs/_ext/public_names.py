"""``{public-names} package``: every name of a package's ``__all__``, with what its docstring says."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective


class PublicNames(SphinxDirective):
    """The argument is a package. ``:only:`` has the names, where not all of ``__all__`` are meant; ``:errors:``: those
    that are errors or warnings."""

    required_arguments = 1
    option_spec = {"only": str.split, "errors": lambda _: True}  # noqa: RUF012 - as docutils has it

    def run(self) -> list[nodes.Node]:
        package = self.arguments[0]
        module = importlib.import_module(package)
        names = self.options.get("only") or names_of(module)
        if "errors" in self.options:
            names = [name for name in names if _directive(getattr(module, name)) == "autoexception"]
        # In reStructuredText, as the docstrings are; the page itself is Markdown.
        lines = ["````{eval-rst}"]
        for name in names:
            value = getattr(module, name)
            lines += [f".. {_directive(value)}:: {package}.{name}", *_content(value), ""]
        lines.append("````")
        self.env.domaindata["py"].setdefault("listed", set()).update(f"{package}.{name}" for name in names)
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(lines, source=package), self.content_offset, node, match_titles=True)
        return node.children


def names_of(module: Any) -> list[str]:
    """Its public names: those of ``__all__``, else what is defined in it."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = {name: value for name, value in vars(module).items() if name[0] != "_" and callable(value)}
    return [name for name, value in own.items() if getattr(value, "__module__", None) == module.__name__]


def _content(value: Any) -> list[str]:
    """What stands below an entry that has no docstring: of data, which has that of its type, what is in it."""
    if callable(value) or inspect.ismodule(value):
        return []
    items = list(value) if isinstance(value, Collection) and not isinstance(value, str) else [value]
    words = ", ".join(f"``{getattr(item, 'name', item)}``" for item in items)
    return ["", f"   A {type(value).__name__}: {words}."]


def _directive(value: Any) -> str:
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "automodule" if inspect.ismodule(value) else "py:data"


def _check(app: Sphinx, env: Any) -> None:
    """That every name which was listed has become an entry: a page of their bare names would be as silent as none."""
    data = env.domaindata["py"]
    known = {name.rpartition(".")[2] for name in data["objects"]}
    missing = sorted(name for name in data.get("listed", ()) if name.rpartition(".")[2] not in known)
    if missing:
        raise ExtensionError(f"the reference lists {len(missing)} names and has no entry of them: {missing[:8]}")


def setup(app: Sphinx) -> dict[str, bool]:
    """As Sphinx wants it."""
    app.add_directive("public-names", PublicNames)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True}
