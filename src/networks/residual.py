"""Residual generator and discriminator, for square images of 8 to 128 pixels.

At 32 pixels, with the default widths, these are the networks of spectral normalization for CIFAR-10 (table 4 of its
paper), after those of the gradient penalty. Other sizes have as many doublings, or halvings, as they need, of one width.
Spectral normalization itself is applied from outside (src.networks.spectral_norm).

References:
    He et al. 2016, "Deep residual learning for image recognition", arXiv:1512.03385.
    Gulrajani et al. 2017, "Improved training of Wasserstein GANs", arXiv:1704.00028: the ResNet for CIFAR-10.
    Miyato et al. 2018, "Spectral normalization for generative adversarial networks", arXiv:1802.05957, appendix B.4.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from src.core.errors import require_sizes
from src.core.shapes import append_condition
from src.networks.conditional_norm import batch_norm_for, require_batch_norm, run_layers
from src.networks.convolutional import base_and_doublings, crop

__all__ = ["ResidualDiscriminator", "ResidualGenerator"]

_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)

_RESIDUAL_GAIN = math.sqrt(2)  # of the 3x3 kernels in residual branches, as in the authors' code; 1 everywhere else
_FINAL_SIDE = 8  # the discriminator halves the image to about this
_NUM_FLAT = 2  # blocks of the discriminator that keep this side


class ResidualGenerator(nn.Module):
    """A vector to an image: one linear layer, then blocks that double the side, then batch norm, ReLU and a convolution.

    A block is batch norm, ReLU, nearest upsampling, 3x3, batch norm, ReLU, 3x3, beside a shortcut of upsampling and 1x1.
    A side that is no power of two is cropped from the next larger one that the base reaches. Convolutions in blocks have
    no bias with batch norm: the norm that follows the blocks would subtract it again, shortcut or not.

    Args:
        in_shape: `(D,)`.
        out_shape: `(C, S, S)`, S from 8 to 128.
        width: channels of every block.
        batch_norm: normalise as above; False leaves all norms out.
        conditional_batch_norm: the condition sets scale and shift of batch norm instead of being appended to the input.
        condition_dim: size K of the condition, appended to the input vector; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int = 256,
        batch_norm: bool = True,
        conditional_batch_norm: bool = False,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width)
        base, num_blocks = base_and_doublings(out_shape)
        norm_dim = require_batch_norm(conditional_batch_norm, batch_norm, condition_dim)
        self._appends_condition = norm_dim == 0
        self._side = out_shape[-1]
        start = nn.Linear(math.prod(in_shape) + condition_dim - norm_dim, width * base**2)
        self.start = nn.Sequential(_initialised(start, 1), nn.Unflatten(1, (width, base, base)))
        self.blocks = nn.ModuleList(_UpBlock(width, batch_norm, norm_dim) for _ in range(num_blocks))
        norm = [batch_norm_for(width, 2, norm_dim)] if batch_norm else []
        self.end = nn.Sequential(*norm, nn.ReLU(), _conv(width, out_shape[0], 3, gain=1))

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D)` and a condition `(B, K)` or None, to `(B, C, S, S)`."""
        x = self.start(append_condition(z.flatten(1), condition if self._appends_condition else None))
        for block in self.blocks:
            x = block(x, condition)
        return crop(run_layers(self.end, x, condition), self._side)


class ResidualDiscriminator(nn.Module):
    """An image to a vector (or one logit): residual blocks without norm, ReLU, sum over all positions, one linear layer.

    The first block halves the image, further ones halve it to about 8x8, two more keep that side. A block is ReLU, 3x3,
    ReLU, 3x3 and average pooling where it halves, beside a shortcut of 1x1 and the same pooling, or of nothing where it
    keeps the side. The first block has no ReLU before its first convolution.

    Args:
        in_shape: `(C, S, S)`, S from 8 to 128.
        out_shape: event shape of the output.
        width: channels of every block.
        condition_dim: size K of the condition, appended to the image as K constant planes; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int = 128,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width)
        base_and_doublings(in_shape)  # refuses what is no square image
        self._out_shape = tuple(out_shape)
        num_halvings = max(1, round(math.log2(in_shape[-1] / _FINAL_SIDE)))
        down = [_Block(width, width, halves=True) for _ in range(num_halvings - 1)]
        flat = [_Block(width, width, halves=False) for _ in range(_NUM_FLAT)]
        first = _Block(in_shape[0] + condition_dim, width, halves=True, is_first=True)
        self.blocks = nn.Sequential(first, *down, *flat, nn.ReLU())
        self.num_features = width
        self.head = _initialised(nn.Linear(width, math.prod(out_shape)), 1)

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the last layer sees, `(B, num_features)`."""
        return self.blocks(append_condition(x, condition)).sum((2, 3))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, S, S)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.head(self.features(x, condition)).unflatten(1, self._out_shape)


class _UpBlock(nn.Module):
    """`(B, width, S, S)` to `(B, width, 2 S, 2 S)`."""

    def __init__(self, width: int, batch_norm: bool, norm_dim: int) -> None:
        super().__init__()

        def norm() -> list[nn.Module]:
            return [batch_norm_for(width, 2, norm_dim)] if batch_norm else []

        def conv() -> nn.Module:
            return _conv(width, width, 3, _RESIDUAL_GAIN, bias=not batch_norm)

        grow = nn.Upsample(scale_factor=2)  # nearest
        self.residual = nn.Sequential(*norm(), nn.ReLU(), grow, conv(), *norm(), nn.ReLU(), conv())
        # a 1x1 convolution before the upsampling gives what it gives after it, for a quarter of the work
        self.shortcut = nn.Sequential(_conv(width, width, 1, gain=1, bias=not batch_norm), grow)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return run_layers(self.residual, x, condition) + self.shortcut(x)


class _Block(nn.Module):
    """`(B, c_in, S, S)` to `(B, c_out, S, S)`, or half the side."""

    def __init__(self, c_in: int, c_out: int, halves: bool, is_first: bool = False) -> None:
        super().__init__()
        convs = [_conv(c_in, c_out, 3, _RESIDUAL_GAIN), nn.ReLU(), _conv(c_out, c_out, 3, _RESIDUAL_GAIN)]
        pool = [nn.AvgPool2d(2)] if halves else []
        self.residual = nn.Sequential(*([] if is_first else [nn.ReLU()]), *convs, *pool)
        # pooling before a 1x1 convolution gives what it gives after it, for a quarter of the work
        self.shortcut = nn.Sequential(*pool, _conv(c_in, c_out, 1, gain=1)) if halves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


def _conv(c_in: int, c_out: int, kernel: int, gain: float, bias: bool = True) -> nn.Module:
    return _initialised(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias), gain)


def _initialised(layer: _Layer, gain: float) -> _Layer:
    """The layer with weights uniform after Glorot, Bengio 2010, and biases zero."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
