"""Layers counted from the end: how many there are of a stack and kind, and which layer an index names."""

from __future__ import annotations

from collections.abc import Iterable

from .site import Site


class LayerCounts:
    """How many layers each stack and kind has: as the structure of the model says, or else one more than the last seen.

    Args:
        sites: those to start with; each has its number.
    """

    def __init__(self, sites: Iterable[Site] = ()):
        self._last: dict[tuple[str, str], int] = {}
        for site in sites:
            self.note(site)

    def note(self, site: Site) -> None:
        """A numbered site was seen."""
        place = (site.stack, site.kind)
        self._last[place] = max(self._last.get(place, 0), site.layer or 0)

    def of(self, site: Site) -> int:
        """How many layers there are of a site's stack and kind; where the structure does not tell, of those noted."""
        # A stack in two containers is told from one of them.
        return max(site.layers or 0, self._last[site.stack, site.kind] + 1)

    def naming(self, indices: Iterable[int], site: Site) -> set[int]:
        """Those of some indices that name the layer of a site; negative ones count from the end of its stack."""
        count = self.of(site)
        return {i for i in indices if site.layer is not None and names_layer(i, site.layer, count)}

    def __str__(self) -> str:
        return ", ".join(f"{n} ({stack} {kind})" for (stack, kind), n in self._last.items())


def names_layer(index: int, layer: int, count: int | None) -> bool | None:
    """Whether an index names a layer. None: it counts from the end, and how many layers there are is not known yet."""
    if index >= 0:
        return index == layer
    return None if count is None else index + count == layer
