"""The numbers of layers, as far as they are known only from what runs."""

from __future__ import annotations

from dataclasses import replace

from ..calls.site import Site


class RunningNumbers:
    """What the sites of one trace tell of the layers of each stack and kind."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], int] = {}
        self._order: dict[tuple[str, str], list[str]] = {}

    def numbered(self, site: Site) -> Site:
        """A site without a number gets its place among those of its stack and kind."""
        if site.layer is not None:
            return site
        order = self._order.setdefault((site.stack, site.kind), [])
        if site.path not in order:
            order.append(site.path)
        return replace(site, layer=order.index(site.path))

    def ran(self, site: Site) -> None:
        """A numbered site ran."""
        place = (site.stack, site.kind)
        self._last[place] = max(self._last.get(place, 0), site.layer or 0)

    def count(self, site: Site) -> int:
        """How many layers there are of a site's stack and kind, once all have run."""
        return site.layers or self._last[(site.stack, site.kind)] + 1

    def __str__(self) -> str:
        return ", ".join(f"{n} ({stack} {kind})" for (stack, kind), n in self._last.items())
