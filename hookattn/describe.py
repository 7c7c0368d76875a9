"""What the header of a trace says of a model."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import nn


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, configuration and versions of a model and of the libraries that run it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif config is not None and not isinstance(config, dict):
        config = dict(vars(config)) if hasattr(config, "__dict__") else repr(config)
    cls = type(model)
    package = cls.__module__.partition(".")[0]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    version = getattr(sys.modules.get(package), "__version__", None)
    if isinstance(version, str):
        versions[package] = version
    return {"class": cls.__name__, "module": cls.__module__, "config": config, "versions": versions}
