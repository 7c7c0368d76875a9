"""One model type -> a small model with drawn parameters, and inputs that it runs on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .classes import by_name, config_class, model_class, model_types, owner_of
from .inputs import Inputs, parts_of, said
from .recipes import Recipe
from .shrink import shrink
from .table import RECIPES
from .weights import draw


class UnbuildableError(Exception):
    """No case can be made of a type; the message is the reason."""


class Calling(nn.Module):
    """A model that has no forward, as one whose forward is its encoder's.

    Args:
        model: the model.
        method: the name of what is called.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.__dict__["forward"] = getattr(model, method)  # what its inputs are is read from its signature


def small_config(model_type: str, part: str = "") -> PreTrainedConfig:
    """The type's configuration, small, as its recipe says; with a part that it may have, if one is named."""
    recipe = RECIPES.get(model_type, Recipe())
    cls = config_class(model_type)
    start = recipe.start(cls) if recipe.start else cls()
    more: dict[str, Any] = {}
    if part:
        more = RECIPES.get(part, Recipe()).config
        name = next(n for n, c in cls.sub_configs.items() if c is config_class(part))
        if getattr(start, name, None) is None:
            start = cls(**{name: config_class(part)()})
    return shrink(start, {**recipe.config, **more})


def with_parts(model_type: str) -> PreTrainedConfig:
    """The same where the parts are what runs: each is set by the recipe that it has as a type of its own."""
    start = config_class(model_type)()
    overrides: dict[str, Any] = {}
    for name, part in vars(start).items():
        if isinstance(part, PreTrainedConfig):
            own = RECIPES.get(part.model_type, Recipe()).config
            overrides |= {f"{name}.{path}": value for path, value in own.items()}
    return shrink(start, overrides | RECIPES.get(model_type, Recipe()).config)


def has_forward(cls: type[nn.Module]) -> bool:
    """Whether a class has a forward of its own."""
    return cls.forward is not nn.Module.forward


def built_as(model_type: str) -> str:
    """The type whose models build this one: itself, or what it is a part of."""
    return owner_of(model_type) if RECIPES.get(model_type, Recipe()).part else model_type


def build(model_type: str, implementation: str, gain: float = 1.6) -> tuple[nn.Module, PreTrainedConfig]:
    """A small model of a type in one attention implementation, in eval mode; equal parameters in each.

    A part is built with the model around it. Where a model has no forward, its first part that has one is taken, or
    what encodes.

    Raises:
        UnbuildableError: the model around it does not build the part.
    """
    owner = built_as(model_type)
    name = RECIPES.get(model_type, Recipe()).model or RECIPES.get(owner, Recipe()).model
    cls = by_name(name, config_class(owner)) if name else model_class(owner)
    config = small_config(owner, model_type if owner != model_type else "") if has_forward(cls) else with_parts(owner)
    torch.manual_seed(5)
    if issubclass(cls, PreTrainedModel):
        try:
            model: nn.Module = cls._from_config(copy.deepcopy(config), attn_implementation=implementation)
        except AttributeError:
            first = next((p.model_type for p in parts_of(config, "")[1:] if p.model_type in model_types()), "")
            if has_forward(cls) or not first:
                raise
            return build(first, implementation, gain)  # another part of its cannot be made
    else:
        config._attn_implementation = implementation
        model = cls(config)
    if owner != model_type and not any(isinstance(c, config_class(model_type)) for c in parts_of(config, "")):
        raise UnbuildableError(f"is a part of {owner}, which a small one of it has not")
    draw(model, gain)
    model = model.float().eval()
    if has_forward(cls):
        return model, config
    parts = [m for m in model.children() if isinstance(m, PreTrainedModel) and has_forward(type(m))]
    if parts:
        return parts[0], parts[0].config
    if hasattr(model, "encode"):
        return Calling(model, "encode").eval(), config
    raise UnbuildableError("has no forward of its own, and no part that has one")


def inputs_of(model_type: str, model: nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    """Inputs that the model runs on.

    Raises:
        UnbuildableError: nothing that the rules make is accepted; says what the model said to the first of them.
    """
    name = built_as(model_type)
    if name not in RECIPES and getattr(type(model), "config_class", None) is not config_class(name):
        name = config.model_type  # a part of a model that has no forward
    recipe = RECIPES.get(name, Recipe())
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
