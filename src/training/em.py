"""Training by expectation maximization: statistics of batches are added up, and an M step sets all parameters at once.

The M step follows the last batch of every epoch, or every batch if the model asks for that. A training that ends within an
epoch (trainer.max_steps) has an M step there, from the share of the epoch that was seen. Every rank adds up its own
batches; the sums over all ranks are what a single one would have, and all ranks take the same M step.

The statistics of an epoch that is begun are in its checkpoints: the sum over all ranks, which the first one goes on with.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.collectives import own_rank, sum_over_ranks
from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.training.callbacks.budget import planned_steps
from src.training.module import TrainingModule

__all__ = ["ExpectationMaximizationTraining"]


class ExpectationMaximizationTraining(TrainingModule):
    """Drives an `ExpectationMaximization`. There is no optimizer, and no averaged weights.

    Args:
        model: the model.
        seed, log_every_n_steps: see `TrainingModule`.
    """

    batches_added: Tensor  # since the last M step

    def __init__(self, model: nn.Module, seed: int, log_every_n_steps: int) -> None:
        super().__init__(
            model,
            model,
            seed,
            log_every_n_steps,
            ema_half_life_examples=None,
            gradient_clip_norm=None,
            accumulate_batches=1,
        )
        self.register_buffer("batches_added", torch.zeros((), dtype=torch.int64))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if str(self.trainer.precision) != "32-true":
            raise UserError(
                f"trainer.precision={self.trainer.precision} saves nothing in expectation maximization, which has no "
                "gradients and adds up in float64 (set trainer.precision=32-true)"
            )
        if self.trainer.strategy.root_device.type == "mps":
            raise UserError(
                "expectation maximization needs float64, which Apple's GPU does not have (trainer.accelerator=cpu)"
            )

    def on_train_start(self) -> None:
        super().on_train_start()
        if own_rank() > 0:  # of a resumed training: the first rank has the statistics of all
            self.model.statistics.zero_()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return []

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        _, numbers = self._reduce(self.model.accumulate(batch, generator=self._noise))
        self.batches_added += 1
        is_last = self.trainer.is_last_batch or self.step + 1 == planned_steps(self.trainer)
        if is_last or self.model.maximizes_every_batch:
            self._sum_on(all_ranks=True)
            numbers |= self.model.maximize(int(self.batches_added) / int(self.trainer.num_training_batches))
            self.batches_added.zero_()
        self._count_batch(batch, numbers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._sum_on(all_ranks=False)  # in place, and the tensors of the checkpoint are the model's own
        super().on_save_checkpoint(checkpoint)

    def _validate(self, batch: Batch, noise: SampleNoise) -> None:
        self._reduce_val(self.model.negative_log_likelihood(batch, generator=noise))

    @torch.no_grad()
    def _sum_on(self, all_ranks: bool) -> None:
        """The statistics of all ranks on each of them, or on the first, where the others begin anew."""
        statistics = cast(Tensor, self.model.statistics)
        total = sum_over_ranks(statistics)
        statistics.copy_(total if all_ranks or own_rank() == 0 else torch.zeros_like(total))
