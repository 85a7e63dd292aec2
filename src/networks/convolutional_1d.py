"""Strided convolutions down and transposed convolutions up, for waveforms of one channel or more.

The shape of WaveGAN (Donahue, McAuley, Puckette 2019, "Adversarial audio synthesis", arXiv:1802.04208): a DCGAN in one
dimension, with a stride of 4, and kernels that are longer than those of images, since neighbouring samples are alike.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError, require_sizes
from src.core.shapes import append_condition

__all__ = ["Conv1dDecoder", "Conv1dEncoder"]

_STRIDE = 4
_BASE = 16  # largest length of the innermost feature map
_MAX_FACTOR = 16  # of the width


class Conv1dEncoder(nn.Module):
    """A waveform to a vector: blocks of convolution, batch norm and leaky ReLU; then one linear layer.

    Args:
        in_shape: `(C, T)`; a length that is no multiple of the strides is padded with zeros at the end.
        out_shape: event shape of the output.
        width: channels after the first block; doubles with every block, up to 16 times as many.
        kernel_size: of the convolutions, even, at least 4.
        batch_norm: normalise every block but the first.
        condition_dim: size K of the condition, appended to the waveform as K constant channels; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int,
        kernel_size: int,
        batch_norm: bool,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        base, num_blocks, padding = _sizes(in_shape, width, kernel_size)
        self._out_shape = tuple(out_shape)
        self._length = base * _STRIDE**num_blocks
        channels = [in_shape[0] + condition_dim, *_widths(width, num_blocks)]
        blocks: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            norm = batch_norm and i > 0
            blocks.append(nn.Conv1d(c_in, c_out, kernel_size, stride=_STRIDE, padding=padding, bias=not norm))
            blocks += [nn.BatchNorm1d(c_out)] if norm else []
            blocks.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels[-1] * base, math.prod(out_shape)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, T)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        padded = F.pad(x, (0, self._length - x.shape[2]))
        return self.layers(append_condition(padded, condition)).unflatten(1, self._out_shape)


class Conv1dDecoder(nn.Module):
    """A vector to a waveform: one linear layer, then blocks of batch norm, ReLU and transposed convolution.

    Args:
        in_shape: `(D,)`.
        out_shape: `(C, T)`; what is beyond this length is cut off.
        width: channels before the last block; doubles with every block inward, up to 16 times as many.
        kernel_size: of the convolutions, even, at least 4.
        batch_norm: normalise before every ReLU.
        condition_dim: size K of the condition, appended to the input vector; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int,
        kernel_size: int,
        batch_norm: bool,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        base, num_blocks, padding = _sizes(out_shape, width, kernel_size)
        channels = [*reversed(_widths(width, num_blocks)), out_shape[0]]
        layers: list[nn.Module] = [
            nn.Linear(math.prod(in_shape) + condition_dim, channels[0] * base, bias=not batch_norm),
            nn.Unflatten(1, (channels[0], base)),
        ]
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            bias = not batch_norm or i == num_blocks - 1  # batch norm subtracts any bias again
            layers += [nn.BatchNorm1d(c_in)] if batch_norm else []
            layers += [nn.ReLU(), nn.ConvTranspose1d(c_in, c_out, kernel_size, _STRIDE, padding, bias=bias)]
        self.layers = nn.Sequential(*layers)
        self._length = out_shape[1]

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D)` and a condition `(B, K)` or None, to `(B, C, T)`."""
        return self.layers(append_condition(z.flatten(1), condition))[:, :, : self._length]


def _sizes(shape: Sequence[int], width: int, kernel_size: int) -> tuple[int, int, int]:
    """Length of the innermost feature map, the number of strides from there to the waveform, and the padding of each."""
    require_sizes(width=width, kernel_size=kernel_size)
    if len(shape) != 2 or shape[1] < _STRIDE:
        given = "x".join(str(n) for n in shape)
        raise UserError(
            f"has convolutional networks in one dimension, which take waveforms of at least {_STRIDE} samples; the data "
            f"set gives {given} (choose data=fsdd or data=audio_folder, with data.representation=waveform)"
        )
    if kernel_size < _STRIDE or kernel_size % 2:
        raise UserError(f"has a network with kernel_size={kernel_size}, which must be even and at least {_STRIDE}")
    num_blocks = max(1, math.ceil(math.log(shape[1] / _BASE, _STRIDE)))
    return math.ceil(shape[1] / _STRIDE**num_blocks), num_blocks, (kernel_size - _STRIDE) // 2


def _widths(width: int, num_blocks: int) -> list[int]:
    return [width * min(2**i, _MAX_FACTOR) for i in range(num_blocks)]
