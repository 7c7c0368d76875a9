"""MODEL, as a user names it, to a module: a transformers directory or hub name, or ``module:factory``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from torch import nn

from ..console.screen import Screen, quiet_transformers
from ..errors import InputError, ModelError
from ..pretrained.inputs import Given, inputs_of
from ..pretrained.model import Loaded, load_pretrained
from ..printable import first_line
from ..torch_internals.devices import absent

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_model(
    name: str, screen: Screen, *, attn: str | None = None, device: str = "cpu", trust: bool = False
) -> Loaded:
    """Load what MODEL names.

    Raises:
        ModelError: there is no such thing, or it cannot be loaded; says what to do.
    """
    if why := absent(device):
        raise ModelError(f"--device {device}: {why}.")
    if is_factory(name):
        if attn is not None:
            raise ModelError(f"--attn chooses a kernel of a transformers model; {name} is made by its own factory.")
        loaded = _from_factory(name)
    else:
        options = {"attn_implementation": attn, "trust_remote_code": trust or None}
        with screen.working(f"loading {name}"):
            with suppress(ModuleNotFoundError):  # what loads the model says what is missing
                quiet_transformers()
            loaded = load_pretrained(name, {k: v for k, v in options.items() if v is not None})
        for note in loaded.notes:
            screen.warn(note)
    loaded.model.to(device).eval()
    return loaded


def inputs_asked_for(
    loaded: Loaded,
    *,
    texts: Sequence[str],
    pair: tuple[str, str] | None,
    images: Sequence[str] = (),
    audio: Sequence[str] = (),
    generate: bool = False,
) -> Given:
    """The inputs that the options ask for, through the model's own tokenizer or processor.

    Raises:
        InputError: the model has none, or a file cannot be read.
    """
    if not (texts or pair or images or audio):
        if loaded.inputs is None:
            raise InputError(
                f"{loaded.name} gives no inputs: give --inputs, or let the factory return (model, inputs)."
            )
        return Given(loaded.inputs)
    first, pairs = (list(texts), None) if pair is None else ([pair[0]], [pair[1]])
    return inputs_of(loaded, texts=first, pairs=pairs, images=images, audio=audio, generate=generate)


def is_factory(name: str) -> bool:
    """Whether MODEL is ``module:factory``."""
    return _FACTORY.fullmatch(name) is not None and not os.path.isdir(name)


def named_in_module(name: str) -> Any:
    """What ``module:member`` names.

    Raises:
        ModelError: there is no such module or member, or it can't be imported.
    """
    where, _, path = name.partition(":")
    return _member(name, _imported(name, where), path)


def _from_factory(name: str) -> Loaded:
    found = named_in_module(name)
    path = name.partition(":")[2]
    if callable(found) and not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:
            raise ModelError(f"{name}: calling {path}() failed: {type(error).__name__}: {first_line(error)}") from error
    inputs = None
    if isinstance(found, tuple) and len(found) == 2:
        found, inputs = found
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{name}: expected an nn.Module or a pair of an nn.Module and its inputs; "
            f"{path} gave {type(found).__name__}."
        )
    return Loaded(found, name, inputs=inputs)


def _imported(name: str, where: str) -> ModuleType:
    """The module of MODEL, from the current directory or the installed packages."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()  # the file may have been written since the directory was last listed
    try:
        return importlib.import_module(where)
    except Exception as error:
        # A module that is not there is another mistake than one that cannot import something itself.
        missing = (
            isinstance(error, ModuleNotFoundError)
            and error.name is not None
            and (where == error.name or where.startswith(error.name + "."))
        )
        raise ModelError(
            f"{name}: there is no module {where!r} in {os.getcwd()} or among the installed packages."
            if missing
            else f"{name}: importing {where!r} failed: {type(error).__name__}: {first_line(error)}"
        ) from error


def _member(name: str, module: ModuleType, path: str) -> Any:
    """What a dotted path leads to in a module."""
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            there = ", ".join(n for n, v in vars(module).items() if _may_be_meant(n, v, module)) or "nothing callable"
            raise ModelError(f"{name}: the module {module.__name__!r} has no {path!r}; it has {there}.")
        found = getattr(found, part)
    return found


def _may_be_meant(name: str, value: Any, module: ModuleType) -> bool:
    """Whether a member is a model or a factory of the module's own, and not something it imported."""
    if name.startswith("_") or isinstance(value, ModuleType):
        return False
    own = getattr(value, "__module__", module.__name__) == module.__name__
    return own and (callable(value) or isinstance(value, nn.Module))
