"""Private names of torch, looked up when this package is imported and missed when they are first used.

A plain ``torch._C.name`` would raise an AttributeError in the middle of somebody's model once a torch lacks it. A name
that is not there is replaced by a class whose every use says which piece of this package misses it.
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import torch

from ..errors import HookattnError


class _Missing(type):
    """The class of the stand-ins: raises where one is called, subclassed and made, or asked whether it is a class of.

    A stand-in is a class and no function, since it has to stand for both: ``isinstance(x, FakeTensor)`` as well as
    ``push(mode)``.
    """

    complaint: str

    def _complain(cls, *_: Any, **__: Any) -> NoReturn:
        raise HookattnError(cls.complaint)

    __call__ = __instancecheck__ = __subclasscheck__ = _complain

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # asked by Python itself (typing, inspect, copy), which takes no for an answer
            raise AttributeError(name)
        cls._complain()


def private(module: str, name: str, piece: str) -> Any:
    """A private name of torch, or what complains when it is used.

    Args:
        module: the module that has it.
        name: its name, with dots for an attribute of an attribute.
        piece: what of hookattn needs it, in a few words.

    Returns:
        The function or class. Where this torch lacks it, a stand-in that raises HookattnError when it is used.
    """
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return missing(f"{module}.{name}", piece)
    return found


def missing(what: str, piece: str) -> Any:
    """A stand-in for what this torch lacks; any use of it raises HookattnError."""
    complaint = (
        f"hookattn's {piece} need {what}, which torch {torch.__version__} does not have; take a torch that the README "
        "names, or a newer hookattn."
    )
    # An Exception, so that `except` clauses can name it, too.
    return _Missing(what.rpartition(".")[2], (Exception,), {"complaint": complaint})
