"""Checkpoints: the last one and the best one, written beside and renamed, so that a killed run keeps a whole one."""

from pathlib import Path
from typing import Any

import lightning as L

from src.core.errors import UserError
from src.core.protocols import Trainable
from src.training.module import TrainingModule

__all__ = ["LastAndBest"]


class LastAndBest(L.Callback):
    """Writes `last.ckpt` after every validation and at the end, and `best.ckpt` when the monitored quantity falls.

    Args:
        directory: where the checkpoints go.
        monitor: a quantity of the validation, the smaller the better; where the model has no such quantity (a GAN has no
            loss that falls as it gets better) there is no best checkpoint.
    """

    def __init__(self, directory: Path, monitor: str) -> None:
        self._directory = directory
        self._monitor = monitor
        self._best: float | None = None
        self._is_due = False
        self._saved_at_step = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._is_due = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if not self._is_due:
            return
        self._is_due = False
        value = trainer.callback_metrics.get(self._monitor)
        if value is None and isinstance(pl_module.model, Trainable):
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

    def _require_known_monitor(self, trainer: L.Trainer) -> None:
        """A model with a loss has something to monitor, so another name is a mistake."""
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if known:
            allowed = ", ".join(known)
            raise UserError(f"callback.checkpoint.monitor={self._monitor} is not measured; allowed: {allowed}")

    def _save_last(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._save(trainer, "last.ckpt")
        self._saved_at_step = pl_module.step

    def _save(self, trainer: L.Trainer, name: str) -> None:
        unfinished = self._directory / f"{name}.unfinished"
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(self._directory / name)
