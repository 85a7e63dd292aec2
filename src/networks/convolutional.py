"""Strided convolutions down and transposed convolutions up, for square images of 8 to 128 pixels.

The shape of DCGAN (Radford, Metz, Chintala 2016, "Unsupervised representation learning with deep convolutional
generative adversarial networks", arXiv:1511.06434): 4x4 kernels, stride 2, width doubling with every halving of the
image, down to a base of 4x4 pixels (3x3 for some sides that are no power of two).
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from src.core.errors import UserError
from src.core.shapes import append_condition

__all__ = ["ConvDecoder", "ConvEncoder", "normal_init"]

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
        _, num_blocks = _base(in_shape)
        self._out_shape = tuple(out_shape)
        channels = [in_shape[0] + condition_dim] + [width * 2**i for i in range(num_blocks)]
        blocks: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            norm = batch_norm and i > 0
            blocks.append(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1, bias=not norm))
            blocks += [nn.BatchNorm2d(c_out)] if norm else []
            blocks.append(nn.LeakyReLU(0.2))
        side = in_shape[-1] // 2**num_blocks
        head = nn.Linear(channels[-1] * side**2, math.prod(out_shape))
        self.layers = nn.Sequential(*blocks, nn.Flatten(), head)
        if initial_std is not None:
            normal_init(self, initial_std)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, S, S)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.layers(append_condition(x, condition)).unflatten(1, self._out_shape)


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
        condition_dim: size K of the condition, appended to the input vector; 0 for none.
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
        base, num_blocks = _base(out_shape)
        channels = [width * 2**i for i in reversed(range(num_blocks))] + [out_shape[0]]
        layers: list[nn.Module] = [
            nn.Linear(math.prod(in_shape) + condition_dim, channels[0] * base**2, bias=not batch_norm),
            nn.Unflatten(1, (channels[0], base, base)),
        ]
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            bias = not batch_norm or i == num_blocks - 1  # batch norm subtracts any bias again
            layers += [nn.BatchNorm2d(c_in)] if batch_norm else []
            layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=bias)]
        self.layers = nn.Sequential(*layers)
        self._side = out_shape[-1]
        self._margin = (base * 2**num_blocks - self._side) // 2
        if initial_std is not None:
            normal_init(self, initial_std)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D)` and a condition `(B, K)` or None, to `(B, C, S, S)`."""
        x = self.layers(append_condition(z.flatten(1), condition))
        inside = slice(self._margin, self._margin + self._side)
        return x[:, :, inside, inside]


def normal_init(network: nn.Module, std: float) -> None:
    """Weights of linear and convolutional layers from N(0, std), of batch norm from N(1, std), biases zero.

    DCGAN, section 3, uses std = 0.02.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, std)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _base(shape: Sequence[int]) -> tuple[int, int]:
    """Side of the innermost feature map (3 or 4) and the number of doublings from there to the image."""
    if len(shape) != 3 or shape[1] != shape[2] or not _MIN_SIZE <= shape[1] <= _MAX_SIZE:
        given = "x".join(str(n) for n in shape)
        raise UserError(
            f"has convolutional networks, which take square images with a side of {_MIN_SIZE} to {_MAX_SIZE} pixels; the "
            f"data set gives {given} (for data=image_folder set data.size; or choose a model with MLP networks)"
        )
    num_blocks = math.ceil(math.log2(shape[1] / _BASE))
    return math.ceil(shape[1] / 2**num_blocks), num_blocks
