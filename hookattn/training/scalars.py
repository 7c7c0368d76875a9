"""The numbers of a measurement that become curves: few, whatever the size of the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .. import checks
from ..errors import SelectionError

if TYPE_CHECKING:
    from pandas import DataFrame

PREFIX = "heads"
_OF_LAYER = ("mean", "min", "max")
Followed = str | frozenset[tuple[int, int]]


def followed(given: Any) -> Followed:
    """Heads that get curves of their own: ``"all"``, or pairs of a layer and a head.

    Raises:
        SelectionError, InputError: something else.
    """
    if isinstance(given, str):
        return checks.word("follow", given, ("all",))
    pairs = checks.several("follow", given, object, 'pairs (layer, head), or "all"')
    made = set()
    for pair in pairs:
        items = checks.items_of(pair)
        if items is None or len(items) != 2:
            raise checks.wrong("follow", pair, 'pairs (layer, head), or "all"', SelectionError)
        made.add((checks.whole("follow: layer", items[0], 0), checks.whole("follow: head", items[1], 0)))
    return frozenset(made)


def check_followed(table: DataFrame, follow: Followed) -> None:
    """Raise a SelectionError for a head that the model does not have."""
    if isinstance(follow, str):
        return
    there = {(int(x), int(h)) for x, h in zip(table["layer"], table["head"], strict=True) if x is not None and x == x}
    missing = sorted(follow - there)
    if missing:
        layers = sorted({layer for layer, _ in there})
        raise SelectionError(
            f"follow={missing[0]}: there is no such head; layers are {layers[0] if layers else 'none'} to "
            f"{layers[-1] if layers else 'none'}, heads 0 to {max((h for _, h in there), default=0)}."
        )


def scalars_of(table: DataFrame, measures: Collection[str], follow: Followed) -> dict[str, float]:
    """What a measurement has for loggers, by name; what is not defined has no name.

    ``heads/<measure>/<mean, min, max>`` over all heads, ``heads/<measure>/layer<n>/…`` over those of a layer, and
    ``heads/<measure>/layer<n>/head<n>`` of those that are followed. Where a model has several stacks or kinds of
    attention, a layer is called ``decoder.cross.layer3``; one whose number is not known by its path.

    Args:
        table: of :meth:`HeadMonitor.measure`.
        measures: its columns of measures.
        follow: see :func:`followed`.
    """
    made: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        if value == value:  # no NaN
            made[name] = float(value)

    names = layer_names(table)
    for measure in measures:
        stem = f"{PREFIX}/{_tag(measure)}"
        for how in _OF_LAYER:
            add(f"{stem}/{how}", getattr(table[measure], how)())
        for name, rows in table.groupby(names, sort=False):
            for how in _OF_LAYER:
                add(f"{stem}/{name}/{how}", getattr(rows[measure], how)())
            for layer, head, value in zip(rows["layer"], rows["head"], rows[measure], strict=True):
                if follow == "all" or (layer, head) in follow:
                    add(f"{stem}/{name}/head{head}", value)
    return made


def layer_names(table: DataFrame) -> list[str]:
    """For each row of a table the name of its layer: no two places of a model have the same."""
    rows: list[dict[str, Any]] = table[["stack", "kind", "layer", "path", "call"]].drop_duplicates().to_dict("records")  # type: ignore[assignment]
    several = len({(row["stack"], row["kind"]) for row in rows}) > 1
    names: dict[int, str] = {}
    for row in rows:
        known = row["layer"] is not None and row["layer"] == row["layer"]  # no NaN
        name = f"layer{int(row['layer'])}" if known else _tag(row["path"]) or "model"
        names[row["call"]] = f"{_tag(row['stack'])}.{_tag(row['kind'])}.{name}" if several else name
    # Two attentions of one layer, or one that runs twice, are told apart by their paths, or by their turn.
    for column in ("path", "call"):
        times = Counter(names.values())
        for row in rows:
            if times[names[row["call"]]] > 1:
                names[row["call"]] += f".{_tag(str(row[column]))}"
    return [names[call] for call in table["call"]]


def _tag(text: str) -> str:
    """In the characters that names of curves may have."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")
