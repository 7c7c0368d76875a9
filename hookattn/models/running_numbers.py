"""The numbers of layers, as far as they are known only from what runs."""

from __future__ import annotations

from dataclasses import replace

from ..calls.site import Site


class RunningNumbers:
    """Numbers the sites of one trace that have none, in the order in which they run."""

    def __init__(self) -> None:
        self._order: dict[tuple[str, str], list[str]] = {}

    def numbered(self, site: Site) -> Site:
        """A site without a number gets its place among those of its stack and kind."""
        if site.layer is not None:
            return site
        order = self._order.setdefault((site.stack, site.kind), [])
        if site.path not in order:
            order.append(site.path)
        return replace(site, layer=order.index(site.path))
