"""R3GAN's networks ("Config E"): residual, grouped, and without any normalisation.

Residual blocks are inverted bottlenecks, as in ConvNeXt and ResNeXt: a 1x1 convolution that widens, a grouped 3x3
convolution, a 1x1 convolution that narrows, with leaky ReLUs between them and none on the trunk. Between two stages the
image is resampled bilinearly and a 1x1 convolution changes its width. In place of normalisation there is an initialisation
(Fixup) under which depth does not matter: the last convolution of a block of m = 3 is zero, and the others are scaled by
L^(-1/(2m-2)) = L^(-1/4), L being the number of blocks.

A block is the identity at the start, so until the first step its first two convolutions get no gradient: each is zero
times the last one. All else gets one.

References:
    Huang, Gokaslan, Kuleshov, Tompkin 2024, "The GAN is dead; long live the GAN! A modern baseline GAN",
        arXiv:2501.05441, section 3 (float16 fails: appendix).
    Zhang, Dauphin, Ma 2019, "Fixup initialization: residual learning without normalization", arXiv:1901.09321.
"""

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from src.core.errors import UserError, require_sizes
from src.core.shapes import append_condition
from src.networks.convolutional import base_and_doublings, crop
from src.networks.resampling import downsample, stage_channels, upsample

__all__ = ["NormFreeDiscriminator", "NormFreeGenerator", "ResidualBlock"]

_SLOPE = 0.2

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


class NormFreeGenerator(nn.Module):
    """A vector to an image: a learnt 4x4 map with channels scaled by the vector, then stages that double its side.

    A side that is no power of two is cropped from the next larger one.

    Args:
        in_shape: `(D,)`.
        out_shape: `(C, S, S)`, S from 8 to 128.
        width: channels next to the image; doubles with every halving of it.
        max_width: largest number of channels.
        num_blocks: residual blocks a stage.
        expansion: width inside a block, relative to the trunk's.
        group_size: channels in a group of the 3x3 convolutions.
        condition_dim: size K of the condition, embedded linearly into D values and appended to the vector; 0 for none.
    """

    overflows_in_float16: ClassVar[bool] = True

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int,
        max_width: int,
        num_blocks: int = 2,
        expansion: int = 2,
        group_size: int = 16,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width, max_width=max_width, num_blocks=num_blocks, expansion=expansion, group_size=group_size)
        base, num_doublings = base_and_doublings(out_shape)
        channels = stage_channels(width, max_width, num_doublings)[::-1]
        z_dim = math.prod(in_shape)
        self._side = out_shape[-1]
        self.embedding = nn.Linear(condition_dim, z_dim, bias=False) if condition_dim else None
        self.modulation = _initialised(nn.Linear(z_dim * (2 if condition_dim else 1), channels[0], bias=False))
        self.basis = nn.Parameter(torch.randn(channels[0], base, base))
        self.stages = _stages(channels, num_blocks, expansion, group_size)
        self.transitions = nn.ModuleList(_pointwise(c_in, c_out) for c_in, c_out in itertools.pairwise(channels))
        self.to_image = _initialised(nn.Conv2d(channels[-1], out_shape[0], 1))
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight)  # a class is then like one more z

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D)` and a condition `(B, K)` or None, to `(B, C, S, S)`."""
        z = z.flatten(1)
        if self.embedding is not None:
            assert condition is not None
            z = append_condition(z, self.embedding(condition.to(z.dtype)))
        x = self.stages[0](self.basis * self.modulation(z)[:, :, None, None])
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(upsample(transition(x)))
        return crop(self.to_image(x), self._side)


class NormFreeDiscriminator(nn.Module):
    """An image to one logit: stages that halve its side, a weighted sum over the last 4x4 pixels, one linear layer.

    A side that is odd on the way down is rounded up.

    Args:
        in_shape: `(C, S, S)`, S from 8 to 128.
        out_shape: event shape of the output.
        width: channels next to the image; doubles with every halving of it.
        max_width: largest number of channels.
        num_blocks: residual blocks a stage.
        expansion: width inside a block, relative to the trunk's.
        group_size: channels in a group of the 3x3 convolutions.
        condition_dim: size K of the condition, appended to the image as K constant planes; 0 for none.
    """

    overflows_in_float16: ClassVar[bool] = True

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int,
        max_width: int,
        num_blocks: int = 2,
        expansion: int = 2,
        group_size: int = 16,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width, max_width=max_width, num_blocks=num_blocks, expansion=expansion, group_size=group_size)
        base, num_halvings = base_and_doublings(in_shape)
        channels = stage_channels(width, max_width, num_halvings)
        self.num_features = channels[-1]
        self._out_shape = tuple(out_shape)
        self.from_image = _initialised(nn.Conv2d(in_shape[0] + condition_dim, channels[0], 1, bias=False))
        self.stages = _stages(channels, num_blocks, expansion, group_size)
        self.transitions = nn.ModuleList(_pointwise(c_in, c_out) for c_in, c_out in itertools.pairwise(channels))
        last = self.num_features
        self.contraction = _initialised(nn.Conv2d(last, last, base, groups=last, bias=False))
        self.head = _initialised(nn.Linear(last, math.prod(out_shape)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, S, S)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.head(self.features(x, condition)).unflatten(1, self._out_shape)

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the last layer sees of `(B, C, S, S)` and a condition `(B, K)` or None: `(B, num_features)`."""
        x = self.stages[0](self.from_image(append_condition(x, condition)))
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(transition(downsample(x)))
        return self.contraction(x).flatten(1)


class ResidualBlock(nn.Module):
    """x + a narrowing of a grouped 3x3 convolution of a widening of x; the identity at the start.

    Args:
        channels: of the trunk.
        hidden: channels inside.
        group_size: channels in a group of the 3x3 convolution; one group if there are no more.
        scale: of the initial weights, relative to He's: L^(-1/4) for L blocks.
    """

    def __init__(self, channels: int, hidden: int, group_size: int, scale: float) -> None:
        super().__init__()
        if hidden > group_size and hidden % group_size:
            raise UserError(
                f"has blocks of {hidden} channels (width={channels}, widened), which do not divide into groups of "
                f"group_size={group_size}; set another width, expansion or group_size"
            )
        gain = scale * nn.init.calculate_gain("leaky_relu", _SLOPE)
        num_groups = max(1, hidden // group_size)
        self.widen = _initialised(nn.Conv2d(channels, hidden, 1), gain)
        self.mix = _initialised(nn.Conv2d(hidden, hidden, 3, padding=1, groups=num_groups), gain)
        self.narrow = nn.Conv2d(hidden, channels, 1, bias=False)
        self.activation = nn.LeakyReLU(_SLOPE)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` to the same shape."""
        return x + self.narrow(self.activation(self.mix(self.activation(self.widen(x)))))


def _stages(channels: Sequence[int], num_blocks: int, expansion: int, group_size: int) -> nn.ModuleList:
    """For each width a sequence of residual blocks."""
    scale = (num_blocks * len(channels)) ** -0.25
    return nn.ModuleList(
        nn.Sequential(*(ResidualBlock(c, expansion * c, group_size, scale) for _ in range(num_blocks))) for c in channels
    )


def _pointwise(c_in: int, c_out: int) -> nn.Module:
    """A 1x1 convolution, or nothing where the width stays."""
    return nn.Identity() if c_in == c_out else _initialised(nn.Conv2d(c_in, c_out, 1, bias=False))


def _initialised(layer: _Layer, gain: float = 1.0) -> _Layer:
    """The layer with weights from N(0, gain^2 / fan-in) and biases zero; gain 1 where no activation follows."""
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
