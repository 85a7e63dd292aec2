"""Training by the gradient of one loss."""

from collections.abc import Callable, Iterable
from typing import cast

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import FollowsTraining
from src.core.rng import SampleNoise
from src.training.module import TrainingModule
from src.training.planned import say_if_schedule_does_not_fit
from src.training.schedules import Schedule

__all__ = ["GradientTraining"]


class GradientTraining(TrainingModule):
    """Drives a `Trainable`.

    Args:
        model: the model.
        optimizer: called with the parameters.
        schedule: what changes in the course of the training.
        seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm, accumulate_batches: see `TrainingModule`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Schedule,
        seed: int,
        log_every_n_steps: int,
        ema_half_life_examples: float | None,
        gradient_clip_norm: float | None,
        accumulate_batches: int,
    ) -> None:
        super().__init__(
            model, model, seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm, accumulate_batches
        )
        if schedule.ends.get("penalty", 1.0) != 1:
            raise UserError(
                "training.schedule.penalty_factor is of the penalties of adversarial training; set it to 1.0, or choose "
                "another schedule@training.schedule="
            )
        self._make_optimizer = optimizer
        self._schedule = schedule

    def on_train_start(self) -> None:
        super().on_train_start()
        say_if_schedule_does_not_fit(self._schedule, self)

    def configure_optimizers(self) -> Optimizer:
        optimizer = self._built(self._make_optimizer, self.model)
        self._schedule.remember(optimizer)
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if isinstance(self.model, FollowsTraining):
            self.model.follow(self.examples_seen)
        optimizer = cast(LightningOptimizer, self.optimizers())
        self._schedule.apply(optimizer.optimizer, self.examples_seen)
        loss, numbers = self._reduce(self.model.loss(batch, generator=self._noise))
        self._descend(optimizer, loss, self.place_in_round)
        self._count_batch(batch, numbers)

    def _validate(self, batch: Batch, noise: SampleNoise) -> None:
        self._reduce_val(self.model.loss(batch, generator=noise))
