"""The kinds of sites, where the axes of queries and keys tell more than the path of a module."""

from __future__ import annotations

from dataclasses import replace

from ..calls.site import Site


class SiteKinds:
    """What was seen of the sites of one trace.

    A path that says ``cross`` is believed: a memory may be made of the very sequence that attends to it. What no call
    tells of itself, as one query alone, is as it was at the same site before; and what an earlier step has told stays,
    since keys that wait in a cache from then on have a history of their own.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, int]] = {}  # path -> kind, and the step that told it
        self._made: dict[tuple[Site, str], Site] = {}

    def of(self, site: Site, kind: str | None, step: int) -> Site:
        """The site of a call.

        Args:
            site: by the word of its path.
            kind: what the axes of the call tell; None: nothing.
            step: of the call.
        """
        known = self._seen.get(site.path)
        if kind is not None and (known is None or known[1] == step):
            known = self._seen[site.path] = kind, step
        if known is None or site.kind != "self" or known[0] == "self":
            return site
        key = site, known[0]
        if key not in self._made:
            self._made[key] = replace(site, kind=known[0])
        return self._made[key]
