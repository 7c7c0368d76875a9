"""MODEL, as a user names it, to a module: a transformers directory or hub name, or ``module:factory``."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..console.screen import Screen, counted, quiet_transformers
from ..errors import ModelError
from ..torch_internals.devices import absent
from .command import first_line

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_TRANSFORMERS = 'needs the package transformers: pip install "hookattn[transformers]"'


@dataclass
class Loaded:
    """A model, and where the rest of it is.

    Attributes:
        model: on its device, in eval mode.
        name: as the user wrote it.
        source: the directory or hub name that also has the tokenizer; None for a factory's model.
        inputs: what a factory returned beside the model.
        trust: whether code from the model's repository may run.
    """

    model: nn.Module
    name: str
    source: str | None = None
    inputs: Any = None
    trust: bool = False


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
        loaded = _from_transformers(name, screen, attn, trust)
    loaded.model.to(device).eval()
    return loaded


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


def _from_transformers(name: str, screen: Screen, attn: str | None, trust: bool) -> Loaded:
    source = os.path.expanduser(name)
    if os.path.isdir(source):
        _check_directory(name, Path(source))
    elif Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ModelError(
            f"{name}: there is no such directory. MODEL is a directory that transformers saved, a name on "
            "the hub, or module:factory."
        )
    with screen.working(f"loading {name}"):
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise ModelError(f"{name}: loading it {_TRANSFORMERS}") from error
        quiet_transformers()
        if not os.path.isdir(source) and not _hub_answers():
            source = _cached_directory(name)
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
            made, report = _class_for(transformers, config, trust).from_pretrained(
                source,
                output_loading_info=True,
                **({"trust_remote_code": True} if trust else {}),
                **({} if attn is None else {"attn_implementation": attn}),
            )
        except Exception as error:
            raise ModelError(_load_failure(name, error, os.path.isdir(source))) from error
    random = sorted(report.get("missing_keys", ()))
    if random:
        screen.warn(
            f"{counted(len(random), 'weight')} of {type(made).__name__} not in {name} and drawn at random, "
            f"{random[0]} for example."
        )
    return Loaded(made, name, source, trust=trust)


def _hub_answers() -> bool:
    """One look whether the hub can be reached: transformers tries for half a minute, for each file anew."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:  # nobody will ask it
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # noqa: BLE001 - each version of the hub's library has another client, with errors of its own
        return False
    return True


def _cached_directory(name: str) -> str:
    """The directory of a model that was loaded from the hub before."""
    from huggingface_hub import constants, snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: it is no directory here, the hub ({constants.ENDPOINT}) does not answer, and no earlier copy "
            "from there is in the cache. Offline, give the directory of a model that is already here."
        ) from error


def _check_directory(name: str, path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{name}: the directory has no config.json, so it is no model that transformers saved. For a "
            "model of your own, give module:factory."
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config}: cannot be read as JSON: {first_line(error)}") from error


def _class_for(transformers: Any, config: Any, trust: bool) -> Any:
    """The class that the checkpoint was saved from, else the auto class that fits."""
    names = getattr(config, "architectures", None) or []
    remote = getattr(config, "auto_map", None) or {}
    if trust:
        auto = next((n for n in remote if n.startswith("AutoModelFor")), "AutoModel" if "AutoModel" in remote else None)
        if auto is not None:
            return getattr(transformers, auto)
    return next((c for n in names if isinstance(c := getattr(transformers, n, None), type)), transformers.AutoModel)


def _load_failure(name: str, error: Exception, local: bool) -> str:
    said = first_line(error)
    if "trust_remote_code" in str(error):
        return f"{name}: this model runs code from its own repository; read it, then allow it with --trust-remote-code."
    if not local and isinstance(error, OSError):
        return (
            f"{name}: it is no directory here, and the hub did not give it: {said} Offline, give the directory "
            "of a model that is already here."
        )
    return f"{name}: transformers cannot load it: {type(error).__name__}: {said}"
