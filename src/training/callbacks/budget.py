"""A budget in steps, where one step is one batch, with two optimizers as with one."""

import lightning as L

from src.core.errors import UserError
from src.training.module import TrainingModule

__all__ = ["StepBudget", "planned_steps"]


class StepBudget(L.Callback):
    """Ends the training after `max_steps` batches. (Lightning's own `max_steps` counts optimizer steps.)"""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def setup(self, trainer: L.Trainer, pl_module: TrainingModule, stage: str) -> None:
        if self.max_steps % pl_module.accumulate_batches:
            raise UserError(
                f"trainer.max_steps={self.max_steps} counts batches and must be a multiple of training.accumulate_batches="
                f"{pl_module.accumulate_batches}"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if pl_module.step >= self.max_steps:  # resumed behind its last step
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        if pl_module.step >= self.max_steps:
            trainer.should_stop = True


def planned_steps(trainer: L.Trainer) -> int | None:
    """Batches until the first limit of the training; None if it has none."""
    limits = [callback.max_steps for callback in trainer.callbacks if isinstance(callback, StepBudget)]
    if trainer.max_epochs != -1:
        limits.append(int(trainer.num_training_batches) * trainer.max_epochs)
    return min(limits, default=None)
