"""A monitor in the Trainer of transformers, and in those that are made of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import PrinterCallback

from .. import checks
from ..errors import InputError
from .head_monitor import HeadMonitor
from .running import Output, Running

FILE = "heads.parquet"
"""The table's file in the trainer's ``output_dir``, where the monitor has no other."""


class TrainerHeadMonitor(TrainerCallback):  # type: ignore[misc]
    """Measures heads in a training of transformers' ``Trainer``, and logs them where ``report_to`` says.

    ::

        monitor = HeadMonitor(texts, tokenizer=tokenizer, every=500)
        TrainerHeadMonitor(monitor).add_to(trainer)
        trainer.train()

    It measures before the first step, after every ``every`` steps of the optimizer, and after the last; with
    ``every=None`` whenever the trainer has evaluated. Numbers go to what ``trainer.log`` reports to, TensorBoard and
    Weights & Biases among them, and not to the progress bar; these two get the picture, too. The table is in
    ``heads.parquet`` in the ``output_dir``, and goes on when the training is resumed from a checkpoint.

    Args:
        monitor: what is measured, and when.

    Raises:
        InputError: it is no HeadMonitor.
    """

    def __init__(self, monitor: HeadMonitor) -> None:
        self.monitor = checks.one_of("monitor", monitor, HeadMonitor, "a hookattn.training.HeadMonitor")
        self._running = Running(monitor)
        self._trainer: Any = None

    def add_to(self, trainer: Any) -> TrainerHeadMonitor:
        """Add it to a trainer.

        Returns:
            Itself.

        Raises:
            InputError: ``trainer`` is none.
        """
        self._trainer = checks.one_of("trainer", trainer, Trainer, "a transformers.Trainer")
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The first measurement, which raises what is wrong."""
        if self._trainer is None:
            raise InputError(
                "a callback is not told whose it is, and logs by its trainer: instead of callbacks=[…], call "
                "TrainerHeadMonitor(monitor).add_to(trainer)."
            )
        self._running = Running(self.monitor)
        if self.monitor.to is None:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.monitor.to = Path(args.output_dir) / FILE
        self._running.begin(model, state.global_step, self._outputs(state), args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """A measurement where one is due; and of the last step, as the loggers are closed after it."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if self.monitor.due(state.global_step) or last:
            self._running.measure(model, state.global_step, self._outputs(state), args.device)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """A measurement at each evaluation, where there is no other plan."""
        if self.monitor.every is None and self._trainer.is_in_train:
            self._running.measure(model, state.global_step, self._outputs(state), args.device)

    def _outputs(self, state: Any) -> Sequence[Output]:
        if not state.is_world_process_zero:
            return ()
        # What prints would print hundreds of numbers.
        notebook = getattr(sys.modules.get("transformers.utils.notebook"), "NotebookProgressCallback", PrinterCallback)
        prints = (ProgressCallback, PrinterCallback, notebook, TrainerHeadMonitor)
        others = [own for own in self._trainer.callback_handler.callbacks if not isinstance(own, prints)]
        return [_Reporter(own, self._trainer) for own in others if type(own).on_log is not TrainerCallback.on_log]


class _Reporter:
    """A callback that logs: it is told what ``trainer.log`` would tell it.

    Args:
        callback: of the trainer.
        trainer: whose it is.
    """

    def __init__(self, callback: Any, trainer: Any) -> None:
        self._callback, self._trainer = callback, trainer

    @property
    def name(self) -> str:
        """See :class:`Output`."""
        return type(self._callback).__name__

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See :class:`Output`."""
        trainer = self._trainer
        control = self._callback.on_log(
            trainer.args, trainer.state, trainer.control, logs=dict(values), model=trainer.model
        )
        trainer.control = control or trainer.control

    def picture(self, name: str, pixels: Any, step: int) -> bool:
        """See :class:`Output`. Pictures are called as these callbacks call numbers."""
        writer: Any
        wandb: Any
        writer, wandb = getattr(self._callback, "tb_writer", None), getattr(self._callback, "_wandb", None)
        if hasattr(writer, "add_image"):
            writer.add_image(f"train/{name}", pixels, step, dataformats="HWC")
        elif hasattr(wandb, "Image") and wandb.run is not None:
            wandb.log({f"train/{name}": wandb.Image(pixels), "train/global_step": step})
        else:  # one of the user's own may well want numbers alone
            return not isinstance(self._callback, tuple(INTEGRATION_TO_CALLBACK.values()))
        return True
