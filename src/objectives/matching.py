"""Conditional flow matching: regression onto the velocities of paths between noise and data.

A path goes from x0 (a draw of the source) at t = 0 to x1 (data) at t = 1:

    x_t = a(t) x1 + b(t) x0,    target u = a'(t) x1 + b'(t) x0,    loss = E |v(x_t, t) - u|^2 / D

The minimizer v(x, t) = E[u | x_t = x] is a field whose flow carries the source to the data. The loss does not fall to 0:
what is left is the variance of u given x_t. It is a mean over the D dimensions, so that its size does not depend on them;
for straight paths from N(0, I) to N(mu, sigma^2 I), independently paired, it is at least sigma pi / 2.

References:
    Lipman et al. 2023, "Flow matching for generative modeling", arXiv:2210.02747.
    Liu, Gong, Liu 2023, "Flow straight and fast: learning to generate and transfer data with rectified flow",
        arXiv:2209.03003: the straight path.
    Albergo, Vanden-Eijnden 2023, "Building normalizing flows with stochastic interpolants", arXiv:2209.15571: the
        trigonometric path, and any source.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.mixture import IsotropicMixture
from src.core.rng import Noise
from src.core.shapes import sum_event
from src.core.spec import DataSpec

__all__ = ["EightGaussians", "Path", "Source", "StandardNormal", "StraightPath", "VariancePreservingPath", "matching_loss"]


def matching_loss(v: Tensor, target: Tensor) -> Tensor:
    """|v - u|^2 / D of every example, `(B,)` in float32: the mean over all event dimensions."""
    return (v.float() - target.float()).square().flatten(1).mean(1)


# --- paths -----------------------------------------------------------------------------------------------------------


class Path(ABC):
    """x_t = a(t) x1 + b(t) x0 with a(0) = b(1) = 0 and a(1) = b(0) = 1."""

    in_words: ClassVar[str]

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b and their derivatives a', b' at times t, each in the shape of t."""

    def at(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target u, both `(B, *E)`, from x0 and x1 `(B, *E)` at times `(B,)`."""
        a, b, da, db = (c.reshape(-1, *[1] * (x1.ndim - 1)) for c in self.coefficients(t))
        return a * x1 + b * x0, da * x1 + db * x0


class StraightPath(Path):
    """x_t = t x1 + (1 - t) x0, along which u = x1 - x0 all the time."""

    in_words = "straight paths"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return t, 1 - t, one, -one


class VariancePreservingPath(Path):
    """x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0: of constant variance if x0 and x1 are independent and have the same."""

    in_words = "variance-preserving paths"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half_pi = math.pi / 2
        a, b = (half_pi * t).sin(), (half_pi * t).cos()
        return a, b, half_pi * b, -half_pi * a


# --- sources ---------------------------------------------------------------------------------------------------------


class Source(ABC):
    """The distribution of x0."""

    in_words: str
    is_standard_normal: ClassVar[bool]

    @abstractmethod
    def refuse(self, spec: DataSpec) -> None:
        """Raise `UserError` for data that no path leads to from here."""

    @abstractmethod
    def sample(self, shape: tuple[int, ...], like: Tensor, generator: Noise) -> Tensor:
        """Independent draws `(n, *E)`, on the device and in the dtype of `like`."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x0), `(B,)` in nats."""


class StandardNormal(Source):
    """N(0, I)."""

    in_words = "N(0, I)"
    is_standard_normal = True

    def refuse(self, spec: DataSpec) -> None:
        """All data have as many dimensions as a normal distribution can have."""

    def sample(self, shape: tuple[int, ...], like: Tensor, generator: Noise) -> Tensor:
        return generator.normal(shape, like=like)

    def log_prob(self, x: Tensor) -> Tensor:
        return sum_event(-0.5 * x.square()) - 0.5 * x[0].numel() * math.log(2 * math.pi) if len(x) else x.new_zeros(0)


class EightGaussians(Source):
    """Eight equal isotropic Gaussians on a circle, the first at angle 0: for points in the plane.

    Args:
        radius: of the circle.
        sigma: standard deviation of each coordinate within a Gaussian.
    """

    is_standard_normal = False

    def __init__(self, radius: float, sigma: float) -> None:
        if not radius > 0 or not sigma > 0:
            raise UserError(f"source.radius={radius} and source.sigma={sigma} must be positive")
        self.in_words = f"8 Gaussians of sigma {sigma:g} on a circle of radius {radius:g}"
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        self._mixture = IsotropicMixture(means, sigma, torch.full((8,), 1 / 8, dtype=torch.float64))

    def refuse(self, spec: DataSpec) -> None:
        if spec.shape != (2,):
            raise UserError(f"source=eight_gaussians is of points in the plane; data={spec.name} gives {spec.describe()}")

    def sample(self, shape: tuple[int, ...], like: Tensor, generator: Noise) -> Tensor:
        assert shape[1:] == (2,)
        x, _ = self._mixture.sample(shape[0], generator)
        return x.to(like)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._mixture.log_prob(x.cpu()).to(x)
