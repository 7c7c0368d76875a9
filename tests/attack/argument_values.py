"""Values for arguments, and which of them each kind of argument takes: decided here, and not by what happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def _nothing() -> Any:
    yield from ()


class _Bad:
    """Nothing of it can be asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __index__(self) -> int:
        raise RuntimeError("no index")

    def __float__(self) -> float:
        raise RuntimeError("no float")

    def __iter__(self) -> Any:
        raise RuntimeError("nothing to go through")


VALUES: dict[str, Callable[[Any], Any]] = {
    "None": lambda stage: None,
    "empty text": lambda stage: "",
    "nonsense": lambda stage: "nonsense",
    "NUL": lambda stage: "a\0b",
    "a half character": lambda stage: "\ud800",
    "bytes": lambda stage: b"weights",
    "0": lambda stage: 0,
    "1": lambda stage: 1,
    "-1": lambda stage: -1,
    "-7": lambda stage: -7,
    "10**20": lambda stage: 10**20,
    "-10**20": lambda stage: -(10**20),
    "1.5": lambda stage: 1.5,
    "nan": lambda stage: float("nan"),
    "inf": lambda stage: float("inf"),
    "1j": lambda stage: 1j,
    "True": lambda stage: True,
    "False": lambda stage: False,
    "[]": lambda stage: [],
    "[None]": lambda stage: [None],
    "[True]": lambda stage: [True],
    "[1.5]": lambda stage: [1.5],
    "[99]": lambda stage: [99],
    "[[]]": lambda stage: [[]],
    "['nonsense']": lambda stage: ["nonsense"],
    "[0, 'a']": lambda stage: [0, "a"],
    "[[0, 1]]": lambda stage: [[0, 1]],
    "9 words": lambda stage: list("abcdefghi"),
    "()": lambda stage: (),
    "{}": lambda stage: {},
    "{'a': 'b'}": lambda stage: {"a": "b"},
    "{1: 2}": lambda stage: {1: 2},
    "a set": lambda stage: {"weights", "q"},
    "{'decoder': ['a']}": lambda stage: {"decoder": ["a"]},
    "an object without repr": lambda stage: _Bad(),
    "an object": lambda stage: object(),
    "a class": lambda stage: dict,
    "a function": lambda stage: lambda *given, **more: None,
    "a generator of none": lambda stage: _nothing(),
    "a generator": lambda stage: (x for x in (object(),)),
    "slice step 0": lambda stage: slice(None, None, 0),
    "slice of text": lambda stage: slice("a", None),
    "slice of bools": lambda stage: slice(True, None),
    "slice of none": lambda stage: slice(9, 9),
    "no tensor axis": lambda stage: torch.tensor(1.5),
    "int tensor": lambda stage: torch.tensor([0]),
    "bool tensor": lambda stage: torch.tensor([True, False]),
    "float tensor": lambda stage: torch.rand(2, 2),
    "tensor of five axes": lambda stage: torch.zeros(1, 1, 1, 1, 1),
    "complex tensor": lambda stage: torch.zeros(2, 2, dtype=torch.complex64),
    "numpy's int": lambda stage: np.int64(1),
    "numpy's bool": lambda stage: np.True_,
    "numpy's nan": lambda stage: np.float32("nan"),
    "tensor without values": lambda stage: torch.zeros(2, 7, device="meta"),
    "sparse tensor": lambda stage: torch.eye(2).to_sparse(),
    "an array of text": lambda stage: np.array(["a", "b"]),
    "NaN array": lambda stage: np.full((2, 7), np.nan),
    "a dtype": lambda stage: torch.int8,
    "a device": lambda stage: torch.device("meta"),
    "a path that is not there": lambda stage: stage.folder / "none" / "none.safetensors",
    "a file that is no trace": lambda stage: stage.text,
    "a folder": lambda stage: stage.folder,
    "a trace": lambda stage: stage.gpt2,
    "a trace file": lambda stage: stage.file,
    "a trace without calls": lambda stage: stage.empty,
    "a call": lambda stage: stage.gpt2[0],
    "a model": lambda stage: stage.model,
    "an error": lambda stage: ValueError("x"),
}
"""What is tried for every argument, by a name; each is made of the stage (:class:`.argument_targets.Stage`)."""

_TEXT = frozenset({"empty text", "nonsense", "NUL", "a half character", "a trace file"})
_NO_ITEMS = frozenset({"[]", "()", "{}", "a generator of none", "a trace without calls"})
_INDICES = frozenset({"0", "1", "-1", "-7", "int tensor", "numpy's int"})
_NUMBERS = (_INDICES - {"int tensor"}) | {"10**20", "-10**20", "1.5", "inf", "no tensor axis"}
_LABELS = frozenset(
    {"['nonsense']", "[0, 'a']", "[[0, 1]]", "9 words", "[None]", "[True]", "[99]", "int tensor", "bool tensor"}
)
_LABEL = _TEXT | {"numpy's int", "0", "1", "-1", "-7", "10**20", "-10**20"}
_NAMES = _NO_ITEMS | {"['nonsense']", "9 words", "an array of text", "a set", "{'a': 'b'}", "{'decoder': ['a']}"}
_PATHS = frozenset({"nonsense", "a path that is not there", "a file that is no trace", "a trace file"})
_FUNCTIONS = frozenset({"a function", "a class", "a model"})
_MAPPINGS = frozenset({"{}", "{'decoder': ['a']}", "{'a': 'b'}", "{1: 2}"})
_TRACES = frozenset({"a trace", "a trace file"})
_NOT_ITERABLE = _TEXT | {
    *("None", "bytes", "0", "1", "-1", "-7", "10**20", "-10**20", "1.5", "nan", "inf", "1j", "True", "False"),
    *("an object", "a class", "a function", "slice step 0", "slice of text", "slice of none", "no tensor axis"),
    *("a dtype", "a device", "a path that is not there", "a file that is no trace", "a folder", "a trace file"),
    *("a call", "a model", "an error", "slice of bools", "numpy's int", "numpy's bool", "numpy's nan"),
    "an object without repr",
}

_PLAIN: dict[str, frozenset[str]] = {
    "anything": frozenset(VALUES),
    "inputs": frozenset(VALUES),  # whether a model takes them is for the model to say
    "nothing": frozenset(),  # what is tried is never right: one of some words that is no word here, say
    "flag": frozenset({"True", "False", "numpy's bool"}),
    "index": _INDICES,
    "indices": _INDICES,
    "key positions": _NO_ITEMS | {"numpy's int", "0", "1", "int tensor", "[99]"},
    "indices or a slice": _INDICES,
    "index, a slice or a path": _INDICES | {"slice of none"},
    "position or text": _INDICES | _TEXT,
    "any int": _INDICES,
    "count": frozenset({"1", "numpy's int"}),
    "new tokens": frozenset({"None", "1", "numpy's int", "10**20"}),  # a text that is full ends before
    "count from 0": frozenset({"0", "1", "int tensor", "numpy's int"}),
    "real": frozenset({"[[0, 1]]"}),  # its extents are held against the call, later
    "share": frozenset({"0"}),
    "share to 1": frozenset({"1", "numpy's int"}),
    "number": _NUMBERS,
    "number from 0": _NUMBERS - {"-1", "-7", "-10**20"},
    "numbers from 0": frozenset({"0", "1", "int tensor", "numpy's int", "[99]"}),
    # Whether values fit what they are for is told when the model runs.
    "values": _NUMBERS | {"nan", "numpy's nan", "float tensor"},
    "one number": _NUMBERS | {"nan", "numpy's nan", "tensor of five axes"},  # which has one entry
    "trace, call or values": _TRACES | {"a trace without calls", "a call", "float tensor", "no tensor axis"},
    "pairs": frozenset({"[[0, 1]]"}),
    "pairs or no items": _NO_ITEMS | {"[[0, 1]]"},
    "flag or indices": _INDICES | {"True", "False", "numpy's bool"},
    "text": _TEXT,
    "texts": _TEXT | {"['nonsense']", "9 words", "an array of text"},
    "words": _NAMES | (_TEXT - {"empty text"}),
    "names": _NAMES,
    "names of requests": _NAMES | _FUNCTIONS,  # a function gives them later
    "no names": _NO_ITEMS | {"a set"},
    "no items": _NO_ITEMS,
    "examples": frozenset(VALUES) - _NOT_ITERABLE,
    "names of fields": frozenset({"a set"}),
    "paths": _NAMES | (_PATHS - {"a path that is not there"}) | {"a path that is not there", "a folder"},
    "label": _LABEL,
    "labels": _LABELS,
    "numbers of words": _LABELS - {"['nonsense']", "[0, 'a']", "9 words", "[True]", "bool tensor"},
    "clusters": _NO_ITEMS | {"[[]]"},
    "token lists": frozenset({"['nonsense']", "9 words", "an array of text"}),
    "trace": _TRACES,
    "trace with or without calls": _TRACES | {"a trace without calls"},
    "trace in memory": frozenset({"a trace", "a trace without calls"}),
    "trace file": frozenset({"a trace file"}),
    "call": frozenset({"a call"}),
    "model": frozenset({"a model"}),
    "function": _FUNCTIONS,
    "path": _PATHS,
    "mapping": _MAPPINGS,
    "empty mapping": frozenset({"{}"}),
    "width": frozenset({"1", "1.5", "numpy's int", "no tensor axis"}),
    "title": _TEXT | {"True", "False"},
    "beams": frozenset({"None", "False"}),
}
TAKES = _PLAIN | {f"{kind} or none": fine | {"None"} for kind, fine in _PLAIN.items()}
"""Of each kind of argument the values that it takes. All others are wrong, and have to be refused. A right value may
be refused as well, where the trace does not have what it names."""
