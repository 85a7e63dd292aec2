"""Generative adversarial networks: a game (loss, penalty, packing) between two networks.

References:
    Goodfellow et al. 2014, "Generative adversarial networks", arXiv:1406.2661.
    Radford, Metz, Chintala 2016, DCGAN, arXiv:1511.06434.
    Mirza, Osindero 2014, "Conditional generative adversarial nets", arXiv:1411.1784: the class goes to both players.
    Lin et al. 2018, "PacGAN: the power of two samples in generative adversarial networks", arXiv:1712.04086: packing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import UserError, require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.objectives.adversarial import AdversarialLoss
from src.objectives.penalties import Penalty

__all__ = ["GAN"]


class GAN(nn.Module):
    """A generator that turns N(0, I) into data, and a discriminator that tells the two apart.

    Args:
        spec: the data.
        generator: network from z to data, called as `generator(in_shape=, out_shape=, condition_dim=)`; a tanh follows
            where the data has a range.
        discriminator: network from data to one logit, called likewise.
        adversarial_loss: what the players minimise.
        penalty: what the discriminator minimises besides.
        latent_dim: dimensions of z.
        packing: examples that the discriminator sees at a time, all real or all generated, as channels (images) or values
            (vectors) of one: a generator that repeats itself gives itself away.
        conditional: give the class to both players.
    """

    def __init__(
        self,
        spec: DataSpec,
        generator: Callable[..., nn.Module],
        discriminator: Callable[..., nn.Module],
        adversarial_loss: AdversarialLoss,
        penalty: Penalty,
        latent_dim: int,
        packing: int,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        require_at_least("model.latent_dim", latent_dim, 1)
        require_at_least("model.packing", packing, 1)
        if conditional:
            spec.require_classes()
        if conditional and packing > 1:
            raise UserError(f"model.packing={packing}: examples of different classes are not packed; set model.packing=1")
        self.is_conditional = conditional
        self._spec = spec
        self._latent_dim = latent_dim
        self._loss = adversarial_loss
        self._penalty = penalty
        self._packing = packing
        condition_dim = spec.num_classes if conditional else 0
        self.generator = generator(in_shape=(latent_dim,), out_shape=spec.shape, condition_dim=condition_dim)
        packed = (packing * spec.shape[0], *spec.shape[1:])
        self.discriminator = discriminator(in_shape=packed, out_shape=(1,), condition_dim=condition_dim)

    def players(self) -> tuple[nn.Module, nn.Module]:
        return self.generator, self.discriminator

    def discriminator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """The discriminator's loss, one value for each example or pack; the fakes carry no gradient into the generator."""
        noise = generator or fresh_noise()
        with torch.no_grad():
            fake = self._pack(self.sample(len(batch), batch.condition, generator=noise))
        real = self._pack(batch.x)
        logit_real = self._logit(real, batch.condition)
        logit_fake = self._logit(fake, batch.condition)
        penalties = self._penalty(lambda x: self._logit(x, batch.condition), real, fake, noise)
        loss = sum(penalties.values(), self._loss.discriminator(logit_real, logit_fake))
        return {"loss": loss, "logit_real": logit_real, "logit_fake": logit_fake, **penalties}

    def generator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """The generator's loss, one value for each example or pack; its fakes stay attached to it."""
        fake = self._logit(self._pack(self.sample(len(batch), batch.condition, generator=generator)), batch.condition)
        real = None
        if self._loss.needs_real:
            real = self._logit(self._pack(batch.x), batch.condition)
        return {"loss": self._loss.generator(fake, real)}

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        z = (generator or fresh_noise()).normal((n, self._latent_dim), like=next(self.generator.parameters()))
        return self.decode(z, condition)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The generator's example of z `(n, latent_dim)`."""
        return self._spec.squash(self.generator(z, self._features(condition)))

    def _pack(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` to `(B // m, m C, ...)`: m examples in a row are one; up to m - 1 at the end are left out."""
        m = self._packing
        x = x[: len(x) // m * m]
        return x.reshape(len(x) // m, m * x.shape[1], *x.shape[2:])

    def _logit(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.discriminator(x, self._features(condition)).squeeze(1)

    def _features(self, condition: Tensor | None) -> Tensor | None:
        return self._spec.one_hot(condition) if self.is_conditional else None
