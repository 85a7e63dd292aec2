"""A density on the latents of a trained autoencoder, which stays as it is: an autoencoder that draws samples.

    z = (encode(x) - mean) / scale,    x' = decode(mean + scale z'),    z' ~ the density

Where the density draws its z' as a function of noise e ~ N(0, I), as flows do, the noise is the code of the whole model,
decode(e) = x', so that one can go from one sample to another. Else the code is z.

A mixture of Gaussians makes a generative model of a plain autoencoder; flow matching on its latents is latent diffusion.

References:
    Ghosh et al. 2020, "From variational to deterministic autoencoders", arXiv:1903.12436: a density fitted afterwards.
    Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", arXiv:2112.10752.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import (
    CanBeSteered,
    CanDecode,
    CanEncode,
    CanSample,
    ExpectationMaximization,
    FollowsTraining,
    HasSettings,
    NeedsPreparation,
    Terms,
    Trainable,
)
from src.core.rng import Noise
from src.core.spec import CONTINUOUS, DataSpec, Values

__all__ = ["InvertibleLatent", "Latent", "MixtureLatent", "NoiseLatent", "TrainableLatent", "fit_on_latents"]

_LEAST_SCALE = 1e-6  # of a latent dimension, relative to the largest; one that never changes is left alone


def fit_on_latents(spec: DataSpec, autoencoder: nn.Module, name: str, density: Callable[[DataSpec], nn.Module]) -> "Latent":
    """A model of data by a density on an autoencoder's latents.

    Args:
        spec: the data.
        autoencoder: a `CanEncode`, built for `spec`; its weights are not trained any more.
        name: of the autoencoder's model, for errors.
        density: makes the model of vectors that is trained, from what a latent is.
    """
    if not isinstance(autoencoder, CanEncode):
        raise UserError(f"autoencoder= must be the run of a model that encodes and decodes; model={name} has no CanEncode")
    with torch.no_grad():
        like = next(autoencoder.parameters())
        condition = torch.zeros(1, dtype=torch.long, device=like.device) if spec.num_classes else None
        latent_dim = autoencoder.eval().encode(like.new_zeros(1, *spec.shape), condition).shape[1]
    values = Values(CONTINUOUS, low=-math.inf, high=math.inf, levels=None)
    of_latents = DataSpec(f"{spec.name}-latents", "vector", (latent_dim,), values, spec.class_names)
    made = density(of_latents)
    if not isinstance(made, CanSample) or not isinstance(made, (ExpectationMaximization, Trainable)):
        raise UserError(
            "a density on latents must draw samples and have a loss; choose gmm, flow, flow_matching or another such model"
        )
    return _kind(made)(spec, autoencoder, made, latent_dim)


def _kind(density: nn.Module) -> "type[Latent]":
    if isinstance(density, ExpectationMaximization):
        return MixtureLatent
    if not isinstance(density, CanDecode):
        return TrainableLatent
    return InvertibleLatent if isinstance(density, CanEncode) else NoiseLatent


class Latent(nn.Module):
    """What is common to densities of any training and of any code. Conditional if the density or the autoencoder is.

    Args:
        spec: the data.
        autoencoder: with trained weights; frozen, and always in evaluation mode.
        density: a model of vectors `(B, latent_dim)` that can sample.
        latent_dim: length of a latent.
    """

    autoencoder: Any  # modules with capabilities, which are checked at run time
    density: Any
    mean: Tensor
    scale: Tensor

    def __init__(self, spec: DataSpec, autoencoder: nn.Module, density: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self._spec = spec
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.density = density
        self.is_conditional = density.is_conditional or getattr(autoencoder, "is_conditional", False)
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))
        if isinstance(density, CanBeSteered):
            self.steer = density.steer
        if isinstance(density, FollowsTraining):
            self.follow = density.follow

    def train(self, mode: bool = True) -> "Latent":
        super().train(mode)
        self.autoencoder.eval()
        return self

    def frozen_part(self) -> nn.Module:
        """What was trained before."""
        return self.autoencoder

    def prepare(self, examples: Callable[[], Iterable[Batch]], *, generator: Noise) -> None:
        """Standardize the latents by those of the training data, then let the density look at them."""
        count, total, squares = (
            0,
            self.mean.new_zeros((), dtype=torch.float64),
            self.mean.new_zeros((), dtype=torch.float64),
        )
        for batch in examples():
            z = self._encode(batch).double()
            count, total, squares = count + len(z), total + z.sum(0), squares + z.square().sum(0)
        mean = total / count
        scale = (squares / count - mean.square()).clamp(min=0).sqrt()
        scale = torch.where(scale > _LEAST_SCALE * scale.max(), scale, torch.ones_like(scale))
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        if isinstance(self.density, NeedsPreparation):
            self.density.prepare(lambda: map(self._of_latents, examples()), generator=generator)

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._example(self._latent(x, condition), condition)

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return self._example(self.density.sample(n, self._of_density(condition), generator=generator), condition)

    def settings(self) -> dict[str, Any]:
        of_density = {"density": self.density.settings()} if isinstance(self.density, HasSettings) else {}
        is_told_apart = self.density.is_conditional or not self.is_conditional
        return of_density | ({} if is_told_apart else {"latents": "drawn whatever the class, which the decoder is given"})

    def _latent(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The standardized latent z, `(B, latent_dim)`."""
        return (self.autoencoder.encode(x, condition) - self.mean) / self.scale

    def _example(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """The example of z, `(B, *spec.shape)` in data units."""
        return self.autoencoder.decode(self.mean + self.scale * z, condition)

    def _of_density(self, condition: Tensor | None) -> Tensor | None:
        return condition if self.density.is_conditional else None

    def _encode(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.encode(batch.x, batch.condition)

    def _of_latents(self, batch: Batch) -> Batch:
        return batch.with_x((self._encode(batch) - self.mean) / self.scale)


class _CodedByLatent(Latent):
    """Its code is the standardized latent."""

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """z, `(B, latent_dim)`."""
        return self._latent(x, condition)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._example(z, condition)


class _Trainable(Latent):
    """With a density that is trained by the gradient of its loss."""

    @property
    def objective(self) -> str:
        return f"{self.density.objective}, where x is a standardized latent"

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        return self.density.loss(self._of_latents(batch), generator=generator)


class TrainableLatent(_CodedByLatent, _Trainable):
    """With a density that is trained by gradients and is no function of Gaussian noise."""


class NoiseLatent(_Trainable):
    """With a density that is trained by gradients, whose samples are a function of noise e ~ N(0, I)."""

    def __init__(self, spec: DataSpec, autoencoder: nn.Module, density: nn.Module, latent_dim: int) -> None:
        super().__init__(spec, autoencoder, density, latent_dim)
        self.latent_dim = self.density.latent_dim  # CanDecode: its samples are `decode(e)` of e ~ N(0, I)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The sample of noise `(B, latent_dim)`."""
        return self._example(self.density.decode(z, self._of_density(condition)), condition)


class InvertibleLatent(NoiseLatent):
    """As that, where the density has a code of a latent, too: a flow the noise that gives it."""

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The density's code of the latent of x, `(B, latent_dim)`."""
        return self.density.encode(self._latent(x, condition), self._of_density(condition))

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x, condition), condition)


class MixtureLatent(_CodedByLatent):
    """With a density that is trained by expectation maximization."""

    @property
    def objective(self) -> str:
        return f"{self.density.objective}, where x is a standardized latent"

    @property
    def maximizes_every_batch(self) -> bool:
        return self.density.maximizes_every_batch

    @property
    def statistics(self) -> Tensor:
        return self.density.statistics

    def accumulate(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        return self.density.accumulate(self._of_latents(batch), generator=generator)

    def maximize(self, share: float = 1.0) -> dict[str, float]:
        return self.density.maximize(share)

    def negative_log_likelihood(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        return self.density.negative_log_likelihood(self._of_latents(batch), generator=generator)
