"""Layer numbers: an entry of a container is a layer, and this finds which, and its number, where no adapter says so."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..torch_internals.module_state import children_of, parameters_of

_SOUNDS_LIKE = re.compile(r"(?i:attention|attn|mamba|retention|rwkv|delta_?net|hyena|linear_?att|deformable)|SSM|Ssm")
# What is named after attention, or after a model that is, and does none of it: SelfAttentionOutput, AttnAdapterLayer,
# RelativeAttentionBias, what stands around it (backbones of convolutions, heads), and what says positions.
_ONLY_A_PART = re.compile(
    r"(?:Output|Projection|Bias|Mask|Norm(?:\dd|Gated)?|Conv(?:\dd|Encoder|Model)?|MLP|FeedForward|Dropout|Loss"
    r"|Adapter(?:Layer)?|Backbone|(?:Prediction|Classification)Head|Embed(?:ding)?s?|Encoding|Rope"
    r"|(?i:pos(?:ition(?:al)?)?_?(?:emb|enc))(?:(?!(?i:att))\w)*)$"
)
_AROUND_IT = ("Block", "Layer")
_FEEDS = re.compile(r"(?i:mlp|feed_?forward)|FFN?|Ffn?|GLU|Glu")


@functools.cache
def sounds_like_attention(name: str) -> bool:
    """Whether a class name does."""
    return _SOUNDS_LIKE.search(name) is not None and _ONLY_A_PART.search(name) is None


class Entry(NamedTuple):
    """An entry of a numbered container, on the way to an attention.

    Attributes:
        container: a ``ModuleList``, a ``Sequential``, or what a graph has in the place of one.
        name: of the entry in it, a number.
        path: of the entry from the root.
        stack: whether the container is a stack of layers: an ``nn.Sequential`` of different classes is a pipeline.
    """

    container: nn.Module
    name: str
    path: str
    stack: bool


def layer_entry(path: str, root: nn.Module) -> tuple[Entry, bool] | None:
    """The entry that is the layer of an attention, and whether it is nested in others; None: no container is there.

    The first that is a stack, but where the entries of that one are stages: whose entries are layers themselves, with
    an attention and something beside it.

    Args:
        path: of a module that attends, or of a place in it.
        root: the model.
    """
    found: list[Entry] = []
    module, parts = root, path.split(".") if path else []
    for i, part in enumerate(parts):
        child = children_of(module).get(part)
        if child is None:
            break
        if part.isdigit() and _is_numbered(module):
            stack = not isinstance(module, nn.Sequential) or len({type(m) for m in module}) == 1
            found.append(Entry(module, part, ".".join(parts[: i + 1]), stack))
        module = child
    if not found:
        return None
    chosen = next((i for i, entry in enumerate(found) if entry.stack), 0)
    for i in range(chosen + 1, len(found)):
        if found[i].stack and _has_whole_layers(found[i], path, module):
            chosen = i
    return found[chosen], chosen > 0


def _is_numbered(module: nn.Module) -> bool:
    """Whether the children of a module are a sequence. In a graph the place of a container has a plain module."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return True
    return type(module) is nn.Module and all(name.isdigit() for name in children_of(module))


def _has_whole_layers(entry: Entry, path: str, site: nn.Module) -> bool:
    """Whether the entries of a container that attend have weights for more than their attention."""
    inner = path[len(entry.path) + 1 :]
    entries = children_of(entry.container).values()
    held = [(other, _attention(other, type(site), inner)) for other in entries if other is not None]
    return all(attention is None or _has_more(other, attention) for other, attention in held)


def _has_more(entry: nn.Module, path: str) -> bool:
    """Whether there are matrices in an entry of a container, outside its attention."""
    inside = set(entry.get_submodule(path).modules())
    matrices = (m for m in entry.modules() if any(x is not None and x.dim() > 1 for x in parameters_of(m).values()))
    return any(m not in inside for m in matrices)


def number(container: nn.Module, name: str, site: nn.Module, inner: str, kind: Callable[[str], str]) -> tuple[int, int]:
    """The number of the layer that an entry of a container is, and how many layers there are.

    That is its name. Only where an attention is an entry of its own, and so is what mixes no tokens (a feed-forward
    net, a norm), the entries that attend are counted, those of each kind alone.

    Args:
        container: a ``ModuleList`` or ``Sequential``.
        name: that of the entry which holds ``site``, a number.
        site: a module that attends.
        inner: its path in the entry.
        kind: path -> kind.
    """
    entries = list(children_of(container).values())
    held = [_attention(entry, type(site), inner) for entry in entries]
    split = None in held and all(
        _mixes_nothing(entry) if entry is None or path is None else _only_mixes(entry, path)
        for entry, path in zip(entries, held, strict=True)
    )
    if not split:
        return int(name), len(entries)
    index = list(children_of(container)).index(name)
    mine = kind(held[index] or "")
    same = [i for i, path in enumerate(held) if path is not None and kind(path) == mine]
    return same.index(index), len(same)


def _attention(entry: nn.Module | None, known: type, inner: str) -> str | None:
    """The path of an entry's attention: the outermost module that is no block or layer around it; None: it has none."""
    if entry is None:
        return None
    if known is nn.Module:  # in a graph classes say nothing
        module: nn.Module | None = entry
        for part in inner.split(".") if inner else ():
            module = None if module is None else children_of(module).get(part)
        return None if module is None else inner
    around: str | None = None
    path: str
    for path, module in entry.named_modules():
        name = type(module).__name__
        if type(module) is not known and not sounds_like_attention(name):
            continue
        if not name.endswith(_AROUND_IT):
            return path
        around = path if around is None else around
    return around


def _only_mixes(entry: nn.Module, path: str) -> bool:
    """Whether there is no feed-forward net around the attention of an entry: then the entry is no whole layer."""
    inside = set(entry.get_submodule(path).modules())
    return not any(isinstance(m, nn.Linear) and m not in inside for m in entry.modules())


def _mixes_nothing(entry: nn.Module | None) -> bool:
    """Whether an entry has weights for the features of one token alone, and says by its classes what it does."""
    return entry is None or (
        _feeds(entry)
        and all(
            isinstance(m, nn.Linear) or all(x is None or x.dim() < 2 for x in parameters_of(m).values())
            for m in entry.modules()
        )
    )


def _feeds(module: nn.Module) -> bool:
    """Whether a module is a feed-forward net by its name, is around one and holds nothing unknown, or is a norm."""
    name, children = type(module).__name__, list(module.children())
    if _FEEDS.search(name):
        return True
    if type(module).__module__.startswith("torch.nn."):
        return all(map(_feeds, children))
    if not children:
        return "norm" in name.lower()
    return all(map(_feeds, children)) and any(_FEEDS.search(type(m).__name__) for m in module.modules())
