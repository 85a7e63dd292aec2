"""A progress bar redrawn by the clock, and one line a validation for the log."""

import logging
import time

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from src.core.errors import UserError
from src.training.callbacks.budget import planned_steps
from src.training.module import TrainingModule

__all__ = ["EpochProgress"]

log = logging.getLogger(__name__)


class EpochProgress(ProgressBar):
    """One bar over all steps of the training, redrawn a few times a second whatever the length of a step.

    Redrawing after every step costs more than a step of a small model. Where the output is no terminal there is no bar,
    only the line for each validation.

    Args:
        console: where the bar is drawn.
        redraws_per_second: upper limit of the redrawing.
    """

    def __init__(self, console: Console, redraws_per_second: float) -> None:
        super().__init__()
        if not redraws_per_second > 0:
            raise UserError(f"callback.progress.redraws_per_second={redraws_per_second} must be more than 0")
        self._console = console
        self._interval_s = 1 / redraws_per_second
        self._is_enabled = console.is_terminal
        self._next_redraw = 0.0
        self._bar: Progress | None = None
        self._last_time, self._last_step = 0.0, 0

    def disable(self) -> None:
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._last_time, self._last_step = time.perf_counter(), pl_module.step
        if not self._is_enabled or not trainer.is_global_zero:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task("training", total=planned_steps(trainer), completed=pl_module.step, numbers="")
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        if self._bar is None or (now := time.monotonic()) < self._next_redraw:
            return
        self._next_redraw = now + self._interval_s
        numbers = "  ".join(f"{name} {number:.4g}" for name, number in pl_module.last_numbers.items())
        description = f"epoch {trainer.current_epoch + 1}"
        self._bar.update(self._task, completed=pl_module.step, description=description, numbers=numbers, refresh=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        rate = (pl_module.step - self._last_step) / (now - self._last_time)
        self._last_time, self._last_step = now, pl_module.step
        numbers = "  ".join(f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items())
        log.info(f"epoch {trainer.current_epoch + 1}  step {pl_module.step}  {rate:.0f} steps/s  {numbers}")

    def on_train_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: TrainingModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
