"""Likelihoods p(x | parameters) of one example, as objects.

A decoder returns `parameters`, `(B, num_parameters * C, ...)` for data `(B, C, ...)`; a likelihood turns them into a log
probability. It takes x in data units and converts by the `DataSpec`, so nobody else needs to know that a Bernoulli wants
{0, 1}. A likelihood says which data it is a likelihood *of*; anything else is refused, since its number would mean nothing.

References:
    Kingma, Welling 2014, arXiv:1312.6114, appendix C: Bernoulli and Gaussian decoders.
    Rybkin, Daniilidis, Levine 2021, "Simple and effective VAE training with calibrated decoders", arXiv:2006.13202:
        one learned scale.
    Yamamoto, Song, Kim 2020, "Parallel WaveGAN", arXiv:1910.11480, section 2.2: the distance of spectra.
    Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++", arXiv:1701.05517, section 2.1: discretized logistic.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError
from src.core.rng import Noise
from src.core.shapes import sum_event
from src.core.sound import WAVEFORM, stft_distance
from src.core.spec import BINARY_DYNAMIC, BINARY_STATIC, CONTINUOUS, DISCRETE, DataSpec
from src.objectives.variational import gaussian_log_prob

__all__ = [
    "Bernoulli",
    "BernoulliOnGrey",
    "DiscretizedLogistic",
    "Gaussian",
    "GaussianLearnedScale",
    "Likelihood",
    "Spectral",
]


class Likelihood(nn.Module, ABC):
    """Base of all likelihoods.

    Args:
        spec: the data; raises `UserError` if this is no likelihood of such data.
    """

    num_parameters: ClassVar[int]  # decoder outputs per data value
    accepts: ClassVar[tuple[str, ...]]  # kinds of values, see `core.spec`
    is_normalised: ClassVar[bool] = True  # False: a training loss only, never reported as a likelihood
    in_words: str  # with all that its values depend on but the decoder's output; its name, if that is all

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.spec = spec
        self.in_words = type(self).__name__
        if spec.values.kind not in self.accepts:
            other_values = ", or other values with data.values=" if spec.modality == "image" else ""
            raise UserError(
                f"{type(self).__name__} is a likelihood of {' or '.join(self.accepts)} values; data={spec.name} gives "
                f"{spec.values.describe()} (choose another with likelihood={other_values})"
            )

    @abstractmethod
    def natural(self, x: Tensor) -> Tensor:
        """x on the scale that the formula is written in, same shape; an encoder learns fastest from this scale."""

    @abstractmethod
    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """log p(x | parameters), `(B,)` in nats, summed over the event."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """The expected x, in data units, shape of x."""

    @abstractmethod
    def sample(self, parameters: Tensor, generator: Noise) -> Tensor:
        """A draw of x, in data units, shape of x."""


class _BernoulliCrossEntropy(Likelihood):
    """sum t l - log(1 + exp(l)) for targets t in [0, 1] and logits l."""

    num_parameters = 1

    def natural(self, x: Tensor) -> Tensor:
        return self.spec.to_unit_interval(x)

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        return -sum_event(F.binary_cross_entropy_with_logits(parameters, self.natural(x), reduction="none"))

    def mean(self, parameters: Tensor) -> Tensor:
        return _onto_range(parameters.sigmoid(), self.spec)


class Bernoulli(_BernoulliCrossEntropy):
    """p(x) = sigmoid(l)^x (1 - sigmoid(l))^(1-x) for binary x, from logits l."""

    accepts = (BINARY_STATIC, BINARY_DYNAMIC)

    def sample(self, parameters: Tensor, generator: Noise) -> Tensor:
        u = generator.uniform(tuple(parameters.shape), like=parameters)
        return _onto_range((u < parameters.sigmoid()).to(parameters.dtype), self.spec)


class BernoulliOnGrey(_BernoulliCrossEntropy):
    """The cross entropy of a Bernoulli with a grey value in [0, 1] as its target: a loss, not a likelihood.

    It is not normalised over grey values, and even a perfect reconstruction costs the entropy of every pixel (45.5 nats a
    digit on MNIST). Much used (PyTorch's own VAE example), so it is here under its own name; no likelihood is reported.
    Its samples are its means, since it has no distribution to draw from.
    """

    accepts = (DISCRETE, CONTINUOUS)
    is_normalised = False

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        if not spec.values.is_bounded:
            raise UserError(
                f"BernoulliOnGrey takes values in a range; data={spec.name} gives {spec.values.describe()} (choose a "
                "likelihood of them, as likelihood=gaussian_learned_scale)"
            )

    def sample(self, parameters: Tensor, generator: Noise) -> Tensor:
        return self.mean(parameters)


class _GaussianDensity(Likelihood):
    """A density N(x; mu, scale^2) of continuous values, one scale for all of them."""

    num_parameters = 1
    accepts = (CONTINUOUS,)
    log_scale: Tensor

    def natural(self, x: Tensor) -> Tensor:
        return x

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        return sum_event(gaussian_log_prob(x, parameters, self.log_scale))

    def mean(self, parameters: Tensor) -> Tensor:
        """The centre, clamped to the data's range."""
        return parameters.clamp(self.spec.values.low, self.spec.values.high)

    def sample(self, parameters: Tensor, generator: Noise) -> Tensor:
        return parameters + self.log_scale.exp() * generator.normal(tuple(parameters.shape), like=parameters)


class Gaussian(_GaussianDensity):
    """A Gaussian with a fixed scale.

    Args:
        spec: the data.
        scale: standard deviation in data units (images span 2 of them).
    """

    def __init__(self, spec: DataSpec, scale: float) -> None:
        super().__init__(spec)
        self.register_buffer("log_scale", _log_scale(scale, "likelihood.scale"), persistent=False)
        self.in_words = f"Gaussian of scale {scale:g}"


class GaussianLearnedScale(_GaussianDensity):
    """A Gaussian whose scale is learned with the networks (Rybkin et al. 2021).

    Args:
        spec: the data.
        initial_scale: where the standard deviation starts, in data units.
    """

    def __init__(self, spec: DataSpec, initial_scale: float) -> None:
        super().__init__(spec)
        self.log_scale = nn.Parameter(_log_scale(initial_scale, "likelihood.initial_scale"))


class Spectral(Likelihood):
    """Minus the distance of the spectra of a waveform and the decoder's, at several resolutions: a loss, not a likelihood.

        - weight * T * mean over resolutions of stft_distance(x, mean)

    The phase counts for nothing here, while a density of the T samples has to tell it. Its samples are its means, since it
    has no distribution to draw from.

    Args:
        spec: the data; waveforms.
        weight: nats for each sample of the waveform that a distance of 1 costs.
        n_ffts: windows in samples, one for each resolution; the hop is a quarter of each.
        floor: magnitudes below it count as it.
    """

    num_parameters = 1
    accepts = (CONTINUOUS,)
    is_normalised = False

    def __init__(self, spec: DataSpec, weight: float, n_ffts: Sequence[int], floor: float) -> None:
        super().__init__(spec)
        if spec.sound is None or spec.sound.representation != WAVEFORM:
            raise UserError(
                f"Spectral is a loss of waveforms; data={spec.name} gives {spec.describe()} (choose another with "
                "likelihood=, or of sound data.representation=waveform)"
            )
        if not n_ffts or any(n_fft < 4 for n_fft in n_ffts):
            raise UserError(f"likelihood.n_ffts={list(n_ffts)} must be one or more windows of at least 4 samples")
        for key, value in {"weight": weight, "floor": floor}.items():
            if not value > 0:
                raise UserError(f"likelihood.{key}={value} must be a positive number")
        self._weight = weight
        self._n_ffts = n_ffts
        self._floor = floor
        self.in_words = f"{weight:g} of the distance of spectra at windows of {', '.join(map(str, n_ffts))}"

    def natural(self, x: Tensor) -> Tensor:
        return x

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Minus the weighted distance, `(B,)`; no log probability."""
        x, mean = x[:, 0], parameters[:, 0]
        each = [stft_distance(x, mean, n_fft, n_fft // 4, self._floor) for n_fft in self._n_ffts]
        return -self._weight * x.shape[1] * torch.stack(each).mean(0)

    def mean(self, parameters: Tensor) -> Tensor:
        """The decoder's waveform, clamped to the data's range."""
        return parameters.clamp(self.spec.values.low, self.spec.values.high)

    def sample(self, parameters: Tensor, generator: Noise) -> Tensor:
        return self.mean(parameters)


class DiscretizedLogistic(Likelihood):
    """A logistic density integrated over the bin of each integer level; the outermost bins reach to infinity.

    With mu and s from the decoder and half a bin h:
        P(x) = sigmoid((x + h - mu) / s) - sigmoid((x - h - mu) / s)
    which sums to one over the levels, in nats of a discrete distribution.
    """

    num_parameters = 2
    accepts = (DISCRETE,)
    # as PixelCNN++'s code at the lower end: a logistic far narrower than a bin; at the upper one far wider than the range,
    # where beyond it the probability of an inner bin would underflow
    _LOG_SCALE_RANGE = (-7.0, 7.0)

    def natural(self, x: Tensor) -> Tensor:
        return x

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        mu, log_scale = self._split(parameters)
        values = self.spec.values
        half_bin = 0.5 * (values.high - values.low) / (values.levels - 1)
        inverse_scale = (-log_scale).exp()
        upper = (x - mu + half_bin) * inverse_scale
        lower = (x - mu - half_bin) * inverse_scale
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), without cancellation
        inner = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-2 * half_bin * inverse_scale))
        is_lowest = x < values.low + half_bin
        is_highest = x > values.high - half_bin
        edge = torch.where(is_lowest, F.logsigmoid(upper), F.logsigmoid(-lower))
        return sum_event(torch.where(is_lowest | is_highest, edge, inner))

    def mean(self, parameters: Tensor) -> Tensor:
        """The centre mu, clamped to the range (the mean of the logistic before it is folded into the bins)."""
        mu, _ = self._split(parameters)
        return mu.clamp(self.spec.values.low, self.spec.values.high)

    def sample(self, parameters: Tensor, generator: Noise) -> Tensor:
        mu, log_scale = self._split(parameters)
        u = generator.uniform(tuple(mu.shape), like=mu)
        x = mu + log_scale.exp() * (u.log() - torch.log1p(-u))
        return self.spec.to_units(self.spec.to_levels(x)).to(mu.dtype)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_scale = parameters.chunk(2, dim=1)
        return mu, log_scale.clamp(*self._LOG_SCALE_RANGE)


def _onto_range(unit: Tensor, spec: DataSpec) -> Tensor:
    """[0, 1] to data units."""
    return spec.values.low + (spec.values.high - spec.values.low) * unit


def _log_scale(scale: float, key: str) -> Tensor:
    if not scale > 0:
        raise UserError(f"the scale of a Gaussian likelihood is a positive number, not {scale} (set {key})")
    return torch.tensor(math.log(scale))
