"""A Trace of a file's document; its fields stay in the file until they are read."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike, fspath
from typing import Any, TypeVar

from torch import Tensor

from ..attention.kernel_call import DOT, FIELD_SPECS, FIELDS
from ..calls.call import Call, Skipped
from ..calls.certificate import Certificate
from ..calls.edits import AppliedEdit
from ..calls.fields import Field, InFile
from ..calls.key_history import Continued
from ..calls.output_gradient import OutputGradient
from ..calls.shard import Shard
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..errors import CorruptFileError, InputError
from ..statistics.registry import spec_of
from .agreement import Shown, problem
from .format import Entry
from .links import LINKED
from .reader import LazyFile
from .schema import CALL, CERTIFICATE, DOCUMENT, EDIT, LINK, MODEL, SHARD, SITE, SKIPPED, from_entry
from .stored_history import StoredHistory
from .validate import newer_minor

Made = TypeVar("Made", bound=TraceData)


def load(path: str | PathLike[str], kind: type[Made]) -> Made:
    """See :func:`hookattn.load`; ``kind`` is the class that is made."""
    return trace_of(LazyFile(path), fspath(path), kind)


def trace_of(file: LazyFile, path: str, kind: type[Made]) -> Made:
    """The trace of an open file, which is called ``path``, as an object of the class ``kind``.

    Raises:
        CorruptFileError: its document is no trace's, or says what cannot be; names the call and the field.
    """
    document = file.document
    try:
        values = from_entry(DOCUMENT, "the document", document)
        skipped, calls, _ = values.pop("skipped"), values.pop("calls"), values.pop("compact")
        from_entry(MODEL, "the model", values["model"])
        values |= {"notes": list(values["notes"]), "stack_tokens": dict(values.pop("stack_tokens", None) or {})}
        trace = kind(**values, path=path)
        trace.skipped = [Skipped(**from_entry(SKIPPED, "skipped", entry)) for entry in skipped]
        reader = _Calls(file, values["selection"])
        for entry in calls:
            reader.read(entry)
        trace.calls = reader.calls
    except (TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: the document in the header is not a trace's: {error}. The file was damaged or written by "
            "something else; save the trace again."
        ) from error
    return trace


class _Calls:
    """The calls of an open file, made one after the other of their entries in the document.

    Args:
        file: the file.
        selection: of its document.

    Attributes:
        calls: those that were made.
    """

    def __init__(self, file: LazyFile, selection: dict[str, Any]) -> None:
        self.calls: list[Call] = []
        self._file = file
        # What was captured and has no name of the tables' own; None: the document does not say what was captured.
        captured = selection.get("capture")
        self._captured: list[str] | None = None
        if isinstance(captured, list):
            self._captured = [x for x in captured if type(x) is str and x not in FIELD_SPECS]
        self._newer = newer_minor(file.document["format_version"])
        self._sound: set[Any] = set()  # what was found to agree, as most calls of a trace are alike

    def read(self, entry: dict[str, Any]) -> None:
        """The next call.

        Raises:
            TypeError, ValueError, CorruptFileError: its entry is no call's.
        """
        where = f"call {len(self.calls)}"
        values = from_entry(CALL, where, entry)
        names: dict[str, str | None] = values["fields"]
        continued = values.pop("continued", None)
        links = (
            {f: from_entry(LINK, f"{where}, continued {f}", link) for f, link in continued.items()} if continued else {}
        )
        if "edits" in values:
            entries = [from_entry(EDIT, f"{where}, edit {i}", one) for i, one in enumerate(values["edits"])]
            values["edits"] = tuple(AppliedEdit(**one) for one in entries)
        if "shards" in values:
            values["shards"] = tuple(_shard_of(f"{where}, shard {i}", one) for i, one in enumerate(values["shards"]))
        scale, score = values["scale"], values.get("score")
        of_scale = self._entry(where, "'scale'", scale["tensor"]) if type(scale) is dict else None
        gradient: str | None = values.pop("output_grad", None)
        of_gradient = None if gradient is None else self._entry(where, "'output_grad'", gradient)
        file = self._file
        fields: dict[str, Field] = {}
        shown: dict[str, Shown | None] = {}
        for f, name in names.items():
            if name is None:
                fields[f] = shown[f] = None
            else:
                found = self._entry(where, f"field {f!r}", name)
                fields[f], shown[f] = InFile(file, name), (found.dtype, found.shape)
        for f, link in links.items():
            if f not in LINKED or f in fields:
                why = "'fields' has it, too" if f in fields else f"expected {' or '.join(LINKED)}"
                raise ValueError(f"{where}, continued {f}: {why}")
            if link["tensor"] is not None:
                self._entry(where, f"continued {f}", link["tensor"])
            try:
                place = fields[f] = _continued(f, link, self.calls)
            except ValueError as error:
                raise ValueError(f"{where}, continued {f}: {error}") from None
            shown[f] = place.history.dtype, place.shape
        self._check(where, values, shown, _shown(of_scale), _shown(of_gradient))
        before_applied = "weights" in fields and "applied" not in fields
        if before_applied and not values["mixed"] and not values["dropout"]:
            fields["applied"] = None  # a file of format 1.2 or older does not name it, and here nothing lay in between
        if links or before_applied:
            fields = {f: fields[f] for f in (*FIELDS, *fields) if f in fields}
        values["site"] = Site(**from_entry(SITE, f"{where}, site", values["site"]))
        values["certificate"] = _certificate_of(f"{where}, certificate", values["certificate"])
        values["scale"] = None if score is not None and score != DOT else _scale_of(file, scale)
        values["fields"] = fields
        call = Call(index=len(self.calls), **values)
        if gradient is not None:
            call.gradient = OutputGradient(InFile(file, gradient))
        self.calls.append(call)

    def _entry(self, where: str, what: str, name: str) -> Entry:
        found = self._file.entry(name)
        if found is None:
            raise ValueError(f"{where}, {what} names the tensor {name[:80]!r}, which is not in the file")
        return found

    def _check(
        self,
        where: str,
        values: dict[str, Any],
        shown: dict[str, Shown | None],
        scale: Shown | None,
        gradient: Shown | None,
    ) -> None:
        """That all of a call can be true.

        Raises:
            ValueError: it cannot.
        """
        get = values.get
        alike = (
            tuple(shown.items()),
            scale,
            gradient,
            (values["heads"], values["kv_heads"], values["queries"], get("of_queries"), get("keys")),
            (values["own_scores"], get("score"), get("normalizer"), values["derivable"]),
            (get("edits"), get("own_by_edits")),
        )
        if alike in self._sound:
            return
        wrong = problem(values, shown, scale, gradient) or self._unknown(shown)
        if wrong is not None:
            raise ValueError(f"{where}: {wrong}")
        self._sound.add(alike)

    def _unknown(self, names: Iterable[str]) -> str | None:
        """A field that has no name of ours, and that the selection has not either; None: there is none."""
        if self._captured is None or self._newer:
            return None
        for name in names:
            plain = name.partition("(")[0]
            if name in FIELD_SPECS or spec_of(name) is not None:
                continue
            # A statistic of somebody's own: some of its fields may have more to their names.
            if not any(plain.startswith(x.partition("(")[0]) for x in self._captured):
                return f"{name[:80]!r} is no field, and nothing of that name was captured"
        return None


def _shown(entry: Entry | None) -> Shown | None:
    return None if entry is None else (entry.dtype, entry.shape)


def _certificate_of(where: str, entry: dict[str, Any]) -> Certificate:
    made = Certificate(**from_entry(CERTIFICATE, where, entry))
    if made.rows > made.of_rows:
        raise ValueError(f"{where}: 'rows' is {made.rows} of {made.of_rows}")
    if made.status == "faithful" and not made.output_error <= made.tolerance:
        raise ValueError(f"{where}: 'status' is 'faithful', and the error is {made.output_error} of {made.tolerance}")
    return made


def _shard_of(where: str, entry: dict[str, Any]) -> Shard:
    values = from_entry(SHARD, where, entry)
    try:
        return Shard(**values)
    except InputError as error:
        raise ValueError(f"{where}: {error}") from None


def _scale_of(file: LazyFile, scale: Any) -> float | Tensor:
    if not isinstance(scale, dict):
        return float(scale)
    return file.checked(scale["tensor"])


def _continued(field: str, link: dict[str, Any], before: list[Call]) -> Continued:
    """The step of a history that a field is which goes on from that of a call before it.

    Raises:
        ValueError: there is no such field, or it does not go on from it; says why.
    """
    number = link.pop("continues")
    if not 0 <= number < len(before):
        raise ValueError(f"'continues' is {number}, expected the number of a call before it")
    earlier = before[number].fields.get(field)
    if isinstance(earlier, InFile):
        earlier = before[number].fields[field] = Continued(StoredHistory(earlier.file, earlier.name), 0)
    if not isinstance(earlier, Continued):
        raise ValueError(f"call {number} has no {field}")
    history = earlier.history
    assert isinstance(history, StoredHistory)
    if earlier.step != len(history) - 1:
        raise ValueError(f"another call continues that of call {number} already")
    history.add(**link)
    return Continued(history, len(history) - 1)
