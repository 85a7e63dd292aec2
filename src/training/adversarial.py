"""Training of two players, with an optimizer each, by manual optimization.

Where the gradients of several batches are accumulated, the discriminator steps after the last of them, and only then does
the generator see all of them: its gradients are those against the discriminator's new weights, as with one large batch.
"""

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from src.core.batch import Batch
from src.core.errors import require_at_least
from src.core.rng import SampleNoise
from src.training.meter import Meter
from src.training.module import TrainingModule

__all__ = ["AdversarialTraining"]


class AdversarialTraining(TrainingModule):
    """Drives an `Adversarial` model: a discriminator step on every round, a generator step on every n_critic-th.

    A round is one batch, or accumulate_batches of them.

    Args:
        model: the model.
        generator_optimizer: called with the generator's parameters.
        discriminator_optimizer: called with the discriminator's parameters.
        n_critic: discriminator steps for each generator step.
        seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm, accumulate_batches: see `TrainingModule`;
            the averaged weights are the generator's.
    """

    def __init__(
        self,
        model: nn.Module,
        generator_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        discriminator_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        n_critic: int,
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
        self._n_critic = n_critic
        self._round: list[Batch] = []  # the batches of this round so far

    def configure_optimizers(self) -> list[Optimizer]:
        return [self._built(make, player) for make, player in zip(self._make_optimizers, self.model.players(), strict=True)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        self._round = [batch] if self.place_in_round == 0 else [*self._round, batch]
        # each player's loss is computed inside its own block: the other one is frozen there when the graph is built
        with self.toggled_optimizer(discriminator_optimizer):
            terms = self.model.discriminator_loss(batch, generator=self._noise)
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

    def _validate(self, batch: Batch, noise: SampleNoise) -> None:
        self._reduce_val(self.model.discriminator_loss(batch, generator=noise), batch, "discriminator_")
        self._reduce_val(self.model.generator_loss(batch, generator=noise), batch, "generator_")
