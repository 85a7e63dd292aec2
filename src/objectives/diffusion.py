"""Learning to denoise x = x0 + sigma z with z ~ N(0, I), at every noise level sigma.

The denoiser is made of a network F by coefficients of sigma, so that F is asked for something of size 1 at every level:

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise),    loss = |F - (x0 - c_skip x) / c_out|^2 / D

which is lambda |D - x0|^2 with lambda = 1 / c_out^2, a mean over the D dimensions. Whether a network predicts the noise
(epsilon), a velocity (v), or what Karras et al. propose, is a choice of coefficients. A variance-preserving process
y = alpha x0 + beta z with alpha^2 + beta^2 = 1 is the same in other coordinates, x = y / alpha and sigma = beta / alpha;
the network sees y = c_in x.

References:
    Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models", arXiv:2006.11239: epsilon, the linear schedule.
    Nichol, Dhariwal 2021, "Improved denoising diffusion probabilistic models", arXiv:2102.09672: the cosine schedule.
    Song et al. 2021, "Score-based generative modeling through stochastic differential equations", arXiv:2011.13456,
        appendix B: the linear schedule in continuous time.
    Salimans, Ho 2022, "Progressive distillation for fast sampling of diffusion models", arXiv:2202.00512: v.
    Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", arXiv:2206.00364, table 1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from src.core.errors import UserError, require_at_least

__all__ = [
    "EDM",
    "Coefficients",
    "Cosine",
    "Epsilon",
    "Linear",
    "LogNormal",
    "Noising",
    "Prediction",
    "V",
    "clean_of_epsilon",
    "clean_of_v",
    "epsilon_of_clean",
    "v_of_clean",
]


# --- what is predicted -----------------------------------------------------------------------------------------------


def clean_of_epsilon(x: Tensor, sigma: Tensor, epsilon: Tensor) -> Tensor:
    """x0 = x - sigma epsilon, all `(B, *E)`, sigma to be broadcast."""
    return x - sigma * epsilon


def epsilon_of_clean(x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """epsilon = (x - x0) / sigma, the inverse of `clean_of_epsilon`."""
    return (x - x0) / sigma


def clean_of_v(x: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """x0 = alpha y - beta v = (x - sigma sqrt(1 + sigma^2) v) / (1 + sigma^2), with y = alpha x."""
    return (x - sigma * (1 + sigma.square()).sqrt() * v) / (1 + sigma.square())


def v_of_clean(x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """v = alpha epsilon - beta x0, the inverse of `clean_of_v`."""
    return (epsilon_of_clean(x, sigma, x0) - sigma * x0) / (1 + sigma.square()).sqrt()


@dataclass(frozen=True)
class Coefficients:
    """Of D(x; sigma) = skip x + out F(scale x, noise), each in the shape of sigma."""

    skip: Tensor
    out: Tensor
    scale: Tensor
    noise: Tensor


class Prediction(ABC):
    """What the network is asked for."""

    in_words: ClassVar[str]
    sigma_data: float  # standard deviation of the data that the coefficients are made for

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """For noise levels sigma > 0 of any shape."""

    def target(self, x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
        """What F should be at x = x0 + sigma z, `(B, *E)`: (x0 - c_skip x) / c_out; sigma is to be broadcast."""
        c = self.coefficients(sigma)
        return (x0 - c.skip * x) / c.out


def _noise_coordinate(sigma: Tensor) -> Tensor:
    """ln(sigma) / 4, the time that the network is told, between about -1.6 and 1.6 (Karras et al. 2022, table 1)."""
    return sigma.log() / 4


class EDM(Prediction):
    """F has inputs and targets of variance 1, and its errors are amplified as little as possible (Karras et al. 2022).

    Args:
        sigma_data: standard deviation of the data, to which a model that standardizes them brings them.
    """

    in_words = "EDM"

    def __init__(self, sigma_data: float = 0.5) -> None:
        require_at_least("prediction.sigma_data", sigma_data, 1e-6)
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        total = (sigma.square() + self.sigma_data**2).sqrt()
        skip, out = (self.sigma_data / total).square(), sigma * self.sigma_data / total
        return Coefficients(skip, out, 1 / total, _noise_coordinate(sigma))


class Epsilon(Prediction):
    """F is the noise z (Ho, Jain, Abbeel 2020, their loss with all weights 1)."""

    in_words = "epsilon"
    sigma_data = 1.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), -sigma, (1 + sigma.square()).rsqrt(), _noise_coordinate(sigma))


class V(Prediction):
    """F is v = alpha z - beta x0 (Salimans, Ho 2022): EDM's coefficients for variance 1, with the other sign of F."""

    in_words = "v"
    sigma_data = 1.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        alpha = (1 + sigma.square()).rsqrt()
        return Coefficients(alpha.square(), -sigma * alpha, alpha, _noise_coordinate(sigma))


# --- how much noise --------------------------------------------------------------------------------------------------


class Noising(ABC):
    """The noise levels that a network is trained at, and those that samples pass on their way."""

    in_words: ClassVar[str]

    @abstractmethod
    def draw(self, u: Tensor) -> Tensor:
        """Levels sigma > 0 for training, from values uniform on (0, 1), same shape: an inverse distribution function."""

    @abstractmethod
    def level(self, u: float) -> float:
        """Levels for sampling: the highest at u = 0, falling to the lowest at u = 1."""


class LogNormal(Noising):
    """ln sigma ~ N(mean, std^2) in training; in sampling sigma^(1/rho) falls in equal steps (Karras et al. 2022).

    Args:
        mean, std: of ln sigma.
        sigma_max, sigma_min: the highest and the lowest level of sampling.
        rho: 1 for equal steps of sigma; the larger, the shorter are the steps at low levels.
    """

    in_words = "log-normal noise levels"

    def __init__(self, mean: float, std: float, sigma_max: float, sigma_min: float, rho: float) -> None:
        require_at_least("noise.std", std, 0)
        require_at_least("noise.rho", rho, 1e-6)
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"noise.sigma_min={sigma_min} must be above 0 and below noise.sigma_max={sigma_max}")
        self._mean, self._std = mean, std
        self._max, self._min, self._rho = sigma_max, sigma_min, rho

    def draw(self, u: Tensor) -> Tensor:
        return (self._mean + self._std * torch.special.ndtri(u)).exp()

    def level(self, u: float) -> float:
        highest, lowest = self._max ** (1 / self._rho), self._min ** (1 / self._rho)
        return (highest + u * (lowest - highest)) ** self._rho


class _VariancePreserving(Noising, ABC):
    """sigma(t) = sqrt((1 - alpha^2) / alpha^2) with t uniform in training, and in equal steps in sampling."""

    _latest: ClassVar[float] = 1.0
    _EARLIEST = 1e-3  # the first of DDPM's 1,000 times

    @abstractmethod
    def log_alpha_square(self, t: Tensor) -> Tensor:
        """ln alpha^2 at times t in (0, 1], same shape; alpha^2 is the share of variance that is signal."""

    def at(self, t: Tensor) -> Tensor:
        """sigma at times t, same shape."""
        return torch.expm1(-self.log_alpha_square(t)).sqrt()

    def draw(self, u: Tensor) -> Tensor:
        return self.at(self._EARLIEST + (self._latest - self._EARLIEST) * u)

    def level(self, u: float) -> float:
        t = torch.tensor(self._latest + (self._EARLIEST - self._latest) * u, dtype=torch.float64)
        return float(self.at(t))


class Linear(_VariancePreserving):
    """ln alpha^2 = -t^2 (b - a) / 2 - t a: DDPM's 1,000 steps of beta from a / 1000 to b / 1000, in continuous time.

    Args:
        beta_min, beta_max: a and b; 0.1 and 20 there.
    """

    in_words = "the linear schedule of variance"

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise UserError(f"noise.beta_min={beta_min} must be above 0 and at most noise.beta_max={beta_max}")
        self._beta_min, self._beta_max = beta_min, beta_max

    def log_alpha_square(self, t: Tensor) -> Tensor:
        return -0.5 * t.square() * (self._beta_max - self._beta_min) - t * self._beta_min


class Cosine(_VariancePreserving):
    """alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)) with s = 0.008, up to t = 0.999 (Nichol, Dhariwal 2021)."""

    in_words = "the cosine schedule of variance"

    _latest = 0.999  # at 1 no signal is left, and sigma is infinite
    _OFFSET = 0.008

    def log_alpha_square(self, t: Tensor) -> Tensor:
        def angle(t: Tensor) -> Tensor:
            return (0.5 * math.pi / (1 + self._OFFSET)) * (t + self._OFFSET)

        return 2 * (angle(t).cos().log() - angle(torch.zeros_like(t)).cos().log())
