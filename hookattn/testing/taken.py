"""What a model's forward takes, found by running it.

A signature does not tell: a decorator renames an argument on its way in, ``**kwargs`` accepts every name and drops it,
and a model may call its cache what it likes. So the model is run with the argument. It takes an argument if it accepts
it and something else comes back than without it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .case import NotApplicable, same, tensors

# What a cache is fed back as, where it comes back as an element of a tuple, without a name.
CACHE_NAMES = ("cache", "past_key_values", "past")
Inputs = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CacheUse:
    """How a model hands out a cache and takes it back.

    Attributes:
        asked: the arguments that ask for one: ``use_cache=True``; empty where the forward refuses that.
        place: where in the output the cache is: a name, or the index in a tuple.
        name: the argument that takes it back.
    """

    asked: dict[str, bool]
    place: str | int
    name: str

    def of(self, output: Any) -> Any:
        """The cache in an output; None where there is none."""
        return parts(output).get(self.place)


def find_cache(model: nn.Module, prompt: Inputs, following: Inputs) -> CacheUse:
    """How the model hands out a cache and takes it back.

    It is run on a prompt, once asked for a cache and once asked for none; what comes back with the first alone, or by a
    name of :data:`CACHE_NAMES`, is fed back with the tokens that follow. It is a cache if that changes the output.

    Args:
        model: the model, in eval mode.
        prompt: its inputs by name, cut to the first tokens.
        following: the same, cut to the tokens that follow.

    Raises:
        NotApplicable: the model takes no cache; says what was tried and what came of it.
    """
    who, told = type(model).__name__, []
    asked = {"use_cache": True}
    made, refused = attempt(model, {**prompt, **asked}, "use_cache")
    if refused:
        tried, asked = f"{who} refuses use_cache=True ({refused})", {}
        found = _candidates(parts(_run(model, prompt)), None)
    else:
        tried = f"{who} accepts use_cache=True"
        found = _candidates(parts(made), parts(_run(model, {**prompt, "use_cache": False})))
    if not found:
        raise NotApplicable(f"the model takes no cache: {tried}, and returns nothing that could be one")
    try:
        plain = _run(model, {**following, **asked})
    except Exception:  # noqa: BLE001 - then what follows runs only with a cache
        plain = None
    for place in found:
        for name in dict.fromkeys([place, *CACHE_NAMES] if isinstance(place, str) else CACHE_NAMES):
            use = CacheUse(asked, place, name)
            cache = use.of(_run(model, {**prompt, **asked}))  # anew each time: a model writes into what it is given
            made, refused = attempt(model, {**following, **asked, name: cache}, name)
            if not refused and not _equal(plain, made):
                return use
            told.append(f"{name}= ({refused or 'accepted, and changes nothing'})")
    places = ", ".join(map(repr, found))
    raise NotApplicable(
        f"the model takes no cache: {tried}, and takes {places} back neither as {' nor as '.join(told)}"
    )


def not_taken(model: nn.Module, inputs: Inputs, name: str, values: Iterable[Any]) -> str:
    """Why the model takes no argument of this name; empty if it does, that is if one of the values has an effect."""
    who, plain = type(model).__name__, _run(model, inputs)
    for value in values:
        made, refused = attempt(model, {**inputs, name: value}, name)
        if refused:
            return f"{who} refuses {name}= ({refused})"
        if not _equal(plain, made):
            return ""
    return f"{name}= changes nothing that {who} returns"


def attempt(model: nn.Module, inputs: Inputs, name: str) -> tuple[Any, str]:
    """What the model returns, and an empty text; or None, and what it says where it refuses the argument of this name.

    Raises:
        Exception: what the model raises for another reason.
    """
    try:
        return _run(model, inputs), ""
    except (TypeError, ValueError, NotImplementedError) as error:
        if not re.search(rf"\b{re.escape(name)}\b", str(error)):
            raise
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]


def parts(output: Any) -> dict[str | int, Any]:
    """What a model returns, by name, or by index in a tuple; without what is None."""
    found: Mapping[Any, Any] = {}
    if isinstance(output, Tensor):
        found = {0: output}
    elif isinstance(output, Mapping):
        found = output
    elif hasattr(output, "_asdict"):
        found = output._asdict()
    elif isinstance(output, (tuple, list)):
        found = dict(enumerate(output))
    elif is_dataclass(output) and not isinstance(output, type):
        found = {f.name: getattr(output, f.name) for f in fields(output)}
    return {place: x for place, x in found.items() if x is not None}


def _candidates(made: dict[str | int, Any], without: dict[str | int, Any] | None) -> list[str | int]:
    """Where a cache may be: first what comes back only if it is asked for, then what is called or built like one."""
    new = [] if without is None else [place for place in made if place not in without]
    like = [p for p, x in made.items() if p in CACHE_NAMES or (isinstance(p, int) and not isinstance(x, Tensor))]
    return list(dict.fromkeys([*new, *like]))


def _run(model: nn.Module, inputs: Inputs) -> Any:
    torch.manual_seed(1)
    with torch.no_grad(), warnings.catch_warnings():
        # A name that is on its way out is taken all the same.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return model(**inputs)


def _equal(a: Any, b: Any) -> bool:
    one, other = list(tensors(a)), list(tensors(b))
    return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
