"""What the path of a module says about the attention in it: layer, stack and kind."""

from __future__ import annotations

import re

from torch import nn

from ..calls.site import Site
from ..torch_internals.module_state import children_of
from .layer_numbers import layer_entry, number

# The first that fits wins: in a path such as vision_model.encoder the modality says more than the encoder.
_STACKS = (
    ("vision", re.compile(r"vision|visual|image|pixel|vit(?=_|$)")),
    ("audio", re.compile(r"audio|speech|wav")),
    ("text", re.compile(r"text|language")),
    ("decoder", re.compile(r"decoder|(?:^|_)dec(?:_|$)")),
    ("encoder", re.compile(r"encoder(?!_attn|_decoder|decoder)|(?:^|_)enc(?:_|$)")),
)


_CROSS = re.compile(
    r"cross(?!_?encoder)|enc(?:oder)?_?(?:dec(?:oder)?_?)?att|encdec|multihead_attn$|src_attn|(?<![a-z])x_?att",
    re.IGNORECASE,
)


def layer_of(path: str, root: nn.Module) -> tuple[int | None, int | None]:
    """The number of the layer that a path leads to, and of how many; (None, None): neither is known before it runs.

    Numbers begin anew in each stage of a model that has several; there they say nothing.
    """
    found = layer_entry(path, root)
    if found is None:
        numbers = [int(part) for part in path.split(".") if part.isdigit()]
        return (numbers[0], None) if len(numbers) == 1 else (None, None)
    entry, nested = found
    site, real = _deepest(path, root)
    if nested and _attends_elsewhere(real, site, entry.container, root):
        return None, None
    return number(entry.container, entry.name, site, real[len(entry.path) + 1 :], kind_of)


def running_layer(path: str, root: nn.Module) -> str:
    """The path of the layer that a path leads to, where :func:`layer_of` knows no number: what is to be counted."""
    found = layer_entry(path, root)
    if found is not None:
        return found[0].path
    parts = path.split(".")
    last = next((i for i in range(len(parts) - 1, -1, -1) if parts[i].isdigit()), len(parts) - 1)
    return ".".join(parts[: last + 1])


def _deepest(path: str, root: nn.Module) -> tuple[nn.Module, str]:
    """The module at a path, or the last one on the way to it, and its path."""
    module, parts = root, path.split(".") if path else []
    for i, part in enumerate(parts):
        child = children_of(module).get(part)
        if child is None:
            return module, ".".join(parts[:i])
        module = child
    return module, path


def _attends_elsewhere(path: str, site: nn.Module, container: nn.Module, root: nn.Module) -> bool:
    """Whether there is attention of the same class, stack and kind outside a container."""
    inside = set(container.modules())
    place = stack_of(path), kind_of(path)
    name = path.rpartition(".")[2]
    return any(
        type(module) is type(site)
        and module not in inside
        and (stack_of(other), kind_of(other)) == place
        and (type(site) is not nn.Module or other.rpartition(".")[2] == name)
        for other, module in root.named_modules()
    )


def stack_of(path: str, default: str = "main") -> str:
    """The stack that a path names; of nested names the outermost modality, else the outermost stack."""
    parts = path.lower().split(".")
    for stack, pattern in _STACKS:
        if any(pattern.search(part) for part in parts[:-1] or parts):
            return stack
    return default


def kind_of(path: str) -> str:
    """``cross`` where a path says so, else ``self``."""
    return "cross" if any(_CROSS.search(part) for part in path.split(".")) else "self"


def site_of_path(path: str, root: nn.Module, made_from: str | None = None) -> Site:
    """What a path tells on its own, without an adapter.

    Args:
        path: of a module, or of a place in one.
        root: the model.
        made_from: the class name of the module that a graph has taken the place of, if one has.
    """
    layer, layers = layer_of(path, root)
    module = made_from or type(_deepest(path, root)[0]).__name__
    return Site(path, layer, stack_of(path), kind_of(path), module, layers=layers)
