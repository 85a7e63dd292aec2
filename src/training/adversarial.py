"""Training of two players, with an optimizer each, by manual optimization.

Where the gradients of several batches are accumulated, the discriminator steps after the last of them, and only then does
the generator see all of them: its gradients are those against the discriminator's new weights, as with one large batch.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from src.core.batch import Batch
from src.core.errors import UserError, require_at_least, require_number
from src.core.protocols import CanSample
from src.core.rng import SampleNoise
from src.training.batch_norm import has_batch_norm, renew_batch_norm
from src.training.meter import Meter
from src.training.module import TrainingModule
from src.training.planned import plan_schedule
from src.training.schedules import Schedule

__all__ = ["AdversarialTraining"]

_RENEWING_BATCHES = 20  # of samples, before a validation; the evaluation of a run takes more


class AdversarialTraining(TrainingModule):
    """Drives an `Adversarial` model: a discriminator step on every round, a generator step on every n_critic-th.

    A round is one batch, or accumulate_batches of them.

    Args:
        model: the model.
        generator_optimizer: called with the generator's parameters.
        discriminator_optimizer: called with the discriminator's parameters.
        n_critic: discriminator steps for each generator step.
        penalty_interval: the penalty is taken on every so manieth discriminator step, with as many times its weight.
        schedule: what changes in the course of the training.
        seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm, accumulate_batches: see `TrainingModule`;
            the averaged weights are the generator's.
    """

    def __init__(
        self,
        model: nn.Module,
        generator_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        discriminator_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        n_critic: int,
        penalty_interval: int,
        schedule: Schedule,
        seed: int,
        log_every_n_steps: int,
        ema_half_life_examples: float | None,
        gradient_clip_norm: float | None,
        accumulate_batches: int,
    ) -> None:
        generator, _ = model.players()
        super().__init__(
            model, generator, seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm, accumulate_batches
        )
        require_at_least("training.n_critic", n_critic, 1)
        self._make_optimizers = (generator_optimizer, discriminator_optimizer)
        require_number("training.penalty_interval", penalty_interval, 1)
        self._n_critic = n_critic
        self._penalty_interval = penalty_interval
        self._schedule = schedule
        self._gradient_norms: dict[str, float] = {}  # of this round, if they are wanted
        self._round: list[Batch] = []  # the batches of this round so far

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.model.refuse_training(str(self.trainer.precision), self._penalty_interval)

    def on_train_start(self) -> None:
        super().on_train_start()
        plan_schedule(self._schedule, self)

    def configure_optimizers(self) -> list[Optimizer]:
        optimizers = [
            self._built(make, player) for make, player in zip(self._make_optimizers, self.model.players(), strict=True)
        ]
        for optimizer in optimizers:
            self._schedule.remember(optimizer)
        return optimizers

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        self._round = [batch] if self.place_in_round == 0 else [*self._round, batch]
        if self.place_in_round == 0:  # an update has the rate of one large batch that begins here
            for optimizer in (generator_optimizer, discriminator_optimizer):
                self._schedule.apply(optimizer.optimizer, self.examples_seen)
        # each player's loss is computed inside its own block: the other one is frozen there when the graph is built
        with self.toggled_optimizer(discriminator_optimizer):
            terms = self.model.discriminator_loss(batch, penalty_scale=self._penalty_scale(), generator=self._noise)
            if not len(terms["loss"]):
                raise UserError(
                    f"loader.batch_size={len(batch)} is too small for a whole pack; set it to at least model.packing"
                )
            loss, numbers = self._reduce(terms, "discriminator_")
            self._descend(discriminator_optimizer, loss, self.place_in_round)
        if len(self._round) == self.accumulate_batches and (self.num_rounds + 1) % self._n_critic == 0:
            meter = Meter()
            with self.toggled_optimizer(generator_optimizer):
                for place, one in enumerate(self._round):
                    terms = self.model.generator_loss(one, generator=self._noise)
                    loss, generator_numbers = self._reduce(terms, "generator_")
                    self._descend(generator_optimizer, loss, place)
                    meter.add(generator_numbers)
            numbers |= meter.take()
        self._count_batch(batch, numbers)
        if self._gradient_norms:
            self.log_quantities(self._gradient_norms)
            self._gradient_norms = {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note the norm of a gradient, before it is clipped, in the round that curves are written in."""
        if (self.step + 1) % self._log_every_n_steps < self.accumulate_batches:
            name = "generator" if optimizer is self.trainer.optimizers[0] else "discriminator"
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
            self._gradient_norms[f"stability/{name}_gradient_norm"] = float(norm)
        super().on_before_optimizer_step(optimizer)

    def _penalty_scale(self) -> float:
        """Of this round's penalty: none between two, and with each one the weight of those that were left out."""
        if self.num_rounds % self._penalty_interval:
            return 0.0
        return self._penalty_interval * self._schedule.penalty_factor(self.examples_seen)

    def on_validation_epoch_start(self) -> None:
        """The averaged generator gets batch norm statistics of its own; the next step copies the trained ones over them."""
        model, (generator, _) = self.model, self.model.players()
        is_due = self.weight_average is not None and self._round and has_batch_norm(generator)
        if is_due and isinstance(model, CanSample):
            num_samples = _RENEWING_BATCHES * len(self._round[-1])
            condition = None
            if model.is_conditional:
                condition = torch.arange(num_samples, device=self.device) % self.trainer.datamodule.spec.num_classes
            with self.averaged_weights():
                renew_batch_norm(model, generator, num_samples, len(self._round[-1]), self._seed, condition)
        super().on_validation_epoch_start()

    def _validate(self, batch: Batch, noise: SampleNoise) -> None:
        scale = self._schedule.penalty_factor(self.examples_seen)
        terms = self.model.discriminator_loss(batch, penalty_scale=scale, generator=noise)
        self._reduce_val(terms, "discriminator_")
        self._reduce_val(self.model.generator_loss(batch, generator=noise), "generator_")
