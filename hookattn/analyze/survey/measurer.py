"""From a chunk of examples to a part of the table: the same bits, whichever process measures it."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import api, checks
from ...attention.kernel_call import DERIVED, SOURCES
from ...errors import HookattnError, InputError, ModelError
from ...models.wrappers import inside_all, own_class
from ...torch_internals.devices import name_of
from ..call_view import View
from ..measures.base import Measure
from ..reading import Reading
from ..registry import capture as capture_of
from ..registry import resolve
from ..table import readings
from .batches import Batch, Encode, Value
from .columns import examples_in, measured_rows

if TYPE_CHECKING:
    from pyarrow import Schema, Table

    from ...calls.call import Call
    from ...traces import Trace

ON_ERROR = ("raise", "record")
Built = tuple[nn.Module, Encode]
Build = str | Callable[[], Built]

_NAMED = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_FAILED, _MADE_BY = b"hookattn_failed", b"hookattn_made_by"
_LONGEST = 300  # characters that are kept of an example's error


@dataclass(frozen=True)
class Failure:
    """An example that could not be measured.

    Attributes:
        example: its number in the corpus, from 0.
        error: what was raised, in one line.
    """

    example: int
    error: str


class Measurer:
    """Measures chunks of examples, in any process: it is pickled as how to build the model, and not as the model.

    Args:
        build: what makes ``(model, encode)``, as :func:`survey` takes these: ``module:function``, or a function of no
            argument that can be pickled. It is called in the process that measures, once, before its first chunk.
        measures: names or objects.
        on_error: of an example that the model, or ``encode``, does not take: ``raise``, or ``record``, which keeps the
            error in the table's metadata (:func:`failures_of`) and measures the others of the chunk one by one.

    Raises:
        InputError: one of these is something else. MeasureError: there is no such measure.
    """

    def __init__(
        self, build: Build, measures: str | Measure | Iterable[str | Measure], on_error: str = "raise"
    ) -> None:
        expected = "module:function, or a function that gives (model, encode)"
        if not isinstance(build, str):
            checks.function("build", build, expected)
        elif _NAMED.fullmatch(build) is None:
            raise checks.wrong("build", build, expected)
        self.build = build
        self.measures = resolve(measures)
        self.on_error = checks.word("on_error", on_error, ON_ERROR)
        self._built: Built | None = None
        self._capture = _Capture(self.measures)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        encode: Encode,
        measures: str | Measure | Iterable[str | Measure],
        on_error: str = "raise",
    ) -> Measurer:
        """One for this process, of a model that is here; it cannot be pickled."""
        return cls(lambda: (model, encode), measures, on_error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}

    def load(self) -> nn.Module:
        """The model, built if it is not yet.

        Raises:
            ModelError: it cannot be built.
        """
        if self._built is None:
            self._built = _built(self.build)
        return self._built[0]

    @property
    def model_class(self) -> str:
        """The name of the model's own class, whatever is wrapped around it.

        Raises: as :meth:`load`.
        """
        return own_class(inside_all(self.load())).__name__

    def __call__(self, columns: Any) -> Any:
        """A batch of somebody's own pipeline: ``ds.map_batches(Measurer, fn_constructor_args=(build, measures))``.

        Args:
            columns: with the examples in ``text`` or ``input_ids``, as arrays by name or as a Table of pyarrow.

        Returns:
            Of the same kind, one row for each example, head and measure: the batch's other columns, such as the name of
            a document, and ``stack``, ``kind``, ``layer``, ``path``, ``step``, ``head``, ``measure``, ``value``. With
            ``on_error="record"`` there is ``error`` too, and an example that failed has one row, with it alone.

        Raises:
            InputError: the batch has no such column; or as :meth:`part`. ModelError: as :meth:`part`.
        """
        name, values = examples_in(columns)
        made = self.part(0, 0, values) if values else schema().empty_table()
        failed = [(f.example, f.error) for f in failures_of(made)] if self.on_error == "record" else None
        return measured_rows(columns, name, made, failed)

    def part(self, number: int, first: int, values: Sequence[Value | InputError]) -> Table:
        """The part of a chunk, as one process would write it.

        Args:
            number: the chunk's, from 0.
            first: the number of its first example.
            values: its examples; an error stands for one that could not be read.

        Returns:
            Rows as :func:`survey` has them; the metadata say what measured them, and which examples failed.

        Raises:
            InputError: an example cannot be measured, and ``on_error`` is ``raise``; or examples fail together and
                not alone.
            ModelError: the model cannot be built or traced.
        """
        first = checks.whole("first", first, 0)
        self.load()
        tables: list[Table] = []
        failed: list[Failure] = []
        try:
            tables.append(self._measured(first, values))
        except Exception as error:
            if self.on_error == "raise" or _is_no_examples_fault(error):
                raise
            self._one_by_one(first, values, error, tables, failed)
        return self._part(tables, failed)

    def _one_by_one(
        self,
        first: int,
        values: Sequence[Value | InputError],
        together: Exception,
        tables: list[Table],
        failed: list[Failure],
    ) -> None:
        """What can be measured of a chunk that failed as a whole."""
        if len(values) == 1:
            failed.append(Failure(first, _told(together)))
            return
        for example, value in enumerate(values, first):
            try:
                tables.append(self._measured(example, [value]))
            except Exception as error:
                if _is_no_examples_fault(error):
                    raise
                failed.append(Failure(example, _told(error)))
        if not failed:
            # Else the table would depend on what a machine had room for at that moment.
            raise InputError(
                f"the examples {first} to {first + len(values) - 1} fail together and not alone: "
                f"{sentence(_told(together))} "
                "Choose a smaller batch."
            ) from together

    def _part(self, tables: Sequence[Table], failed: Sequence[Failure]) -> Table:
        import pyarrow as pa

        table = pa.concat_tables(tables) if tables else schema().empty_table()
        metadata = {_MADE_BY: json.dumps(_machine(self.load())).encode()}
        if failed:
            metadata[_FAILED] = json.dumps([[f.example, f.error] for f in failed]).encode()
        return table.replace_schema_metadata(metadata)

    def _measured(self, first: int, values: Sequence[Value | InputError]) -> Table:
        import pyarrow as pa

        assert self._built is not None
        model, encode = self._built
        for value in values:
            if isinstance(value, InputError):
                raise value
        tables, seen = [], first
        for batch in _encoded(encode, values, first):
            try:
                trace = self._capture.trace(model, batch)
            except HookattnError:
                raise
            except Exception as error:
                raise InputError(
                    f"the model does not take the examples {seen} to {seen + batch.count - 1}: {_told(error)}"
                ) from error
            for call in trace.calls:
                view = _padded_view(call, trace, batch.real)
                tables.append(_example_table(view, seen, batch.count, readings(view, self.measures, missing=True)))
            seen += batch.count
        if seen - first != len(values):
            raise InputError(f"encode gave {seen - first} examples for {len(values)}.")
        return pa.concat_tables(tables)


def failures_of(table: Table | Schema) -> list[Failure]:
    """The examples of a part that failed, in their order."""
    found = (getattr(table, "schema", table).metadata or {}).get(_FAILED)
    return [] if found is None else [Failure(*entry) for entry in json.loads(found)]


def made_by(table: Table | Schema) -> Any:
    """What measured a part, as plain data: torch's version and the device; None: nothing says."""
    found = (getattr(table, "schema", table).metadata or {}).get(_MADE_BY)
    return None if found is None else json.loads(found)


def schema() -> Schema:
    """The columns of a part."""
    import pyarrow as pa

    words = pa.dictionary(pa.int32(), pa.string())
    kinds = {
        "example": pa.int64(), "stack": words, "kind": words, "layer": pa.int32(), "path": words, "step": pa.int32(),
        "head": pa.int32(), "measure": words, "value": pa.float64(),
    }  # fmt: skip
    return pa.schema(list(kinds.items()))


def _built(build: Build) -> Built:
    """What a builder makes.

    Raises:
        ModelError: it is not there, fails, or makes something else.
    """
    name = build if isinstance(build, str) else getattr(build, "__qualname__", type(build).__name__)
    try:
        found: Any = (pkgutil.resolve_name(build) if isinstance(build, str) else build)()
    except HookattnError:
        raise
    except Exception as error:
        raise ModelError(f"build={name!r} cannot be called here: {_told(error)}") from error
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module) and callable(found[1])):
        raise ModelError(f"build={name!r}: expected it to return (model, encode), got {checks.printed(found)}.")
    return found[0], found[1]


def _machine(model: nn.Module) -> dict[str, str]:
    """What may decide the last bits of a value."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {"torch": torch.__version__, "device": name_of(device)}


def _is_no_examples_fault(error: Exception) -> bool:
    """Whether the model or the machine is at fault: other examples would fail as well, or this one pass later."""
    broken = (ModelError, OSError, getattr(torch, "AcceleratorError", ModelError))
    return isinstance(error, broken) or isinstance(error.__cause__, broken)


def sentence(text: str) -> str:
    """A text with a full stop."""
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."


def _told(error: BaseException) -> str:
    """An error in one line, no longer than a table of many can hold."""
    text = " ".join(str(error).partition("\n")[0].split())
    if not isinstance(error, HookattnError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _encoded(encode: Encode, values: Any, first: int) -> Sequence[Batch]:
    try:
        return checks.several("encode", encode(values), Batch, "a function that returns several Batch")
    except (HookattnError, OSError):
        raise
    except Exception as error:
        raise InputError(
            f"encode does not take the examples {first} to {first + len(values) - 1}: {_told(error)}"
        ) from error


def _padded_view(call: Call, trace: Trace, real: Tensor | None) -> View:
    """A call with its padding, where that is of its keys; else its mask has to tell."""
    view = View(call, trace)
    padding = real is not None and view.of_inputs and real.shape[1] == view.shape[3]
    return View(call, trace, real) if padding else view


class _Capture:
    """What is captured: statistics where they are enough; else what weights are derived of, one call at a time."""

    def __init__(self, measures: Sequence[Measure]) -> None:
        self.whole = capture_of(*measures)
        lean = [y for x in self.whole for y in (SOURCES if x in DERIVED else (x,))]
        self.lean = tuple(dict.fromkeys(lean))

    def trace(self, model: nn.Module, batch: Batch) -> Trace:
        """A batch, traced without gradients."""
        with torch.no_grad():
            found = api.trace(model, batch.inputs, capture=self.lean, tokens=batch.tokens)
            if self.lean == self.whole or all(c.has(x) for c in found for x in self.whole if isinstance(x, str)):
                return found
            self.lean = self.whole  # the model forms scores of its own, which cannot be derived
            return api.trace(model, batch.inputs, capture=self.lean, tokens=batch.tokens)


def _example_table(view: View, first: int, count: int, found: dict[str, Reading | None]) -> Table:
    """Example, then head, then measure."""
    import numpy as np
    import pyarrow as pa

    b, h, _, _ = view.shape
    if b != count:
        raise InputError(f"{view.where}: has {b} batch entries for {count} examples, which cannot be told apart.")
    keys, site = list(found), view.call.site
    # Columns are made of numbers and of codes into a few words, as a survey has millions of rows.
    missing = torch.full((b, h), torch.nan, dtype=torch.float64)
    values = torch.stack([missing if r is None else r.value.double().cpu() for r in found.values()], -1)
    n = values.numel()

    def same(value: Any, kind: Any) -> Any:
        return pa.array([value], kind).take(pa.array(np.zeros(n, np.int64)))

    def word(values: list[str], at: Any) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(at.astype(np.int32)), pa.array(values, pa.string()))

    zeros = np.zeros(n, np.int64)
    columns = {
        "example": pa.array(np.repeat(np.arange(first, first + b), h * len(keys))),
        "stack": word([site.stack], zeros),
        "kind": word([site.kind], zeros),
        "layer": same(site.layer, pa.int32()),
        "path": word([site.path], zeros),
        "step": same(view.call.step, pa.int32()),
        "head": pa.array(np.tile(np.repeat(np.array(view.heads, np.int32), len(keys)), b)),
        "measure": word(keys, np.tile(np.arange(len(keys)), b * h)),
        "value": pa.array(values.flatten().numpy(), from_pandas=True),
    }
    return pa.table(columns)
