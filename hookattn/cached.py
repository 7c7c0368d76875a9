"""What is worked out when it is first asked for, and kept: :func:`functools.cached_property`, without a lock."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property(functools.cached_property):
        """As that of Python 3.12.

        That of 3.11 holds a lock as it works something out, one for all objects of the class: threads wait for each
        other, and a process that is forked in the meantime waits forever.
        """

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is None:
                return self
            made = vars(instance)[self.attrname] = self.func(instance)
            return made


__all__ = ["cached_property"]
