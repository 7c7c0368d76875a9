"""A monitor in a training of Lightning, by either of the names that it is installed under."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from torch import nn

from .. import checks
from ..errors import InputError
from .head_monitor import HeadMonitor
from .ranks import is_sharded
from .running import Output, Running

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """The class of callbacks, of each Lightning that the process has; of the first that is installed, if it has none.

    Both names have a class of their own, and a trainer takes its own alone.
    """
    loaded: list[Any] = [sys.modules[name] for name in _NAMES if name in sys.modules]
    if not loaded:
        try:
            loaded = [import_module(_NAMES[0])]
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "lightning":
                raise
            try:
                loaded = [import_module(_NAMES[1])]
            except ModuleNotFoundError:
                raise error from None
    return tuple(module.Callback for module in loaded)


class LightningHeadMonitor(*_bases()):  # type: ignore[misc]
    """Measures heads in a training of Lightning, and logs them with all loggers of its trainer.

    ::

        monitor = HeadMonitor(texts, tokenizer=tokenizer, every=500)
        Trainer(callbacks=[LightningHeadMonitor(monitor)], logger=…).fit(module, data)

    It measures before the first step, after every ``every`` steps of the optimizer, and after the last; with
    ``every=None`` after each validation. All loggers get the numbers; TensorBoard, Weights & Biases and others that
    take pictures get the atlas. What was measured is in the checkpoints, and goes on when one is resumed.

    Args:
        monitor: what is measured, and when.
        part: the name of the module in the LightningModule that takes the prompts, as ``"model"``; None: itself, by its
            ``forward``.

    Raises:
        InputError: an argument is of another kind.
    """

    def __init__(self, monitor: HeadMonitor, part: str | None = None) -> None:
        super().__init__()
        self.monitor = checks.one_of("monitor", monitor, HeadMonitor, "a hookattn.training.HeadMonitor")
        self.part = None if part is None else checks.text("part", part)
        self._running = Running(monitor)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The first measurement, which raises what is wrong."""
        self._running = Running(self.monitor)
        self._run(self._running.begin, trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """A measurement, where one is due: batches that are accumulated are one step of the optimizer."""
        if self.monitor.due(trainer.global_step):
            self._run(self._running.measure, trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A measurement after each validation, where there is no other plan."""
        if self.monitor.every is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._run(self._running.measure, trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """A measurement of the last step, if it was not measured."""
        if trainer.global_step > self.monitor.last:
            self._run(self._running.measure, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The history, for a checkpoint."""
        return self.monitor.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from that of a checkpoint.

        Raises:
            InputError: it is of other measures.
        """
        self.monitor.restore(state_dict)

    def _run(self, measure: Any, trainer: Any, pl_module: Any) -> None:
        outputs: Sequence[Output] = [_Logger(own) for own in trainer.loggers] if trainer.is_global_zero else ()
        precision = getattr(trainer, "precision_plugin", None)
        with precision.forward_context() if precision is not None else nullcontext():
            measure(self._model(trainer, pl_module), trainer.global_step, outputs, pl_module.device)

    def _model(self, trainer: Any, pl_module: Any) -> nn.Module:
        """What takes the prompts.

        Raises:
            InputError: there is no such part, or the module has no forward of its own.
        """
        if self.part is not None:
            found: nn.Module | None = dict(pl_module.named_modules()).get(self.part)
            if found is None:
                children = ", ".join(name for name, _ in pl_module.named_children())
                raise InputError(
                    f"part={self.part!r}: {type(pl_module).__name__} has no such module; it has {children}."
                )
            return found
        if type(pl_module).forward is _base_forward(type(pl_module)):
            children = ", ".join(repr(name) for name, _ in pl_module.named_children())
            raise InputError(
                f"{type(pl_module).__name__} has no forward that takes the prompts: say which part of it does, with "
                f"part= one of {children or 'its modules'}."
            )
        # Where the whole is sharded, its wrapper gathers the parameters.
        whole = getattr(trainer.strategy, "model", None)
        own: nn.Module = pl_module
        return whole if isinstance(whole, nn.Module) and is_sharded(whole) else own


def _base_forward(kind: type) -> Any:
    """The forward of Lightning's own module, which runs nothing."""
    own = next((base for base in kind.__mro__ if base.__name__ == "LightningModule"), nn.Module)
    return getattr(own, "forward", None)


class _Logger:
    """A logger of Lightning.

    Args:
        logger: of a trainer.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    @property
    def name(self) -> str:
        """See :class:`Output`."""
        return type(self._logger).__name__

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See :class:`Output`."""
        self._logger.log_metrics(dict(values), step=step)

    def picture(self, name: str, pixels: Any, step: int) -> bool:
        """See :class:`Output`."""
        if callable(getattr(self._logger, "log_image", None)):
            self._logger.log_image(name, [pixels], step)
        elif callable(getattr(self._logger.experiment, "add_image", None)):
            self._logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        else:
            return False
        return True
