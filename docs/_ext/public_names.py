"""``{public-names} package``: every name of a package's ``__all__``, with what its docstring says."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
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
        lines: list[str] = []
        for name in names:
            lines += [f".. {_directive(getattr(module, name))}:: {package}.{name}", ""]
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


def _directive(value: Any) -> str:
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "automodule" if inspect.ismodule(value) else "autodata"


def setup(app: Sphinx) -> dict[str, bool]:
    """As Sphinx wants it."""
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True}
