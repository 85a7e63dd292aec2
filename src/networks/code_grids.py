"""From examples to a grid of vectors and back: what a VQ-VAE quantizes. A grid is `(B, D, h, w)`.

References:
    van den Oord, Vinyals, Kavukcuoglu 2017, "Neural discrete representation learning", arXiv:1711.00937, section 4.1:
        strided 4x4 convolutions, then residual blocks of ReLU, 3x3 convolution, ReLU, 1x1 convolution.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from src.core.errors import UserError, require_sizes
from src.core.shapes import append_condition, flatten_event

__all__ = ["ConvGridDecoder", "ConvGridEncoder", "SlotDecoder", "SlotEncoder"]


class _ResidualBlock(nn.Module):
    """x + block(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvGridEncoder(nn.Module):
    """An image to a grid that is smaller by 2^num_halvings in height and width.

    Args:
        in_shape: `(C, H, W)`, H and W multiples of 2^num_halvings.
        code_dim: channels D of the grid.
        num_halvings: strided convolutions, each of which halves height and width.
        width: channels between.
        num_blocks: residual blocks after them.
        condition_dim: size K of the condition, appended to the image as K constant planes; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        code_dim: int,
        num_halvings: int,
        width: int,
        num_blocks: int,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(code_dim=code_dim, num_halvings=num_halvings, width=width)
        self.grid = _halved(in_shape, num_halvings)
        layers: list[nn.Module] = []
        channels = [in_shape[0] + condition_dim] + [width] * num_halvings
        for c_in, c_out in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), *(_ResidualBlock(width) for _ in range(num_blocks))]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, code_dim, 1))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, H, W)` and a condition `(B, K)` or None, to `(B, D, h, w)`."""
        return self.layers(append_condition(x, condition))


class ConvGridDecoder(nn.Module):
    """A grid to an image that is larger by 2^num_halvings in height and width: the encoder backwards.

    Args:
        out_shape: `(C, H, W)`, H and W multiples of 2^num_halvings.
        code_dim: channels D of the grid.
        num_halvings, width, num_blocks: see `ConvGridEncoder`.
        condition_dim: size K of the condition, appended to the grid as K constant planes; 0 for none.
    """

    def __init__(
        self,
        out_shape: Sequence[int],
        code_dim: int,
        num_halvings: int,
        width: int,
        num_blocks: int,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(code_dim=code_dim, num_halvings=num_halvings, width=width)
        self.grid = _halved(out_shape, num_halvings)
        layers: list[nn.Module] = [nn.Conv2d(code_dim + condition_dim, width, 3, padding=1)]
        layers += [_ResidualBlock(width) for _ in range(num_blocks)]
        channels = [width] * num_halvings + [out_shape[0]]
        for c_in, c_out in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D, h, w)` and a condition `(B, K)` or None, to `(B, C, H, W)`."""
        return self.layers(append_condition(codes, condition))


class SlotEncoder(nn.Module):
    """A vector, or anything flattened, to a row of vectors by fully connected layers: a grid `(1, num_slots)`.

    Args:
        in_shape: event shape of the input.
        code_dim: D.
        num_slots: vectors for each example.
        hidden: widths of the hidden layers.
        condition_dim: size K of the condition, appended to the input; 0 for none.
    """

    def __init__(
        self, in_shape: Sequence[int], code_dim: int, num_slots: int, hidden: Sequence[int], condition_dim: int = 0
    ) -> None:
        super().__init__()
        require_sizes(code_dim=code_dim, num_slots=num_slots)
        self.grid = (1, num_slots)
        self._shape = (code_dim, *self.grid)
        self.layers = _fully_connected(math.prod(in_shape) + condition_dim, hidden, math.prod(self._shape))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, *in_shape)` and a condition `(B, K)` or None, to `(B, D, 1, num_slots)`."""
        return self.layers(append_condition(flatten_event(x), condition)).unflatten(1, self._shape)


class SlotDecoder(nn.Module):
    """A row of vectors to an example, by fully connected layers.

    Args:
        out_shape: event shape of the output.
        code_dim, num_slots, hidden: see `SlotEncoder`.
        condition_dim: size K of the condition, appended to the vectors; 0 for none.
    """

    def __init__(
        self, out_shape: Sequence[int], code_dim: int, num_slots: int, hidden: Sequence[int], condition_dim: int = 0
    ) -> None:
        super().__init__()
        require_sizes(code_dim=code_dim, num_slots=num_slots)
        self.grid = (1, num_slots)
        self._out_shape = tuple(out_shape)
        self.layers = _fully_connected(num_slots * code_dim + condition_dim, hidden, math.prod(out_shape))

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D, 1, num_slots)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.layers(append_condition(flatten_event(codes), condition)).unflatten(1, self._out_shape)


def _fully_connected(num_in: int, hidden: Sequence[int], num_out: int) -> nn.Sequential:
    require_sizes(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    widths = [num_in, *hidden]
    layers: list[nn.Module] = []
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_out))


def _halved(shape: Sequence[int], num_halvings: int) -> tuple[int, int]:
    """Height and width after so many halvings."""
    step = 2**num_halvings
    if len(shape) != 3 or shape[1] % step or shape[2] % step:
        given = "x".join(str(n) for n in shape)
        raise UserError(
            f"has convolutional networks, which take images whose sides are multiples of {step}; the data set gives "
            f"{given} (set encoder.num_halvings and decoder.num_halvings, or for vectors network@encoder=slot_encoder and "
            "network@decoder=slot_decoder)"
        )
    return shape[1] // step, shape[2] // step
