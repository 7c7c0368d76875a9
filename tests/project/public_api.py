"""What users may rely on, written down: public names, signatures and the command line, as plain data.

``python -m tests.project.public_api`` writes ``public_api.json`` anew, after a change of the API that is meant.
"""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any, is_typeddict

FILE = Path(__file__).with_suffix(".json")

# Modules whose public names are the API. Other modules may be renamed and moved at any time.
MODULES = (
    "hookattn",
    "hookattn.analyze",
    "hookattn.analyze.survey",
    "hookattn.attention",
    "hookattn.demo.induction",
    "hookattn.edit",
    "hookattn.interop.bertviz",
    "hookattn.interop.circuitsvis",
    "hookattn.interop.transformer_lens",
    "hookattn.render",
    "hookattn.render.server",
    "hookattn.serving",
    "hookattn.statistics",
    "hookattn.testing",
    "hookattn.training",
)
# Of modules without an __all__, the names that docs/ and the README tell users of.
NAMED = {
    "hookattn.attention": (
        "causal_mask compute_dtype derive dot_scores finish_scores softmax_weights split_additive weighted_values"
    ),
    "hookattn.demo.induction": "InductionConfig InductionTransformer example_tokens load_pretrained",
    "hookattn.render.server": "application listen serve",
}


def names_of(module: Any) -> list[str]:
    if module.__name__ in NAMED:
        return NAMED[module.__name__].split()
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__ and callable(value)
    )


def signature(value: Any) -> str:
    """A signature as text, without the places that annotations come from and addresses of default values."""
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return "(…)"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def described(value: Any) -> Any:
    """A public object as plain data: a class as its constructor and its public members, a function as its signature."""
    if inspect.isclass(value):
        members = {}
        own = {n for base in value.__mro__ if base.__module__.startswith("hookattn") for n in vars(base)}
        for name in sorted(n for n in own if n[0] != "_"):  # what a base of torch has is torch's, and others add to it
            member = inspect.getattr_static(value, name)
            if isinstance(member, (staticmethod, classmethod)):
                member = member.__func__
            if isinstance(member, property):
                members[name] = "property"
            elif inspect.isfunction(member):
                members[name] = signature(member)
            else:
                members[name] = "value"
        fields = sorted(value.__annotations__ if is_typeddict(value) else getattr(value, "__dataclass_fields__", {}))
        # Of the bases only exceptions are the API: what is caught with what.
        bases = [base.__name__ for base in value.__mro__[1:-1] if issubclass(base, BaseException)]
        return {"class": signature(value), "bases": bases, "fields": fields, "members": members}
    if callable(value):
        return signature(value)
    return type(value).__name__


def command_line() -> dict[str, Any]:
    """Every command with its arguments and options."""
    from hookattn.cli.commands import app

    return {
        name: [[*p.opts, *p.secondary_opts, p.type.name, "required" if p.required else ""] for p in command.params]
        for name, command in sorted(app.commands.items())
    }


def public_api() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in MODULES:
        module = import_module(path)
        found[path] = {name: described(getattr(module, name)) for name in names_of(module)}
    found["command line"] = command_line()
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(public_api(), indent=1, ensure_ascii=False, sort_keys=True) + "\n")
