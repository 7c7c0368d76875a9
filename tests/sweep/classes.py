"""Which class of transformers runs a model type: the base model, or what of its file takes this configuration."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Where a type has no base model, the first of these that knows it.
_MAPPINGS = """MODEL_MAPPING MODEL_FOR_MULTIMODAL_LM_MAPPING MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
MODEL_FOR_PRETRAINING_MAPPING MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING MODEL_FOR_CAUSAL_LM_MAPPING
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING MODEL_FOR_OBJECT_DETECTION_MAPPING
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING MODEL_FOR_DEPTH_ESTIMATION_MAPPING
MODEL_FOR_KEYPOINT_MATCHING_MAPPING MODEL_FOR_BACKBONE_MAPPING MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING""".split()


class NoModelError(Exception):
    """No class of transformers runs this configuration on its own."""


def model_types() -> list[str]:
    """Every model type that the installed transformers maps, in its order."""
    return list(CONFIG_MAPPING.keys())


def config_class(model_type: str) -> Any:
    """The configuration class of a type."""
    return CONFIG_MAPPING[model_type]


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that exercises most of a type's attention: its base model where it has one.

    Raises:
        NoModelError: there is none.
    """
    config = config_class(model_type)
    for name in _MAPPINGS:
        names = getattr(modeling_auto, name + "_NAMES", {})
        if model_type in names:
            found = getattr(modeling_auto, name)[config]
            return found[0] if isinstance(found, (tuple, list)) else found
    found = _of_config(config) or _parts_of_config(config)
    if not found:
        raise NoModelError(f"no model class takes {config.__name__} alone")
    return found[0]


def owner_of(model_type: str) -> str:
    """The type whose configuration has this one as a part; the first that is mapped.

    Raises:
        NoModelError: there is none.
    """
    wanted = config_class(model_type)
    for other in model_types():
        nested = getattr(config_class(other), "sub_configs", None) or {}
        if other != model_type and wanted in nested.values():
            return other
    raise NoModelError(f"no configuration has {wanted.__name__} as a part")


def by_name(name: str, config: Any) -> type[PreTrainedModel]:
    """A model class by name: one of transformers, or of the configuration's own package."""
    for module in (transformers, *_modules(config)):
        if hasattr(module, name):
            return getattr(module, name)
    raise NoModelError(f"there is no {name}")


def _of_config(config: Any) -> list[type[PreTrainedModel]]:
    """Concrete classes whose configuration is this one: base models before heads, in the order of the file."""
    found = []
    for module in _modules(config):
        for cls in vars(module).values():
            if (
                inspect.isclass(cls)
                and issubclass(cls, PreTrainedModel)
                and cls.__module__ == module.__name__
                and cls.config_class is config
                and "forward" in vars(cls)
                and not cls.__name__.endswith("PreTrainedModel")
            ):
                found.append(cls)
    return sorted(found, key=lambda c: ("For" in c.__name__, "Backbone" in c.__name__))


def _parts_of_config(config: Any) -> list[Any]:
    """Plain modules whose constructor takes this configuration: the one that is named like it first."""
    found = []
    for module in _modules(config):
        for cls in vars(module).values():
            if not (inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__):
                continue
            taken = [p.annotation for p in inspect.signature(cls.__init__).parameters.values()][1:]
            if taken and taken[0] in (config, config.__name__):
                found.append(cls)
    return sorted(found, key=lambda c: c.__name__ != config.__name__.removesuffix("Config"))[:1]


def _modules(config: Any) -> list[Any]:
    package = importlib.import_module(config.__module__.rpartition(".")[0])
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("modeling_")]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]
