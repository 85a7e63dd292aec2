"""Training of two players, with an optimizer each, by manual optimization."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from src.core.batch import Batch
from src.core.errors import require_at_least
from src.training.module import TrainingModule

__all__ = ["AdversarialTraining"]


class AdversarialTraining(TrainingModule):
    """Drives an `Adversarial` model: a discriminator step on every batch, a generator step on every n_critic-th.

    Args:
        model: the model.
        generator_optimizer: called with the generator's parameters.
        discriminator_optimizer: called with the discriminator's parameters.
        n_critic: discriminator steps for each generator step.
        seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm: see `TrainingModule`; the averaged weights
            are the generator's.
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
    ) -> None:
        generator, _ = model.players()
        super().__init__(model, generator, seed, log_every_n_steps, ema_half_life_examples, gradient_clip_norm)
        require_at_least("training.n_critic", n_critic, 1)
        self._make_optimizers = (generator_optimizer, discriminator_optimizer)
        self._n_critic = n_critic

    def configure_optimizers(self) -> list[Optimizer]:
        return [self._built(make, player) for make, player in zip(self._make_optimizers, self.model.players(), strict=True)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        # each player's loss is computed inside its own block: the other one is frozen there when the graph is built
        with self.toggled_optimizer(discriminator_optimizer):
            terms = self.model.discriminator_loss(batch, generator=self._noise)
            loss, numbers = self._reduce(terms, "discriminator_")
            self._descend(discriminator_optimizer, loss)
        if (self.step + 1) % self._n_critic == 0:
            with self.toggled_optimizer(generator_optimizer):
                terms = self.model.generator_loss(batch, generator=self._noise)
                loss, generator_numbers = self._reduce(terms, "generator_")
                self._descend(generator_optimizer, loss)
            numbers |= generator_numbers
        self._count_batch(batch, numbers)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with self.averaged_weights():
            noise = self._val_noise(batch)
            self._reduce_val(self.model.discriminator_loss(batch, generator=noise), batch, "discriminator_")
            self._reduce_val(self.model.generator_loss(batch, generator=noise), batch, "generator_")
