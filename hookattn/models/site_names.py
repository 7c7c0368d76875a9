"""What the path of a module says about the attention in it: layer, stack and kind."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..calls.site import Site
from .layer_numbers import number

# The first that fits wins: in a path such as vision_model.encoder the modality says more than the encoder.
_STACKS = (
    ("vision", re.compile(r"vision|visual|image|pixel|vit(?=_|$)")),
    ("audio", re.compile(r"audio|speech|wav")),
    ("text", re.compile(r"text|language")),
    ("decoder", re.compile(r"decoder|(?:^|_)dec(?:_|$)")),
    ("encoder", re.compile(r"encoder(?!_attn|_decoder|decoder)|(?:^|_)enc(?:_|$)")),
)


_CROSS = re.compile(
    r"cross(?!_?encoder)|enc(?:oder)?_?(?:dec(?:oder)?_?)?att|encdec|multihead_attn$|src_attn", re.IGNORECASE
)


def layer_of(path: str, root: nn.Module) -> tuple[int | None, int | None]:
    """The first numbered container on a path: the number of the layer in it, and of how many; (None, None): no such.

    An ``nn.Sequential`` of different classes is a pipeline, not a stack of layers, if there are layers further in.
    """
    module: Any = root
    parts = path.split(".") if path else []
    found: tuple[nn.Module, str] | None = None
    for part in parts:
        parent, module = module, getattr(module, part, None)
        if part.isdigit() and isinstance(parent, (nn.ModuleList, nn.Sequential)):
            stack = isinstance(parent, nn.ModuleList) or len({type(m) for m in parent}) == 1
            if stack or found is None:
                found = parent, part
            if stack:
                break
        if module is None:
            break
    if found is not None:
        return number(*found, root.get_submodule(path), kind_of)
    return next(((int(p), None) for p in parts if p.isdigit()), (None, None))


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


def site_of_path(path: str, module: nn.Module, root: nn.Module) -> Site:
    """What a path tells on its own, without an adapter."""
    layer, layers = layer_of(path, root)
    return Site(path, layer, stack_of(path), kind_of(path), type(module).__name__, layers=layers)
