"""Where torch decides whether code runs compiled: its frame evaluator, asked and told from inside.

``torch.compiler.set_stance`` is public and holds for the whole process; a trace is of one thread, and others shall go
on compiling. ``torch.compiler.disable`` wraps a function, which whoever imported it before does not see, and it leaves
no way to run the original compiled inside.

Nothing here loads the compiler: where it is not loaded, nothing can have been compiled.
"""

from __future__ import annotations

import sys
from types import CodeType, ModuleType
from typing import Any

from .private import missing, private

_PIECE = "taps of compiled code"
_EVALUATOR = "torch._dynamo.eval_frame"
STANCE = "_callback_from_stance"
"""The evaluator's function that is asked, call by call, for the callback that compiles."""


def evaluator() -> ModuleType | None:
    """The module that decides what is compiled, with a function :data:`STANCE`; None: it is not loaded.

    Raises:
        HookattnError: this torch decides elsewhere.
    """
    module = sys.modules.get(_EVALUATOR)
    if module is not None and not hasattr(module, STANCE):
        missing(f"{_EVALUATOR}.{STANCE}", _PIECE)()
    return module


def loaded() -> bool:
    """Whether the compiler is loaded."""
    return _EVALUATOR in sys.modules


def skip(code: CodeType) -> None:
    """Never compile a code object, nor what it calls by itself; the compiler has to be loaded."""
    private(_EVALUATOR, "skip_code", _PIECE)(code)


def set_callback(callback: Any) -> Any:
    """Make a callback the one that compiles in this thread (None: nothing is compiled); returns the one before it."""
    return _set_callback(callback)


_set_callback = private("torch._C", "_dynamo.eval_frame.set_eval_frame", _PIECE)
