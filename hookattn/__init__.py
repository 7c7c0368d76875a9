"""Trace the attention of any PyTorch model, exactly as its own kernels computed it.

>>> import hookattn
>>> trace = hookattn.trace(model, inputs)          # doctest: +SKIP
>>> trace[0].weights.shape                         # doctest: +SKIP
"""

from __future__ import annotations

from . import edit
from .api import edited, editing, trace, tracing
from .attention.kernel_call import FIELDS, KernelCall
from .calls.call import Call, Skipped
from .calls.certificate import Certificate
from .calls.shard import Shard
from .calls.site import Site
from .errors import (
    AdapterCheckError,
    AdapterError,
    BlankLinesWarning,
    BrokenAdapterError,
    CorruptFileError,
    DuplicateAdapterError,
    EditError,
    FieldAbsent,
    FieldNotCaptured,
    ForeignFileError,
    GradientError,
    GuessedAxesWarning,
    HookattnError,
    HookattnWarning,
    InputError,
    MergeError,
    ModelError,
    MonitorWarning,
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
    UnfitTokensWarning,
    UnsupportedConfigError,
)
from .models.adapter import Adapter
from .models.registry import adapters, register
from .planning.memory_plan import MemoryPlan, PlannedCall
from .planning.plan import plan
from .pretrained.text import trace_text
from .traces import Trace, concat, load, merge
from .version import __version__ as __version__

__all__ = [
    "FIELDS",
    "Adapter",
    "AdapterCheckError",
    "AdapterError",
    "BlankLinesWarning",
    "BrokenAdapterError",
    "Call",
    "Certificate",
    "CorruptFileError",
    "DuplicateAdapterError",
    "EditError",
    "FieldAbsent",
    "FieldNotCaptured",
    "ForeignFileError",
    "GradientError",
    "GuessedAxesWarning",
    "HookattnError",
    "HookattnWarning",
    "InputError",
    "KernelCall",
    "MemoryPlan",
    "MergeError",
    "ModelError",
    "MonitorWarning",
    "NewerFormatError",
    "NoAttentionError",
    "PlannedCall",
    "SelectionError",
    "Shard",
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
    "UnfitTokensWarning",
    "UnsupportedConfigError",
    "adapters",
    "concat",
    "edit",
    "edited",
    "editing",
    "load",
    "merge",
    "plan",
    "register",
    "trace",
    "trace_text",
    "tracing",
]


def __dir__() -> list[str]:
    return __all__
