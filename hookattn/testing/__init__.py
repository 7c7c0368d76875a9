"""The conformance suite for adapters: what this library promises of a trace, checked on a model of yours.

Subclass :class:`AdapterContract` in a test file, and pytest runs the whole suite::

    class TestMyModel(AdapterContract):
        adapter = MyAdapter()

        def model(self):
            return MyModel(layers=2)

        def inputs(self):
            return torch.arange(5)[None]

The two functions it is made of stand on their own: :func:`check_trace` and :func:`check_clean`. Everything raises
AssertionError, with the path of the call or module. Nothing here needs pytest.
"""

from __future__ import annotations

from .calls import check_trace
from .clean import check_clean
from .contract import AdapterContract

__all__ = ["AdapterContract", "check_clean", "check_trace"]
