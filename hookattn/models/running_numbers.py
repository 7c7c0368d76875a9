"""The numbers of layers, as far as they are known only from what runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from ..calls.site import Site
from .site_names import running_layer


class RunningNumbers:
    """Numbers the sites of one trace that have none, by the order in which their layers run.

    Args:
        root: the model without wrappers; asked for when it is first needed.
    """

    def __init__(self, root: Callable[[], nn.Module]) -> None:
        self._root = root
        self._layers: dict[tuple[str, str], list[str]] = {}  # stack and kind -> the paths of layers
        self._numbered: dict[tuple[str, str, str], Site] = {}

    def numbered(self, site: Site) -> Site:
        """A site without a number gets the place of its layer among those of its stack and kind."""
        if site.layer is not None:
            return site
        key = site.path, site.stack, site.kind
        known = self._numbered.get(key)
        if known is None:
            layers, layer = self._layers.setdefault(key[1:], []), running_layer(site.path, self._root())
            if layer not in layers:
                layers.append(layer)
            known = self._numbered[key] = replace(site, layer=layers.index(layer))
        return known
