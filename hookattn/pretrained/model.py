"""A model from a directory that transformers saved, or from its name on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ModelError
from ..printable import first_line

_TRANSFORMERS = 'needs the package transformers: pip install "hookattn[transformers]"'
# What says where on the hub something is, and whether its code may run: of the configuration and the tokenizer too.
_OF_ALL = frozenset(
    ("trust_remote_code", "revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")
)


@dataclass
class Loaded:
    """A model, and where the rest of it is.

    Attributes:
        model: the model.
        name: as the user wrote it, or the model's class.
        source: the directory or hub name that also has the tokenizer; None: there is none.
        inputs: what a factory returned beside the model.
        options: of ``from_pretrained``, for the tokenizer too.
        tokenizer: the tokenizer, where there is one already.
        processor: what makes inputs of pictures, sounds and text, likewise.
        notes: what a user has to know: weights that were drawn at random, say.
    """

    model: nn.Module
    name: str
    source: str | None = None
    inputs: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    processor: Any = None
    notes: list[str] = field(default_factory=list)


def load_pretrained(name: str, options: Mapping[str, Any] | None = None) -> Loaded:
    """Load a model, in eval mode.

    Args:
        name: a directory that transformers saved, or a name on the hub.
        options: what ``from_pretrained`` takes beside it: ``attn_implementation``, ``dtype``, ``device_map``,
            ``revision``, ``trust_remote_code`` and so on.

    Raises:
        ModelError: there is no such model, or it cannot be loaded; says what to do.
    """
    given = dict(options or {})
    source = os.path.expanduser(name)
    if os.path.isdir(source):
        _check_directory(name, Path(source, str(given.get("subfolder") or "")))
    elif Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ModelError(
            f"{name}: there is no such directory. Expected a directory that transformers saved, or a name on the hub "
            "(on the command line also module:factory)."
        )
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModelError(f"{name}: loading it {_TRANSFORMERS}") from error
    if not os.path.isdir(source) and not given.get("local_files_only") and not _hub_answers():
        source = _cached_directory(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **of_all(given))
        made, report = _class_for(transformers, config, bool(given.get("trust_remote_code"))).from_pretrained(
            source, output_loading_info=True, **given
        )
    except Exception as error:
        raise ModelError(_load_failure(name, error, os.path.isdir(source))) from error
    loaded = Loaded(made, name, source, options=of_all(given))
    random = sorted(report.get("missing_keys", ()))
    if random:
        loaded.notes.append(
            f"{len(random)} weight{'s' * (len(random) > 1)} of {type(made).__name__} not in {name} and drawn at "
            f"random, {random[0]} for example."
        )
    return loaded


def of_all(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of ``from_pretrained`` that configurations, tokenizers and processors take, too."""
    return {name: value for name, value in options.items() if name in _OF_ALL}


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
            f"{name}: the directory has no config.json, so it is no model that transformers saved. A model of "
            "your own is given as module:factory, in Python as the module itself."
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config}: cannot be read as JSON: {first_line(error)}") from error


def _class_for(transformers: Any, config: Any, trust: bool) -> Any:
    """The class that the checkpoint was saved from, else the auto class that fits; ``trust``: its own code may run."""
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
        return (
            f"{name}: this model runs code from its own repository; read it, then allow it with --trust-remote-code, "
            'in Python with load={"trust_remote_code": True}.'
        )
    if not local and isinstance(error, OSError):
        return (
            f"{name}: it is no directory here, and the hub did not give it: {said} Offline, give the directory "
            "of a model that is already here."
        )
    return f"{name}: transformers cannot load it: {type(error).__name__}: {said}"
