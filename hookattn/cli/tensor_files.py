"""Inputs of a forward from a file of named tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..printable import first_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".json", ".npz")


def read_tensors(path: str) -> Any:
    """Named tensors from a file: safetensors, .pt (tensors only, no pickled code), .json or .npz.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: inputs are read from {', '.join(SUFFIXES)}, not {suffix or 'a bare name'}.")
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file.")
    try:
        return _READERS[suffix](path)
    except InputError:
        raise
    except Exception as error:
        hint = (
            " Only tensors, and lists and dicts of them, are read: save a dict of tensors with torch.save."
            if suffix in (".pt", ".pth")
            else ""
        )
        raise InputError(f"{path}: cannot be read as {suffix}: {first_line(error)}{hint}") from error


def _read_safetensors(path: str) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: str) -> Any:
    found = torch.load(path, map_location="cpu", weights_only=True)
    return tuple(found) if isinstance(found, list) else found


def _read_npz(path: str) -> Any:
    import numpy

    with numpy.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_json(path: str) -> Any:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(found, list):
        return torch.tensor(found)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object of named, nested lists of numbers, got {type(found).__name__}.")
    made: dict[str, Any] = {}
    for name, value in found.items():
        try:
            made[name] = torch.tensor(value) if isinstance(value, list) else value
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {name!r} is no even, nested list of numbers: {first_line(error)}") from error
    return made


_READERS = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".json": _read_json,
    ".npz": _read_npz,
}
