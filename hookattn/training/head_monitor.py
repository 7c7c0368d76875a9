"""Measures of all heads on fixed prompts, at any moment of a training; knows of no trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import api, checks
from ..attention.kernel_call import SOURCES
from ..errors import HookattnError, InputError, MeasureError, MonitorWarning
from ..models.discovery import make_watch_plan
from . import ranks
from .history import History, set_aside
from .prompts import Prompts, prompts_of
from .scalars import check_followed, followed, scalars_of
from .undisturbed import undisturbed

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..analyze.measures.base import Measure
    from ..traces import Trace

MEASURES = ("entropy", "induction", "first_token", "sink")
"""What is measured by default: how spread out, who copies, how much rests on the first token, and on how many prompts
so much that it is a sink."""


class HeadMonitor:
    """Measures every head of a model on the same prompts, and keeps what it measured as one table.

    A measurement is a forward of the model in evaluation mode, without gradients, and changes nothing that the training
    depends on: see :func:`hookattn.training.undisturbed.undisturbed`. Of processes that each have the whole model the
    first one measures alone. Where the model is sharded over them all run the forward, and all have the whole table.

    Args:
        prompts: texts, or inputs as :func:`hookattn.trace` takes them (tensors are moved to where the model is).
        measures: names or objects of :mod:`hookattn.analyze`.
        every: measure after so many optimizer steps; None: whenever the trainer evaluates.
        tokenizer: of the model, for prompts that are texts.
        tokens: of prompts that are inputs: strings, one list for all or one each. By default those that a BatchEncoding
            has, or the ids.
        follow: heads that get curves of their own: pairs (layer, head), or ``"all"``.
        picture: whether layers × heads are drawn at each measurement, for loggers that take pictures.
        to: the table's file, ``.parquet`` or ``.csv``, written anew after each measurement; None: a callback's own
            choice, or none.
        strict: raise what goes wrong after the first measurement; else it is told once, by a MonitorWarning, and the
            training goes on.

    Raises:
        InputError, SelectionError: one of these is something else, ``every`` is below 1, or there is no such measure.
    """

    def __init__(
        self,
        prompts: Any,
        *,
        measures: str | Measure | Iterable[str | Measure] = MEASURES,
        every: int | None = 100,
        tokenizer: Callable[..., Any] | None = None,
        tokens: Any = None,
        follow: Any = (),
        picture: bool = True,
        to: str | os.PathLike[str] | None = None,
        strict: bool = False,
    ) -> None:
        from ..analyze.registry import capture, resolve

        self.last = -1
        """The step of the last measurement, in any process; −1 before the first."""
        self.every = None if every is None else checks.whole("every", every, 1)
        self.measures = resolve(measures)
        self.follow = followed(follow)
        self.picture, self.strict = checks.flag("picture", picture), checks.flag("strict", strict)
        self.to = None if to is None else Path(checks.path("to", to))
        if self.to is not None and self.to.is_dir():
            raise checks.wrong("to", to, "the path of a file, and this is a folder")
        self._prompts = prompts_of(prompts, tokenizer, tokens)
        # With what weights follow from, they are derived of one call at a time, when it is measured.
        self._capture = tuple(dict.fromkeys((*capture(*self.measures), *SOURCES)))
        self._history = History({m.key: m.unit for m in self.measures})

    # Measuring

    def measure(self, model: nn.Module, step: int, *, device: torch.device | None = None) -> DataFrame | None:
        """Measure all heads now. What is returned is also put into :attr:`history`, in place of an earlier measurement
        of the same step.

        Args:
            model: as it is trained; what replicates or compiles it may be around it.
            step: how many optimizer steps it has made.
            device: where the prompts go; None: where the model's parameters are.

        Returns:
            A table with a row for each head: ``step``, ``call``, ``stack``, ``kind``, ``layer``, ``path``, ``head`` and
            a column for each measure: the mean over the prompts that it is defined for, each weighing the same, NaN
            where there is none. None: another process measures.

        Raises:
            InputError: the model does not take the prompts. A lack of memory is raised as it is.
            MeasureError: a measure is defined for no head; says why.
        """
        if not isinstance(model, nn.Module):
            make_watch_plan(model)  # says what is wrong with it
        step = checks.whole("step", step, 0)
        if device is not None:
            checks.one_of("device", device, torch.device, "a torch.device, or None")
        inner = ranks.unwrapped(model)
        self.last = step
        if not ranks.takes_part(inner):
            return None
        if device is None:
            device = next((p.device for p in inner.parameters()), None)
        with undisturbed(inner):
            table = self._measured(inner, device)
        table.insert(0, "step", step)
        table.attrs["units"] = {m.key: m.unit for m in self.measures}
        self._history.add(table)
        if self.to is not None and ranks.rank() == 0:
            self._history.write(self.to)
        return table

    def due(self, step: int) -> bool:
        """Whether a multiple of ``every`` was reached since the last measurement.

        Raises:
            SelectionError: ``step`` is no number of a step.
        """
        step = checks.whole("step", step, 0)
        return self.every is not None and step // self.every > max(self.last, 0) // self.every

    def scalars(self, table: DataFrame) -> dict[str, float]:
        """The numbers of a measurement that a logger gets, by name: see
        :func:`hookattn.training.scalars.scalars_of`.

        Raises:
            InputError: ``table`` is none of :meth:`measure`.
        """
        places = getattr(table, "columns", None)
        keys = [m.key for m in self.measures]
        if places is None or not {*ranks.PLACE, *keys} <= {*places}:
            raise checks.wrong("table", table, "what HeadMonitor.measure returned")
        return scalars_of(table, keys, self.follow)

    def _measured(self, model: nn.Module, device: torch.device | None) -> DataFrame:
        if not ranks.is_sharded(model):
            return self._table(model, device)[0]
        try:
            found, sharded = self._table(model, device)
        except Exception as error:  # noqa: BLE001 - the others wait for what this process has to say
            return ranks.gathered(error, False)
        return ranks.gathered(found, sharded)

    def _table(self, model: nn.Module, device: torch.device | None) -> tuple[DataFrame, bool]:
        """Of what this process has of the model, and whether that is a part of its heads."""
        import pandas as pd

        frames, sharded, why = [], False, dict[str, str]()
        for prompts in self._prompts:
            trace = self._traced(model, prompts, device)
            sharded = ranks.shards_of(trace) or sharded
            frames += self._by_prompt(trace, why)
        keys = [m.key for m in self.measures]
        table = pd.concat(frames, ignore_index=True)
        made: DataFrame = table.groupby(list(ranks.PLACE), dropna=False, sort=False)[keys].mean().reset_index()
        empty = [key for key in keys if made[key].isna().all()]
        if empty:
            hint = " Give prompts in which tokens come twice, as hookattn.training.repeated_tokens makes them."
            raise MeasureError(
                f"{empty[0]} is defined for no head on these prompts: "
                f"{why.get(empty[0], 'no query that it is defined for')}."
                + (hint if empty[0] in ("induction", "duplicate_token") and empty[0] not in why else "")
            )
        return made, sharded

    def _traced(self, model: nn.Module, prompts: Prompts, device: torch.device | None) -> Trace:
        try:
            return api.trace(model, prompts.on(device), capture=self._capture, tokens=prompts.tokens)
        except (HookattnError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise InputError(f"the model does not take the prompts: {type(error).__name__}: {first}") from error

    def _by_prompt(self, trace: Trace, why: dict[str, str]) -> list[DataFrame]:
        from ..analyze.frame import table_of, views
        from ..analyze.table import reading_columns, readings

        return [
            table_of(reading_columns(view, readings(view, self.measures, missing=True, why=why), "example"))
            for view in views(trace)
        ]

    # What was measured

    @property
    def history(self) -> DataFrame:
        """All measurements, in the order of their steps: the columns of :meth:`measure`."""
        return self._history.table()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the history, as Parquet, or as CSV where the name ends in ``.csv``.

        Returns:
            The path.

        Raises:
            TraceWriteError: it cannot be written; what was there is as it was.
        """
        found = Path(checks.path("path", path))
        self._history.write(found)
        return found

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take a history that was saved in place of what there is.

        Raises:
            InputError: the file cannot be read, or is of other measures.
        """
        self._history.read(Path(checks.path("path", path)))

    def begin(self, model: nn.Module, step: int, *, device: torch.device | None = None) -> DataFrame | None:
        """Measure for the first time in a training, or where it goes on.

        With ``to``, what its file has up to this step is gone on from. What was measured after the checkpoint from
        which the training goes on is dropped, since it will be measured again. Where a training begins anew (``step``
        0), a file of an earlier one gets another name, and a MonitorWarning says which.

        Args, Returns: as of :meth:`measure`.

        Raises:
            HookattnError: whatever is wrong with the prompts, the measures, ``follow`` or the file, so that a training
                fails before it begins, if it does.
        """
        self._history.drop_after(step)
        if self.to is not None and self.to.exists() and ranks.rank() == 0:
            if step > 0 and not self._history.steps:
                self._history.read(self.to)
                self._history.drop_after(step)
            elif step == 0:
                other = set_aside(self.to)
                warnings.warn(f"{self.to} is of an earlier training, and is called {other} now", MonitorWarning, 3)
        table = self.measure(model, step, device=device)
        if table is not None:
            check_followed(table, self.follow)
        return table

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain data."""
        return {"history": self._history.to_columns()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            InputError: it is none, or of other measures.
        """
        if not isinstance(state, dict) or not isinstance(state.get("history"), dict):
            raise checks.wrong("state", state, "what HeadMonitor.state() gave")
        self._history.from_columns(state["history"])
