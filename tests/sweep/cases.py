"""One model type -> a small model with drawn parameters, and inputs that it runs on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .classes import by_name, config_class, model_class
from .inputs import Inputs, said
from .recipes import Recipe
from .shrink import shrink
from .table import RECIPES
from .weights import draw


class UnbuildableError(Exception):
    """No case can be made of a type; the message is the reason."""


def small_config(model_type: str) -> PreTrainedConfig:
    """The type's configuration, small."""
    recipe = RECIPES.get(model_type, Recipe())
    cls = config_class(model_type)
    start = recipe.start(cls) if recipe.start else cls()
    return shrink(start, recipe.config)


def build(model_type: str, implementation: str, gain: float = 1.6) -> tuple[nn.Module, PreTrainedConfig]:
    """A small model of a type in one attention implementation, in eval mode; equal parameters in each."""
    recipe = RECIPES.get(model_type, Recipe())
    config = small_config(model_type)
    cls = by_name(recipe.model, type(config)) if recipe.model else model_class(model_type)
    torch.manual_seed(5)
    if issubclass(cls, PreTrainedModel):
        model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation)
    else:
        config._attn_implementation = implementation
        model = cls(config)
    draw(model, gain)
    return model.float().eval(), config


def inputs_of(model_type: str, model: nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    """Inputs that the model runs on.

    Raises:
        UnbuildableError: nothing that the rules make is accepted; says what the model said to the first of them.
    """
    recipe = RECIPES.get(model_type, Recipe())
    maker = Inputs(model, config, dict(recipe.inputs), recipe.without)
    for inputs in maker.candidates():
        try:
            run(model, inputs)
        except Exception as error:  # noqa: BLE001 - what a model says to inputs that do not fit it
            maker.refused.append(said(error))
            continue
        return inputs
    raise UnbuildableError("; ".join(dict.fromkeys(maker.refused[:4])) or "no inputs fit the signature")


def run(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Any:
    """One forward from the same random state."""
    torch.manual_seed(3)
    with torch.no_grad():
        return model(**copy_of(inputs), **more)


def copy_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """Tensors of their own, for models that write into theirs."""
    return {k: copy.deepcopy(v) for k, v in inputs.items()}
