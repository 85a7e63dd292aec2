"""Generative adversarial networks: plain, deep convolutional and conditional, by their networks alone.

References:
    Goodfellow et al. 2014, "Generative adversarial networks", arXiv:1406.2661.
    Radford, Metz, Chintala 2016, DCGAN, arXiv:1511.06434.
    Mirza, Osindero 2014, "Conditional generative adversarial nets", arXiv:1411.1784: the class goes to both players.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.objectives.adversarial import AdversarialLoss

__all__ = ["GAN"]


class GAN(nn.Module):
    """A generator that turns N(0, I) into data, and a discriminator that tells the two apart.

    Args:
        spec: the data.
        generator: network from z to data, called as `generator(in_shape=, out_shape=, condition_dim=)`; a tanh follows
            where the data has a range.
        discriminator: network from data to one logit, called likewise.
        adversarial_loss: what the players minimise.
        latent_dim: dimensions of z.
        conditional: give the class to both players.
    """

    def __init__(
        self,
        spec: DataSpec,
        generator: Callable[..., nn.Module],
        discriminator: Callable[..., nn.Module],
        adversarial_loss: AdversarialLoss,
        latent_dim: int,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        require_at_least("model.latent_dim", latent_dim, 1)
        if conditional:
            spec.require_classes()
        self.is_conditional = conditional
        self._spec = spec
        self._latent_dim = latent_dim
        self._loss = adversarial_loss
        condition_dim = spec.num_classes if conditional else 0
        self.generator = generator(in_shape=(latent_dim,), out_shape=spec.shape, condition_dim=condition_dim)
        self.discriminator = discriminator(in_shape=spec.shape, out_shape=(1,), condition_dim=condition_dim)

    def players(self) -> tuple[nn.Module, nn.Module]:
        return self.generator, self.discriminator

    def discriminator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """The discriminator's loss in nats; the fakes carry no gradient into the generator."""
        with torch.no_grad():
            fake = self.sample(len(batch), batch.condition, generator=generator)
        logit_real = self._logit(batch.x, batch.condition)
        logit_fake = self._logit(fake, batch.condition)
        loss = self._loss.discriminator(logit_real, logit_fake)
        return {"loss": loss, "logit_real": logit_real, "logit_fake": logit_fake}

    def generator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """The generator's loss in nats; its fakes stay attached to it."""
        fake = self.sample(len(batch), batch.condition, generator=generator)
        return {"loss": self._loss.generator(self._logit(fake, batch.condition))}

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        z = (generator or fresh_noise()).normal((n, self._latent_dim), like=next(self.generator.parameters()))
        return self.decode(z, condition)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The generator's example of z `(n, latent_dim)`."""
        return self._spec.squash(self.generator(z, self._features(condition)))

    def _logit(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.discriminator(x, self._features(condition)).squeeze(1)

    def _features(self, condition: Tensor | None) -> Tensor | None:
        return self._spec.one_hot(condition) if self.is_conditional else None
