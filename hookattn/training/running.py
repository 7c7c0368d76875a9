"""What the callback of any trainer does: measure when it is time, hand that on, and never end a training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..errors import MonitorWarning
from ..optional import extra_named
from .head_monitor import HeadMonitor
from .scalars import PREFIX
from .undisturbed import random_numbers_kept

if TYPE_CHECKING:
    from pandas import DataFrame

PICTURE = f"{PREFIX}/atlas"
"""What the picture is called in a logger."""


class Output(Protocol):
    """One logger of a training."""

    @property
    def name(self) -> str:
        """Of the logger, for messages."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""

    def picture(self, name: str, pixels: Any, step: int) -> bool:
        """Log a picture, uint8, height × width × 3; False: this logger takes none."""


class Running:
    """A monitor in a training that runs.

    Args:
        monitor: what is measured, and when.
    """

    def __init__(self, monitor: HeadMonitor) -> None:
        self.monitor = monitor
        self._told: set[str] = set()

    def begin(self, model: nn.Module, step: int, outputs: Sequence[Output], device: torch.device | None) -> None:
        """The first measurement of a training, or of its continuation: what is wrong is raised.

        Args:
            model: as it is trained.
            step: from which it goes on.
            outputs: the loggers of this process.
            device: where prompts go.
        """
        table = self.monitor.begin(model, step, device=device)
        if table is not None:
            with random_numbers_kept(model):
                self._log(table, outputs, step, lambda _, error: _raise(error))

    def measure(self, model: nn.Module, step: int, outputs: Sequence[Output], device: torch.device | None) -> None:
        """A later one: what goes wrong is a MonitorWarning, once; or is raised, if the monitor is strict.

        Args: as of :meth:`begin`.
        """
        try:
            table = self.monitor.measure(model, step, device=device)
        except Exception as error:  # noqa: BLE001 - whatever it is, a training of days does not end by it
            self._tell(f"heads were not measured at step {step}", error)
            return
        if table is not None:
            with random_numbers_kept(model):
                self._log(table, outputs, step, lambda name, error: self._tell(f"{name} at step {step}", error))

    def _log(
        self, table: DataFrame, outputs: Sequence[Output], step: int, failed: Callable[[str, Exception], None]
    ) -> None:
        values = self.monitor.scalars(table)
        for output in outputs:
            try:
                output.scalars(values, step)
            except Exception as error:  # noqa: BLE001 - as above
                failed(f"{output.name} did not take the measures of heads", error)
        if not self.monitor.picture or not outputs:
            return
        try:
            pixels = self._pixels(table, step)
        except Exception as error:  # noqa: BLE001 - as above
            failed("the picture of heads was not drawn", error)
            return
        for output in outputs:
            try:
                if not output.picture(PICTURE, pixels, step):
                    self._say(
                        f"{output.name} takes no pictures of heads, and gets their numbers alone; "
                        "picture=False asks for none"
                    )
            except Exception as error:  # noqa: BLE001 - as above
                failed(f"{output.name} did not take the picture of heads", error)

    def _pixels(self, table: DataFrame, step: int) -> Any:
        """The atlas of a measurement: uint8, height × width × 3. Its colours end where those of earlier ones do."""
        with extra_named():
            from ..render.figures.atlas_figure import atlas
            from ..render.figures.base import pixels_of

        past = self.monitor.history
        keys = [m.key for m in self.monitor.measures if m.unit not in ("share", "correlation")]
        most = {key: float(past[key].abs().max()) for key in keys}
        ends = {key: end for key, end in most.items() if 0 < end < float("inf")}
        figure = atlas(table, [m.key for m in self.monitor.measures], title=f"step {step}", largest=ends)
        return pixels_of(figure)

    def _tell(self, what: str, error: Exception) -> None:
        if self.monitor.strict:
            raise error
        kind = f"{what.partition(' at step')[0]}: {type(error).__name__}"
        self._say(f"{what}: {type(error).__name__}: {error}. The training goes on, and the next one is tried", kind)

    def _say(self, text: str, kind: str | None = None) -> None:
        """Once in a training."""
        if (kind or text) not in self._told:
            self._told.add(kind or text)
            warnings.warn(f"{text}.", MonitorWarning, stacklevel=2)


def _raise(error: Exception) -> None:
    raise error
