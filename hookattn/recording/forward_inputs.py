"""What a model is called with: arguments from whatever was given as inputs, whether they fit, and token strings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import InputError


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward: a mapping has them by name, a tuple in order; anything else is the only one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    return (inputs,), {}


def run_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a model; where its arguments do not fit, say so in terms of its forward.

    Raises:
        InputError: they do not fit it; and whatever the model raises.
    """
    try:
        return model(*args, **kwargs)
    except TypeError:
        check_fit(model, args, kwargs)
        raise


def check_fit(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare arguments with the signature of a forward that has raised a TypeError on them.

    It is for the message alone, and never a reason not to run: a decorator may take more than a signature shows. Of a
    forward that has no signature to be read, nothing is said.

    Raises:
        InputError: they do not fit it, or are text where it takes none.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}; got {_shapes(args, kwargs)}. "
            "Pass a tensor, a tuple of arguments, or a dict of keyword arguments."
        ) from error
    check_text(model, args, kwargs)


def check_text(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse text for a forward that does not say that it takes any; of one without a signature, nothing is said.

    Raises:
        InputError: all that is given is text.
    """
    given = [*args, *kwargs.values()]
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    text = [a for a in given if isinstance(a, str) or (isinstance(a, (list, tuple)) and a and _strings(a))]
    if text and len(text) == len(given) and not any("str" in str(p.annotation) for p in signature.parameters.values()):
        raise InputError(f"the inputs hold text ({str(text[0])[:40]!r}); tokenize it first and pass the tensors.")


def tokens_of(inputs: Any) -> list[list[str]] | None:
    """The token strings that a fast tokenizer's BatchEncoding has, a list for each batch entry; None: it has none."""
    encodings = getattr(inputs, "encodings", None)
    return [list(e.tokens) for e in encodings] if encodings else None


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Arguments in a few words: dtype and shape of a tensor, the type of anything else."""

    def one(x: Any) -> str:
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__

    return ", ".join([one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()]) or "nothing"


def _strings(x: Any) -> bool:
    return isinstance(x, Iterable) and not isinstance(x, str) and all(isinstance(t, str) for t in x)
