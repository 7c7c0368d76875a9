"""Trace the attention of any PyTorch model, exactly as its own kernels computed it.

>>> import hookattn
>>> trace = hookattn.trace(model, inputs)          # doctest: +SKIP
>>> trace[0].weights.shape                         # doctest: +SKIP
"""

from __future__ import annotations

from .adapter import Adapter
from .api import trace, tracing
from .call import Call, Skipped
from .certificate import Certificate
from .errors import (
    AdapterCheckError,
    AdapterError,
    BrokenAdapterError,
    CorruptFileError,
    DuplicateAdapterError,
    FieldNotCaptured,
    ForeignFileError,
    HookattnError,
    InputError,
    ModelError,
    NewerFormatError,
    NoAttentionError,
    SelectionError,
    SkippedWarning,
    StitchError,
    TraceFileError,
    TraceTooLargeError,
    TraceTooLargeWarning,
    TraceWriteError,
    UnfaithfulError,
    UnfaithfulWarning,
    UnsupportedConfigError,
)
from .planned import MemoryPlan, PlannedCall
from .planning import plan
from .record import FIELDS, KernelCall
from .registry import adapters, register
from .site import Site
from .traces import Trace, load
from .version import __version__ as __version__

__all__ = [
    "FIELDS",
    "Adapter",
    "AdapterCheckError",
    "AdapterError",
    "BrokenAdapterError",
    "Call",
    "Certificate",
    "CorruptFileError",
    "DuplicateAdapterError",
    "FieldNotCaptured",
    "ForeignFileError",
    "HookattnError",
    "InputError",
    "KernelCall",
    "MemoryPlan",
    "ModelError",
    "NewerFormatError",
    "NoAttentionError",
    "PlannedCall",
    "SelectionError",
    "Site",
    "Skipped",
    "SkippedWarning",
    "StitchError",
    "Trace",
    "TraceFileError",
    "TraceTooLargeError",
    "TraceTooLargeWarning",
    "TraceWriteError",
    "UnfaithfulError",
    "UnfaithfulWarning",
    "UnsupportedConfigError",
    "adapters",
    "load",
    "plan",
    "register",
    "trace",
    "tracing",
]
