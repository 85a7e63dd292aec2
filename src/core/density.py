"""What is known of the distribution that data were drawn from: its density, draws of it, and its entropy.

The entropy is the least cross-entropy in nats that any model of the data can have: H(p, q) = H(p) + KL(p || q).

References:
    Trefethen, Weideman 2014, "The exponentially convergent trapezoidal rule", SIAM Review 56.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from src.core.rng import Noise, SampleNoise

__all__ = ["Density", "Entropy", "entropy_by_draws", "entropy_on_grid"]

_CHUNK = 65_536  # points whose density is computed at a time
_NUM_DRAWS = 400_000
_SEED = 0  # of the draws behind an estimate: it is the same in every run


@dataclass(frozen=True)
class Entropy:
    """H(p) = -E_p [log p(x)].

    Args:
        nats: the value.
        standard_error: of an estimate from draws, in nats; None if the value is exact, or numerical to six digits.
        how: how it was found, in words.
    """

    nats: float
    standard_error: float | None
    how: str


@runtime_checkable
class Density(Protocol):
    """A known density p of vectors."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of points `(B, D)`, `(B,)` float64 in nats; -inf where there is none."""
        ...

    def sample(self, n: int, generator: Noise) -> tuple[Tensor, Tensor | None]:
        """Independent points `(n, D)` float64, and their classes `(n,)` int64, or None if they have none."""
        ...

    @property
    def entropy(self) -> Entropy:
        """H(p), computed when it is first asked for."""
        ...


def entropy_by_draws(density: Density, num_draws: int = _NUM_DRAWS) -> Entropy:
    """The mean of -log p(x) over draws of p, with its standard error."""
    parts = []
    for start in range(0, num_draws, _CHUNK):
        x, _ = density.sample(min(_CHUNK, num_draws - start), SampleNoise(_SEED, start))
        parts.append(-density.log_prob(x))
    values = torch.cat(parts)
    error = float(values.std()) / math.sqrt(num_draws)
    return Entropy(float(values.mean()), error, f"mean over {num_draws:,} draws")


def entropy_on_grid(log_prob: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, step: float) -> Entropy:
    """The sum of -p log p over a grid of points, times the volume of a cell.

    For a sum of Gaussians it is right to more than six digits if the step is at most half of the smallest standard
    deviation and the box reaches eight of them beyond all means: such a sum converges as fast as its Fourier transform
    decays.

    Args:
        log_prob: from `(B, D)` float64 to `(B,)`, in nats.
        low, high: corners `(D,)` of the box, outside of which there is next to nothing.
        step: length of a cell.
    """
    axes = [torch.arange(a, b, step, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    total = 0.0
    rows_at_a_time = max(1, _CHUNK // math.prod(len(axis) for axis in axes[1:]))
    for rows in axes[0].split(rows_at_a_time):
        log_p = log_prob(torch.cartesian_prod(rows, *axes[1:]).reshape(-1, len(axes)))
        total -= float(torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum())
    return Entropy(total * step ** len(axes), None, "quadrature on a grid")
