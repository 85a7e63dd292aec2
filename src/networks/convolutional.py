"""Strided convolutions down and transposed convolutions up, for square images of 8 to 128 pixels.

The shape of DCGAN (Radford, Metz, Chintala 2016, "Unsupervised representation learning with deep convolutional
generative adversarial networks", arXiv:1511.06434): 4x4 kernels, stride 2, width doubling with every halving of the
image, down to a base of 4x4 pixels (3x3 for some sides that are no power of two).
"""

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from src.core.errors import UserError, require_sizes
from src.core.shapes import append_condition
from src.networks.conditional_norm import batch_norm_for, require_batch_norm, run_layers

__all__ = ["ConvDecoder", "ConvEncoder", "base_and_doublings", "crop", "normal_init"]

_MIN_SIZE, _MAX_SIZE = 8, 128
_BASE = 4  # largest side of the innermost feature map


class ConvEncoder(nn.Module):
    """An image to a vector (or one logit): blocks of convolution, batch norm, leaky ReLU; then one linear layer.

    Args:
        in_shape: `(C, S, S)`, S from 8 to 128.
        out_shape: event shape of the output.
        width: channels after the first block; doubles with every block.
        batch_norm: normalise every block but the first (DCGAN, section 3).
        initial_std: standard deviation of the initial weights; None keeps torch's defaults.
        condition_dim: size K of the condition, appended to the image as K constant planes; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int,
        batch_norm: bool,
        initial_std: float | None,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width)
        _, num_blocks = base_and_doublings(in_shape)
        self._out_shape = tuple(out_shape)
        channels = [in_shape[0] + condition_dim] + [width * 2**i for i in range(num_blocks)]
        blocks: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            norm = batch_norm and i > 0
            blocks.append(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1, bias=not norm))
            blocks += [nn.BatchNorm2d(c_out)] if norm else []
            blocks.append(nn.LeakyReLU(0.2))
        side = in_shape[-1] // 2**num_blocks
        self.num_features = channels[-1] * side**2
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(self.num_features, math.prod(out_shape)))
        if initial_std is not None:
            normal_init(self, initial_std)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return cast("nn.Linear", self.layers[-1])

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the last layer sees, `(B, num_features)`."""
        return self.layers[:-1](append_condition(x, condition))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, S, S)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.head(self.features(x, condition)).unflatten(1, self._out_shape)


class ConvDecoder(nn.Module):
    """A vector to an image: one linear layer, then blocks of transposed convolution, batch norm, ReLU.

    The last block is a bare transposed convolution. A side that is no power of two is cropped from the next larger one
    that the base reaches.

    Args:
        in_shape: `(D,)`.
        out_shape: `(C, S, S)`, S from 8 to 128.
        width: channels before the last block; doubles with every block inward.
        batch_norm: normalise every block but the last.
        initial_std: standard deviation of the initial weights; None keeps torch's defaults.
        conditional_batch_norm: the condition sets scale and shift of batch norm instead of being appended to the input.
        condition_dim: size K of the condition, appended to the input vector; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int,
        batch_norm: bool,
        initial_std: float | None,
        conditional_batch_norm: bool = False,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width)
        base, num_blocks = base_and_doublings(out_shape)
        norm_dim = require_batch_norm(conditional_batch_norm, batch_norm, condition_dim)
        self._appends_condition = norm_dim == 0
        channels = [width * 2**i for i in reversed(range(num_blocks))] + [out_shape[0]]
        layers: list[nn.Module] = [
            nn.Linear(math.prod(in_shape) + condition_dim - norm_dim, channels[0] * base**2, bias=not batch_norm),
            nn.Unflatten(1, (channels[0], base, base)),
        ]
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            bias = not batch_norm or i == num_blocks - 1  # batch norm subtracts any bias again
            layers += [batch_norm_for(c_in, 2, norm_dim)] if batch_norm else []
            layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=bias)]
        self.layers = nn.Sequential(*layers)
        self._side = out_shape[-1]
        if initial_std is not None:
            normal_init(self, initial_std)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D)` and a condition `(B, K)` or None, to `(B, C, S, S)`."""
        z = append_condition(z.flatten(1), condition if self._appends_condition else None)
        return crop(run_layers(self.layers, z, condition), self._side)


def normal_init(network: nn.Module, std: float) -> None:
    """Weights of linear and convolutional layers from N(0, std), of batch norm from N(1, std), biases zero.

    DCGAN, section 3, uses std = 0.02.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, std)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.normal_(module.weight, 1.0, std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def base_and_doublings(shape: Sequence[int]) -> tuple[int, int]:
    """Side of the innermost feature map (3 or 4) and the number of doublings from there to the image."""
    if len(shape) != 3 or shape[1] != shape[2] or not _MIN_SIZE <= shape[1] <= _MAX_SIZE:
        given = "x".join(str(n) for n in shape)
        raise UserError(
            f"has convolutional networks, which take square images with a side of {_MIN_SIZE} to {_MAX_SIZE} pixels; the "
            f"data set gives {given} (for data=image_folder set data.size; or choose a model with MLP networks)"
        )
    num_blocks = math.ceil(math.log2(shape[1] / _BASE))
    return math.ceil(shape[1] / 2**num_blocks), num_blocks


def crop(x: Tensor, side: int) -> Tensor:
    """The middle `(B, C, side, side)` of images that are as large or larger."""
    margin = (x.shape[-1] - side) // 2
    inside = slice(margin, margin + side)
    return x[:, :, inside, inside]
