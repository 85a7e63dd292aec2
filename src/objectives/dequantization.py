"""From integer levels to real numbers, so that a density bounds the probability of discrete data.

A level x of width w owns the bin [x - w/2, x + w/2]; the probability of x is the integral of the density over it:

    log P(x) = log E_q(y | x) [ p(y) / q(y | x) ]  >=  E_q(y | x) [ log p(y) - log q(y | x) ]

for any q on the bin of x. Uniform noise has q = w^-D, so log P(x) >= E[log p(y)] + D log w: without the last term the
number is no likelihood of x, and without the noise a density can grow without bound at the levels. With k draws

    L_k = E[ log 1/k sum_i p(y_i) / q(y_i | x) ],    L_1 <= L_k <= log P(x)

References:
    Theis, van den Oord, Bethge 2016, "A note on the evaluation of generative models", arXiv:1511.01844, section 3.1:
        uniform noise.
    Ho et al. 2019, "Flow++: improving flow-based generative models with variational dequantization and architecture
        design", arXiv:1902.00275, section 3.1: the noise of a flow given x.
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519: L_k rises with k.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError
from src.core.protocols import Terms
from src.core.rng import Noise
from src.core.shapes import sum_event
from src.core.spec import DataSpec
from src.objectives.variational import importance_weighted_bound

__all__ = [
    "Dequantization",
    "UniformDequantization",
    "VariationalDequantization",
    "bin_width",
    "bound_of_draws",
    "dequantize",
    "quantize",
]


def bin_width(spec: DataSpec) -> float:
    """Distance of neighbouring levels in data units: 2/255 for 8-bit images in [-1, 1]."""
    assert spec.values.levels is not None
    return (spec.values.high - spec.values.low) / (spec.values.levels - 1)


def dequantize(x: Tensor, spec: DataSpec, generator: Noise) -> tuple[Tensor, float]:
    """Uniform noise on the bin of every value.

    Args:
        x: levels in data units, `(B, *event)`.
        spec: the data, which has levels.
        generator: source of the noise.

    Returns:
        y in data units, same shape, within half a bin of x, so that `quantize(y)` is x again; and the log volume
        D log w of the bins in nats, which is what log P(x) >= E[log p(y)] + D log w adds for a density p in data units.
    """
    width = bin_width(spec)
    u = _inside(generator.uniform(tuple(x.shape), like=x), spec)
    return x + width * (u - 0.5), spec.num_dims * math.log(width)


def quantize(y: Tensor, spec: DataSpec) -> Tensor:
    """The nearest level in data units, same shape and dtype: the x whose bin y is in, or the first or last level."""
    return spec.to_units(spec.to_levels(y)).to(y.dtype)


def bound_of_draws(draw: Callable[[], Tensor], num_draws: int) -> Terms:
    """L_k of log P(x), estimated by k draws of log p(y) - log q(y | x), in two parts whose sum it is.

    Args:
        draw: log p(y) - log q(y | x) for new noise, `(B,)` in nats.
        num_draws: k.

    Returns:
        one_draw: the mean over the draws, which estimates L_1, `(B,)` in nats.
        several_draws: what the mean of the weights instead of their logarithms adds, `(B,)` in nats, never negative.
    """
    log_weights = torch.stack([draw() for _ in range(num_draws)], 1)
    one_draw = log_weights.mean(1)
    return {"one_draw": one_draw, "several_draws": importance_weighted_bound(log_weights) - one_draw}


class Dequantization(nn.Module, ABC):
    """q(v | x) of v in (0, 1)^D, within the bin of x: level l of L has the bin [l/L, (l+1)/L].

    Args:
        spec: the data; only of data with levels is there anything to draw.
    """

    in_words: ClassVar[str]

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, generator: Noise | None) -> tuple[Tensor, Tensor]:
        """A draw of v given x `(B, *event)` in data units: v, same shape, and log q(v | x), `(B,)` in nats.

        Without a generator v is the same in every call: what becomes of the middle of the noise's range.
        """
        assert self.spec.values.levels is not None
        u = torch.full_like(x, 0.5) if generator is None else generator.uniform(tuple(x.shape), like=x)
        u, log_q = self.noise(_inside(u, self.spec), x)
        levels = self.spec.values.levels
        return (self.spec.to_levels(x) + u) / levels, log_q + self.spec.num_dims * math.log(levels)

    def to_data(self, v: Tensor) -> Tensor:
        """The x in data units whose bin v in [0, 1] is in, same shape and dtype."""
        levels = self.spec.values.levels
        assert levels is not None
        return self.spec.to_units((v * levels).floor().clamp(0, levels - 1).long()).to(v.dtype)

    @abstractmethod
    def noise(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """From uniform u to the place in the bin, in (0, 1), and its log density `(B,)` in nats."""


class UniformDequantization(Dequantization):
    """Uniform noise, whatever x."""

    in_words = "uniform"

    def noise(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return u, u.new_zeros(len(u))


class VariationalDequantization(Dequantization):
    """Noise that is learned with the density: sigmoid(f(logit u; x)) for uniform u and a flow f given x (Ho et al. 2019).

    While f is the identity, as it is at the start, the noise is uniform.

    Args:
        spec: the data, which has levels.
        network: the flow f, called as `network(in_shape=, context_channels=, condition_dim=)`.
    """

    in_words = "variational"

    def __init__(self, spec: DataSpec, network: Callable[..., nn.Module]) -> None:
        super().__init__(spec)
        if spec.values.levels is None:
            raise UserError(f"data={spec.name} has real values, whose noise nobody learns (set dequantization=uniform)")
        self.network = network(in_shape=spec.shape, context_channels=spec.shape[0], condition_dim=0)

    def noise(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        start = u.logit()
        end, log_det = self.network(start, None, x)
        log_det = log_det + sum_event(_log_sigmoid_slope(end) - _log_sigmoid_slope(start))
        return _inside(end.sigmoid(), self.spec), -log_det


def _log_sigmoid_slope(z: Tensor) -> Tensor:
    """log of the derivative of the sigmoid: log sigmoid(z) + log sigmoid(-z)."""
    return F.logsigmoid(z) + F.logsigmoid(-z)


def _inside(u: Tensor, spec: DataSpec) -> Tensor:
    """Clamped so far into (0, 1) that rounding does not carry x + w (u - 1/2) into the neighbouring bin."""
    values = spec.values
    assert values.levels is not None
    largest = max(abs(values.low), abs(values.high)) + bin_width(spec)
    margin = 2 * torch.finfo(u.dtype).eps * max(largest / bin_width(spec), values.levels)
    return u.clamp(margin, 1 - margin)
