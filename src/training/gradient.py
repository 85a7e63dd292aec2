"""Training by the gradient of one loss."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import FollowsTraining
from src.core.rng import SampleNoise
from src.training.module import TrainingModule
from src.training.planned import plan_schedule
from src.training.schedules import Schedule

__all__ = ["GradientTraining"]

log = logging.getLogger(__name__)


class GradientTraining(TrainingModule):
    """Drives a `Trainable`.

    Args:
        model: the model.
        optimizer: called with the parameters.
        schedule: what changes in the course of the training.
        seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm, accumulate_batches: see `TrainingModule`.
        decay_matrices_only: the optimizer's weight decay is of tensors of two dimensions and more, so neither of biases nor
            of the scales of layer norms.
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
        decay_matrices_only: bool = False,
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
        self._decay_matrices_only = decay_matrices_only

    def on_train_start(self) -> None:
        super().on_train_start()
        plan_schedule(self._schedule, self)

    def configure_optimizers(self) -> Optimizer:
        optimizer = self._built(self._make_optimizer, self.model)
        if self._decay_matrices_only:
            optimizer = self._built(lambda _: self._make_optimizer(cast(Any, _decay_groups(optimizer))), self.model)
        self._schedule.remember(optimizer)
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if isinstance(self.model, FollowsTraining):
            self.model.follow(self.examples_seen)
        optimizer = cast(LightningOptimizer, self.optimizers())
        if self.place_in_round == 0:  # an update has the rate of one large batch that begins here
            self._schedule.apply(optimizer.optimizer, self.examples_seen)
        loss, numbers = self._reduce(self.model.loss(batch, generator=self._noise))
        self._descend(optimizer, loss, self.place_in_round)
        self._count_batch(batch, numbers)

    def _validate(self, batch: Batch, noise: SampleNoise) -> None:
        self._reduce_val(self.model.loss(batch, generator=noise))

    def _log_stride(self) -> None:
        super()._log_stride()
        if self._schedule.ends:
            optimizer = cast(LightningOptimizer, self.optimizers())
            self.log_quantities({"progress/learning_rate": optimizer.param_groups[0]["lr"]})


def _decay_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The weights of an optimizer in two groups, the second one, of tensors of one dimension, without weight decay."""
    (group,) = optimizer.param_groups
    if "weight_decay" not in group:
        raise UserError(
            f"training.decay_matrices_only=true needs an optimizer with weight decay; {type(optimizer).__name__} has none"
        )
    trained = [weight for weight in group["params"] if weight.requires_grad]
    decayed = [weight for weight in trained if weight.ndim >= 2]
    others = [weight for weight in trained if weight.ndim < 2]
    size, size_of_others = (sum(weight.numel() for weight in some) for some in (decayed, others))
    log.info(
        f"weight decay {group['weight_decay']:g} on {len(decayed)} tensors of {size:,} values; none on {len(others)} of "
        f"{size_of_others:,}"
        + (f"; {num_frozen} are not trained" if (num_frozen := len(group["params"]) - len(trained)) else "")
    )
    return [{"params": some, **extra} for some, extra in ((decayed, {}), (others, {"weight_decay": 0.0})) if some]
