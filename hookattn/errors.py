"""The one exception tree.

::

    HookattnError
    ├── ModelError             the model cannot be traced as it is (scripted, on the meta device, no attention)
    │   └── NoAttentionError   the forward ran, and no attention call was seen in it
    ├── InputError             the inputs do not fit the model, or an argument is of another kind than it has to be
    ├── SelectionError         an unknown field, layer or head; an empty selection; an option that there is none of
    │   ├── NoSuchCallError    a trace has fewer calls than that (also an IndexError)
    │   └── NoSuchFieldError   no call has a field of this name (also an AttributeError)
    ├── FieldNotCaptured       a field that this trace does not hold (also an AttributeError)
    ├── FieldAbsent            a field that a call does not have, as its attention is of another kind (also an
    │                          AttributeError)
    ├── AdapterError           an adapter or the registry is at fault; names the distribution
    │   ├── DuplicateAdapterError
    │   ├── BrokenAdapterError
    │   ├── AdapterCheckError        what hookattn.testing.check_adapter found (also an AssertionError)
    │   └── UnsupportedConfigError   a config option that changes the math and that the adapter does not know
    ├── EditError              what attention does cannot be changed so; names the module, and why
    ├── GradientError          a gradient of a call that there is none of; says why
    ├── StitchError            the steps of a trace do not make one picture
    ├── MergeError             the traces of several ranks do not make one; names the rank, and what to do
    ├── MeasureError           a measure is not defined for a call, or the labels given to it do not fit
    ├── RenderError            a picture or a page cannot be made of this trace, or not shown
    │   └── PageTooLargeError  it has no room in one page; says its size
    ├── TraceTooLargeError     a trace has no room in memory, or on the disk of ``to=``; says what would fit
    ├── UnfaithfulError        a call is over its tolerance, and ``strict=True``
    └── TraceFileError         a trace file cannot be read or written
        ├── CorruptFileError
        ├── ForeignFileError
        ├── NewerFormatError
        └── TraceWriteError

Warnings, of which :class:`HookattnWarning` is the base: :class:`UnfaithfulWarning` (a call over tolerance),
:class:`SkippedWarning` (attention that was not read), :class:`GuessedAxesWarning` (nothing but convention told which
axis is which), :class:`UnfitTokensWarning` (``tokens=`` that are of no call), :class:`TraceTooLargeWarning` (a trace
that may have no room), :class:`MonitorWarning` (heads were not measured or logged in a training, which goes on),
:class:`BlankLinesWarning` (examples of a survey are not numbered as the lines of their file are).
"""

from __future__ import annotations

from collections.abc import Sequence

from .printable import printable


def _message(self: BaseException) -> str:
    # Messages name paths, tokens and notes that are of a file or of a model, and tracebacks end in a terminal.
    return printable(BaseException.__str__(self), keep="\n")


class HookattnError(Exception):
    """Base of every error this library raises on purpose. What it names of a file is printable in its message."""

    __str__ = _message


class ModelError(HookattnError):
    """The model cannot be traced as it is."""


class NoAttentionError(ModelError):
    """The forward ran, and no attention call was seen in it."""


class InputError(HookattnError):
    """The inputs do not fit the model, or an argument is of another kind than it has to be."""


class SelectionError(HookattnError):
    """The selection, or an option, names something that is not there, or nothing at all."""


class NoSuchCallError(SelectionError, IndexError):
    """A trace has fewer calls than that."""


class NoSuchFieldError(SelectionError, AttributeError):
    """No call has a field of this name."""


class FieldNotCaptured(HookattnError, AttributeError):
    """A field that this trace does not hold; the message names the ``capture=`` that would have kept it."""


class FieldAbsent(HookattnError, AttributeError):
    """A field that a call does not have, as its attention is of another kind: an additive score has no ``q``."""


class AdapterError(HookattnError):
    """An adapter or the registry is at fault."""


class DuplicateAdapterError(AdapterError):
    """Two adapters claim the same name."""


class BrokenAdapterError(AdapterError):
    """An adapter that cannot be loaded, or that is not what an adapter has to be."""


class UnsupportedConfigError(AdapterError):
    """A config option that changes the math and that the adapter does not know."""


class AdapterCheckError(AdapterError, AssertionError):
    """What :func:`hookattn.testing.check_adapter` found; ``failures`` has one entry for each."""

    def __init__(self, message: str, failures: Sequence[object] = ()):
        super().__init__(message)
        self.failures = tuple(failures)


class EditError(HookattnError):
    """What attention does cannot be changed so: the message names the module, what was to be changed, and why not."""


class GradientError(HookattnError):
    """A gradient of a call that there is none of; the message says why, and how to get one."""


class StitchError(HookattnError):
    """The steps of a trace do not make one picture of a generation."""


class MergeError(HookattnError):
    """The traces of several ranks do not make one: a rank is missing, or there twice, or they are of different runs."""


class MeasureError(HookattnError):
    """A measure is not defined for a call, or the labels given to it do not fit; names the measure and the call."""


class RenderError(HookattnError):
    """A picture or a page cannot be made of this trace, or cannot be shown."""


class PageTooLargeError(RenderError):
    """A trace has no room in one self-contained page; the message says its size, and what shows it all the same."""


class TraceTooLargeError(HookattnError):
    """A trace has no room in memory, or on the disk of ``to=``; the message says what would fit."""


class UnfaithfulError(HookattnError):
    """What was rebuilt is not what the model's kernel returned, and ``strict=True`` was asked for."""


class TraceFileError(HookattnError):
    """A trace file cannot be read or written."""


class CorruptFileError(TraceFileError):
    """The file is damaged or cut short."""


class ForeignFileError(TraceFileError):
    """The file is not a trace."""


class NewerFormatError(TraceFileError):
    """The file was written in a newer format than this version of the library reads."""


class TraceWriteError(TraceFileError):
    """The file could not be written; nothing was left under its final name."""


class HookattnWarning(UserWarning):
    """Base of every warning of this library. What it names of a file is printable in its message."""

    __str__ = _message


class UnfaithfulWarning(HookattnWarning):
    """A call is over its tolerance."""


class SkippedWarning(HookattnWarning):
    """Attention ran that could not be read; ``trace.skipped`` has the path and the reason."""


class GuessedAxesWarning(HookattnWarning):
    """Which axis of a call is which was told by convention alone, or a ``layout=`` that would tell it was not used."""


class UnfitTokensWarning(HookattnWarning):
    """Tokens were given that are of no sequence which the model read; ``trace.notes`` says why."""


class TraceTooLargeWarning(HookattnWarning):
    """A trace may have no room in memory, or on the disk of ``to=``, and its exact size cannot be told."""


class MonitorWarning(HookattnWarning):
    """Heads were not measured, or not logged, at some step of a training, which goes on; or where their table went."""


class BlankLinesWarning(HookattnWarning):
    """Lines of a survey's file are blank, and no examples, so that the number of an example is not that of its line."""
