"""Checkpoints: the last one and the best one, written beside and renamed, so that a killed run keeps a whole one."""

import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L

from src.core.collectives import largest_over_ranks, meet
from src.core.errors import UserError, require_at_least
from src.core.protocols import ExpectationMaximization, Trainable
from src.training.module import TrainingModule

__all__ = ["LastAndBest"]

log = logging.getLogger(__name__)

# Ctrl-C; the end of a machine's time; Slurm's warning of it, by habit; the same, as submitit asks for it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class LastAndBest(L.Callback):
    """Writes `last.ckpt` after every validation and at the end, and `best.ckpt` when the monitored quantity falls.

    It also writes the last one as time goes by, and when the process is asked to end: by Ctrl-C, SIGTERM, SIGUSR1 or
    SIGUSR2, after the step that is running, or the last one of its round. Then the training ends, to be resumed later.
    (Lightning's own checkpoints by time never come with two optimizers.) On several devices all processes save and end
    after the same step, whichever of them was asked.

    Args:
        directory: where the checkpoints go.
        every_minutes: the longest time without one; None for no such limit.
        monitor: a quantity of the validation, the smaller the better; where the model has no such quantity (a GAN has no
            loss that falls as it gets better) there is no best checkpoint.
    """

    def __init__(self, directory: Path, monitor: str, every_minutes: float | None) -> None:
        require_at_least("callback.checkpoint.every_minutes", every_minutes, 0)
        self._directory = directory
        self._monitor = monitor
        self._every_minutes = every_minutes
        self._saved_at = time.monotonic()
        self._asked_by = 0  # the number of the signal, if there was one
        self._handlers: dict[signal.Signals, Any] = {}  # those that were there before
        self._best: float | None = None
        self._is_due = False
        self._saved_at_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._handlers = {number: signal.signal(number, self._ask) for number in _SIGNALS}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        if trainer.is_last_batch or pl_module.place_in_round:  # what follows the last batch belongs to its step
            return
        minutes = (time.monotonic() - self._saved_at) / 60
        is_time = self._every_minutes is not None and minutes >= self._every_minutes
        asked_by, is_time = self._on_any_rank(pl_module, is_time)
        if is_time or asked_by:
            self._save_last(trainer, pl_module)
            self._end_if_asked(trainer, asked_by)

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._is_due = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        asked_by, _ = self._on_any_rank(pl_module, False)
        if self._is_due:
            self._is_due = False
            self._save_validated(trainer, pl_module)
        elif asked_by:
            self._save_last(trainer, pl_module)
        self._end_if_asked(trainer, asked_by)

    def _save_validated(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        value = trainer.callback_metrics.get(self._monitor)
        if value is None and isinstance(pl_module.model, (Trainable, ExpectationMaximization)):
            self._require_known_monitor(trainer)
        if value is not None and (self._best is None or float(value) < self._best):
            self._best = float(value)
            self._save(trainer, "best.ckpt")
        self._save_last(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if self._saved_at_step != pl_module.step:
            self._save_last(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def _ask(self, number: int, frame: object) -> None:
        """Note a signal; the step that is running goes on to its end. A second Ctrl-C ends the process at once.

        (Of the others several may come together: Slurm's to all processes, and that of the one which keeps this one.)
        """
        if self._asked_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked_by = self._asked_by or number

    def _on_any_rank(self, pl_module: TrainingModule, is_time: bool) -> tuple[int, bool]:
        """The signal that one of the processes got, or 0; and whether it is time for a checkpoint on one of them."""
        both = largest_over_ranks(2 * self._asked_by + is_time, pl_module.device)
        return both // 2, bool(both % 2)

    def _end_if_asked(self, trainer: L.Trainer, asked_by: int) -> None:
        if asked_by and not trainer.should_stop:
            log.info(f"{signal.Signals(asked_by).name}: saved the last checkpoint")
            raise KeyboardInterrupt

    def _require_known_monitor(self, trainer: L.Trainer) -> None:
        """A model with a loss has something to monitor, so another name is a mistake."""
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if known:
            allowed = ", ".join(known)
            raise UserError(f"callback.checkpoint.monitor={self._monitor} is not measured; allowed: {allowed}")

    def _save_last(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._save(trainer, "last.ckpt")
        self._saved_at_step = pl_module.step
        self._saved_at = time.monotonic()

    def _save(self, trainer: L.Trainer, name: str) -> None:
        unfinished = self._directory / f"{name}.unfinished"
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(self._directory / name)
        meet()
