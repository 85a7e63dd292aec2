"""Gaussian mixtures that data were drawn from, where they are known: their exact density and their modes."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from src.core.density import Entropy, entropy_by_draws, entropy_on_grid
from src.core.rng import Noise

__all__ = ["GaussianMixtureDensity", "IsotropicMixture"]

_MAX_CELLS = 2_000_000  # of a grid that an entropy is computed on
_MAX_VALUES = 4_000_000  # of intermediate values at a time


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
        assert self.means.dtype == torch.float64
        assert self.sigma > 0
        _require_weights(self.weights, self.means)

    @property
    def num_components(self) -> int:
        return len(self.means)

    @cached_property
    def entropy(self) -> Entropy:
        """Of points in the plane on a grid, unless it had too many cells; else from draws, with a standard error."""
        low, high = self.means.amin(0) - 8 * self.sigma, self.means.amax(0) + 8 * self.sigma
        step = self.sigma / 2
        num_cells = float(((high - low) / step).ceil().prod())
        if self.means.shape[1] <= 2 and num_cells <= _MAX_CELLS:
            return entropy_on_grid(self.log_prob, low, high, step)
        return entropy_by_draws(self)

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
        component = _components(self.weights, n, generator)
        return self.means[component] + self.sigma * generator.normal((n, self.means.shape[1]), self.means), component


@dataclass(frozen=True, eq=False)
class GaussianMixtureDensity:
    """p(x) = sum_k w_k N(x; mu_k, S_k) with full covariances S_k = L_k L_k^T.

    Args:
        means: mu `(K, D)` float64, in data units.
        roots: L `(K, D, D)` float64, lower triangular with a positive diagonal.
        weights: w `(K,)` float64, positive; they add up to 1.
    """

    means: Tensor
    roots: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        assert self.means.ndim == 2
        assert self.roots.shape == (*self.means.shape, self.means.shape[1])
        assert self.means.dtype == self.roots.dtype == torch.float64
        assert bool((self.roots.diagonal(dim1=1, dim2=2) > 0).all())
        _require_weights(self.weights, self.means)

    @property
    def num_components(self) -> int:
        return len(self.means)

    @cached_property
    def entropy(self) -> Entropy:
        """From draws, with a standard error: of a mixture there is no closed form."""
        return entropy_by_draws(self)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of points `(B, D)`, `(B,)` float64 in nats."""
        num_rows = max(1, _MAX_VALUES // self.means.numel())
        return torch.cat([torch.logsumexp(self._log_joint(part.double()), 1) for part in x.split(num_rows)])

    def sample(self, n: int, generator: Noise) -> tuple[Tensor, Tensor]:
        """Independent points `(n, D)` float64 and their components `(n,)` int64."""
        component = _components(self.weights, n, generator)
        z = generator.normal((n, self.means.shape[1]), self.means)
        x = torch.empty_like(z)
        for k in range(self.num_components):  # a root for each point would be K times as many numbers as needed
            is_own = component == k
            x[is_own] = self.means[k] + z[is_own] @ self.roots[k].T
        return x, component

    def _log_joint(self, x: Tensor) -> Tensor:
        """log w_k N(x; mu_k, S_k), `(B, K)`."""
        centred = (x - self.means[:, None]).mT  # (K, D, B)
        white = torch.linalg.solve_triangular(self.roots, centred, upper=False)
        log_det = self.roots.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = self.weights.log() - log_det - 0.5 * self.means.shape[1] * math.log(2 * math.pi)
        return constant - 0.5 * white.square().sum(1).T


def _require_weights(weights: Tensor, means: Tensor) -> None:
    assert weights.shape == means.shape[:1]
    assert weights.dtype == torch.float64
    assert bool((weights > 0).all())
    assert math.isclose(float(weights.sum()), 1)


def _components(weights: Tensor, n: int, generator: Noise) -> Tensor:
    """Independent components `(n,)` int64, each as often as its weight `(K,)` says."""
    u = generator.uniform((n,), weights)
    return torch.searchsorted(weights.cumsum(0), u).clamp(max=len(weights) - 1)
