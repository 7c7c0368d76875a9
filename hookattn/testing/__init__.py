"""The conformance suite for adapters: what this library promises of a trace, checked on a model of yours.

One call runs all of it, and tells everything that is wrong at once::

    check_adapter(MyAdapter(), lambda: MyModel(layers=2), lambda: torch.arange(5)[None])

Or subclass :class:`AdapterContract` in a test file, and pytest runs each check as a test::

    class TestMyModel(AdapterContract):
        adapter = MyAdapter()

        def model(self):
            return MyModel(layers=2)

        def inputs(self):
            return torch.arange(5)[None]

Two functions stand on their own: :func:`check_trace` and :func:`check_clean`. Everything raises AssertionError, with
the path of the call or module. Nothing here needs pytest.
"""

from __future__ import annotations

from .check import CHECKS, check_adapter
from .clean import check_clean
from .contract import AdapterContract
from .failure import Failure
from .invariants import check_trace

__all__ = ["CHECKS", "AdapterContract", "Failure", "check_adapter", "check_clean", "check_trace"]


def __dir__() -> list[str]:
    return __all__
