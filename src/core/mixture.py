"""The isotropic Gaussian mixture that data were drawn from, where it is known: their exact density and their modes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from src.core.rng import Noise

__all__ = ["IsotropicMixture"]


@dataclass(frozen=True, eq=False)
class IsotropicMixture:
    """p(x) = sum_k w_k N(x; mu_k, sigma^2 I).

    Args:
        means: mu `(K, D)` float64, in data units.
        sigma: standard deviation of every value within a component, in data units.
        weights: w `(K,)` float64, positive; they add up to 1.
    """

    means: Tensor
    sigma: float
    weights: Tensor

    def __post_init__(self) -> None:
        assert self.means.ndim == 2
        assert self.weights.shape == self.means.shape[:1]
        assert self.means.dtype == self.weights.dtype == torch.float64
        assert self.sigma > 0
        assert bool((self.weights > 0).all())
        assert math.isclose(float(self.weights.sum()), 1)

    @property
    def num_components(self) -> int:
        return len(self.means)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of points `(B, D)`, `(B,)` float64 in nats."""
        dim = self.means.shape[1]
        log_scale = 0.5 * dim * math.log(2 * math.pi * self.sigma**2)
        return torch.logsumexp(self.weights.log() - 0.5 * self.distances(x).square(), 1) - log_scale

    def distances(self, x: Tensor) -> Tensor:
        """|x - mu_k| / sigma, the Euclidean distance to every mean in standard deviations, `(B, K)` float64."""
        # not by the expanded square, which cancels: a component is far narrower than its distance from the origin
        scaled = (x.double() / self.sigma)[:, None] - self.means / self.sigma
        return torch.linalg.vector_norm(scaled, dim=2)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest mean in standard deviations, `(B,)` float64, and its component, `(B,)` int64."""
        distance, component = self.distances(x).min(1)
        return distance, component

    def sample(self, n: int, generator: Noise) -> tuple[Tensor, Tensor]:
        """Independent points `(n, D)` float64 and their components `(n,)` int64."""
        u = generator.uniform((n,), self.weights)
        component = torch.searchsorted(self.weights.cumsum(0), u).clamp(max=self.num_components - 1)
        return self.means[component] + self.sigma * generator.normal((n, self.means.shape[1]), self.means), component
