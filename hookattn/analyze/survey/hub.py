"""Datasets that the package ``datasets`` reads: of the hub, of a directory, of what was saved to a disk."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from ...errors import InputError

PREFIX = "hub:"
_SPLIT = re.compile(r"(.+?)(?::(\w[\w.\-]*))?")


class HubName(NamedTuple):
    """What ``hub:NAME[/config][:split]`` says: NAME is ``user/name``, or the directory of a dataset."""

    path: str
    config: str | None
    split: str | None


def hub_name(text: str) -> HubName:
    """Read a name that begins with ``hub:``.

    Raises:
        InputError: it is none.
    """
    found = _SPLIT.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise InputError(f"{text}: expected hub:NAME, hub:NAME/CONFIG or hub:NAME/CONFIG:SPLIT.")
    path, split = found.groups()
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return HubName(expanded, None, split)
    several = path.split("/")
    if path.startswith((".", "/", "~")) or not all(several[:2]) or len(several) > 3:
        raise InputError(f"{text}: there is no such directory, and a name of the hub is user/name or user/name/config.")
    return HubName("/".join(several[:2]), several[2] if len(several) == 3 else None, split)


def rows_of(text: str) -> Any:
    """The rows: a ``Dataset`` where they are on this disk, else an ``IterableDataset``, which downloads as it is read.

    Raises:
        InputError: ``datasets`` is missing, there is no such dataset, or not one split alone.
    """
    name = hub_name(text)
    datasets = _library(text)
    try:
        if _is_saved(name.path):
            found = datasets.load_from_disk(name.path)
        else:
            # Offline only what was downloaded before can be read, which is there as a whole.
            stream = os.path.isdir(name.path) or not datasets.config.HF_HUB_OFFLINE
            found = datasets.load_dataset(name.path, name.config, streaming=stream)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{text}: {_said(error)}") from error
    if not isinstance(found, dict):
        return found
    split = name.split or (next(iter(found)) if len(found) == 1 else None)
    if split not in found:
        asked = "one split has to be named" if split is None else f"there is no split {split!r}"
        raise InputError(f"{text}: {asked}, as in hub:{name.path}:{next(iter(found))}; it has {', '.join(found)}.")
    return found[split]


def fingerprint(text: str) -> str:
    """What tells a dataset from other versions of it.

    Raises:
        InputError: as :func:`rows_of`.
    """
    name = hub_name(text)
    datasets = _library(text)
    try:
        if _is_saved(name.path):
            found = rows_of(text)
            return f"{found._fingerprint}"
        return f"{datasets.load_dataset_builder(name.path, name.config).hash}"
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{text}: {_said(error)}") from error


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def _library(text: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(f'{text}: this needs the package datasets: pip install "hookattn[corpora]"') from error
    datasets.disable_progress_bars()
    return datasets


def _said(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
