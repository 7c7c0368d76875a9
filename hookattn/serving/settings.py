"""What is recorded of a server's requests, and within which bounds: of its environment, of a file, of a request."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..errors import InputError, SelectionError
from ..recording.selection import Selection
from ..statistics.base import Statistic
from ..statistics.registry import STATISTICS

FOLDER = "HOOKATTN_VLLM"
"""The environment variable that names the folder of the files; without it nothing is recorded."""
_FILE = "settings"
_CAPTURE = ("entropy", "received", "top_k(8)")
_BOUNDS = ("max_tokens", "max_seconds", "max_bytes")
_OF_REQUEST = ("capture", "layers", "heads", "dtype", *_BOUNDS)
_PARAMETERS = re.compile(r"(\w+)\(([\d\s,]*)\)")


@dataclass(frozen=True)
class Settings:
    """What is recorded.

    Attributes:
        folder: where the files go.
        prefix: requests whose names begin with this are recorded, without asking for it; empty: none by its name.
        capture: fields, and statistics such as ``top_k(8)``.
        layers: from 0; None: all.
        heads: query heads, numbers in the whole model; None: all.
        dtype: floating fields are stored in it; None: as they are.
        verify: as in :func:`hookattn.trace`.
        max_tokens: how many positions of a request are recorded.
        max_seconds: how long, in all, the steps may take in which a request is recorded.
        max_bytes: how many a file may have; the call that passes it is its last.
        max_bytes_in_all: how many all files of one process may have.
    """

    folder: Path
    prefix: str = ""
    capture: tuple[str, ...] = _CAPTURE
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    dtype: str | None = None
    verify: str = "sample"
    max_tokens: int = 32_768
    max_seconds: float = 600.0
    max_bytes: int = 1 << 30
    max_bytes_in_all: int = 16 << 30
    selection: Selection = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises InputError or SelectionError: a value is none that there is; names it, and what is expected."""
        checks.text("prefix", self.prefix)
        checks.word("verify", self.verify, ("sample", "full", "off"))
        for name in ("capture", "layers", "heads"):
            value = getattr(self, name)
            if value is not None:
                several = [value] if isinstance(value, (str, int)) else checks.items_of(value)
                if several is None:
                    raise checks.wrong(name, value, "a list")
                object.__setattr__(self, name, tuple(several))
        for name in ("layers", "heads"):
            for number in getattr(self, name) or ():
                checks.whole(name, number, 0)
        checks.whole("max_tokens", self.max_tokens, 1)
        checks.number("max_seconds", self.max_seconds, "a number of seconds over 0", lambda x: x > 0)
        for name in ("max_bytes", "max_bytes_in_all"):
            if checks.index(name, getattr(self, name), "a number of bytes") < 1:
                raise checks.wrong(name, getattr(self, name), "a number of bytes over 0", SelectionError)
        items: list[str | Statistic] = [_captured(item) for item in self.capture]
        # Heads are chosen by whoever knows which of them a process has.
        made = Selection.of(items, self.layers, self.heads, None, _dtype(self.dtype))
        object.__setattr__(self, "selection", made)

    def of_request(self, asked: Mapping[str, Any]) -> Settings:
        """These, with what a request asks for; its bounds can only be narrower.

        Raises:
            InputError, SelectionError: it asks for what there is none of, or what is not its own to ask for.
        """
        given = _known(asked, _OF_REQUEST, "a request may ask for")
        for name in _BOUNDS:
            if name in given:
                given[name] = min(checks.number(name, given[name], "a number over 0", lambda x: x > 0), _of(self, name))
                if name != "max_seconds":
                    given[name] = int(given[name])
        return replace(self, **given)


def from_environment(environment: Mapping[str, str]) -> Settings | None:
    """The settings of a process; None: nothing is to be recorded.

    ``HOOKATTN_VLLM`` is the folder. ``HOOKATTN_VLLM_SETTINGS`` is a file in TOML or JSON with any of the attributes of
    :class:`Settings`; ``HOOKATTN_VLLM_CAPTURE="entropy, top_k(8)"``, ``HOOKATTN_VLLM_MAX_TOKENS=500`` and so on say
    them one by one, and come before the file.

    Raises:
        InputError, SelectionError: one of these is wrong; names it.
    """
    folder = environment.get(FOLDER)
    if not folder:
        return None
    names = [f.name for f in fields(Settings) if f.init and f.name != "folder"]
    given: dict[str, Any] = {}
    file = environment.get(f"{FOLDER}_{_FILE.upper()}")
    if file:
        given |= _known(_read(Path(file)), names, f"the settings in {file} may be")
    said = {k.removeprefix(f"{FOLDER}_").lower(): v for k, v in environment.items() if k.startswith(f"{FOLDER}_")}
    said.pop(_FILE, None)
    given |= {name: _of_text(name, text) for name, text in _known(said, names, f"variables {FOLDER}_… may be").items()}
    return Settings(Path(checks.path(FOLDER, folder)), **given)


def _known(given: Mapping[str, Any], names: Any, what: str) -> dict[str, Any]:
    for name in given:
        if name not in names:
            raise InputError(f"{name!r} is no setting of hookattn: {what} {', '.join(names)}.")
    return dict(given)


def _of(settings: Settings, name: str) -> float:
    value: float = getattr(settings, name)
    return value


def _read(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{FOLDER}_SETTINGS={file}: expected a file in TOML, or in JSON (.json): {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{FOLDER}_SETTINGS={file}: expected an object of settings.")
    return found


def _of_text(name: str, text: str) -> Any:
    """The value of a variable of the environment."""
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    if name == "capture":
        return tuple(parts)
    if name in ("prefix", "verify", "dtype"):
        return text
    try:
        if name in ("layers", "heads"):
            return tuple(int(part) for part in parts)
        return float(text) if name == "max_seconds" else int(text)
    except ValueError:
        kind = "ints, with commas between them" if name in ("layers", "heads") else "a number"
        raise checks.wrong(f"{FOLDER}_{name.upper()}", text, kind) from None


def _captured(item: Any) -> str | Statistic:
    """A field, or a statistic with its parameters; what is neither is refused where all are checked."""
    text = checks.text("capture", item, "names of fields and statistics")
    match = _PARAMETERS.fullmatch(text)
    kind = STATISTICS.get(match[1]) if match else None
    if match is None or kind is None:
        return text
    try:
        return kind(*(int(part) for part in match[2].split(",") if part.strip()))
    except TypeError:
        raise checks.wrong("capture", text, f"{match[1]} with its own parameters", SelectionError) from None


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, checks.text("dtype", name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise checks.wrong("dtype", name, "the name of a floating dtype, such as float16")
    return found
