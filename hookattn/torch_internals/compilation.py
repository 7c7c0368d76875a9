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
from .undo import Change

_PIECE = "taps of compiled code"
_EVALUATOR = "torch._dynamo.eval_frame"
STANCE = "_callback_from_stance"
"""The evaluator's function that is asked, call by call, for the callback that compiles."""
COUNT = "set_fullgraph_compiled_frame_count"


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


def callback() -> Any:
    """The callback that compiles in this thread; None: nothing is compiled."""
    return _callback()


class compiling_by(Change):
    """A callback is the one that compiles in this thread while a block runs; None: nothing is compiled in it."""

    __slots__ = ("_before", "_callback")

    def __init__(self, callback: Any):
        self._callback, self._before = callback, _callback()

    def make(self) -> None:
        _set_callback(self._callback)

    def undo(self) -> None:
        _set_callback(self._before)


_set_callback = private("torch._C", "_dynamo.eval_frame.set_eval_frame", _PIECE)
_callback = private("torch._C", "_dynamo.eval_frame.get_eval_frame_callback", _PIECE)


def count_no_frames() -> None:
    """Say that nobody counts which frames are compiled in the compiled function that runs.

    One of ``torch.compile(..., fullgraph=True)`` counts them, and raises where there was none, unless the stance of the
    whole process says that nothing is to be compiled. A single thread that compiles nothing has to say so here. The
    count is of the process, too: another thread's function that ends at this moment does not complain, and no more.
    """
    # A torch that does not count does not complain, either.
    count: Any = getattr(sys.modules.get(_EVALUATOR), COUNT, None)
    if count is not None:
        count(-1)
