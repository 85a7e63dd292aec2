"""A small U-Net that knows the time, for images of any size from 8 pixels on.

References:
    Ronneberger, Fischer, Brox 2015, "U-Net: convolutional networks for biomedical image segmentation", arXiv:1505.04597.
    Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models", arXiv:2006.11239: group norm, attention, time.
    Dhariwal, Nichol 2021, "Diffusion models beat GANs on image synthesis", arXiv:2105.05233: the time and the class set
        scale and shift of group norm; residual branches, and the network, start at zero.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError, require_sizes
from src.networks.resampling import with_even_sides
from src.networks.time_embedding import TimeEmbedding

__all__ = ["UNet"]

_MIN_SIZE = 8
_MIN_INNER = 2  # smallest side of the innermost feature map
_MAX_GROUPS, _GROUP_SIZE = 32, 4  # of group norm: at most so many groups, of at least so many channels
_HEAD_SIZE = 64  # channels of an attention head
_EMBEDDING_FACTOR = 4  # length of the embedding of time and condition, over the width


class UNet(nn.Module):
    """Residual blocks at falling resolutions and back, each block on the way back joined to its twin on the way there.

    A level is `num_blocks` residual blocks; between two levels the image is halved by averaging, its odd last row or column
    standing in for the one that is missing, or doubled by repeating pixels and cropped to where it was. At the lowest
    resolution there are two more blocks in the middle. The output layer starts at zero, so that all answers do.

    There are no batch statistics: an example's answer does not depend on the others.

    Args:
        in_shape: `(C, H, W)`.
        out_shape: `(C', H, W)`.
        width: channels at the image's own resolution.
        multipliers: channels of each level, over `width`; as many levels as there are numbers.
        num_blocks: residual blocks of a level, on each way.
        num_attention_levels: so many of the lowest resolutions have self-attention after every block; 0 for none.
        dropout: share of values that are dropped inside a residual block in training.
        condition_dim: size K of the condition vector, added to the time's embedding; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 1,
        num_attention_levels: int = 1,
        dropout: float = 0.0,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width, num_blocks=num_blocks, **{f"multipliers[{i}]": m for i, m in enumerate(multipliers)})
        _require_image(in_shape, out_shape, len(multipliers))
        _require_settings(num_attention_levels, len(multipliers), dropout)
        size = _EMBEDDING_FACTOR * width
        channels = [width * multiplier for multiplier in multipliers]
        attends = [len(channels) - i <= num_attention_levels for i in range(len(channels))]
        inner = channels[-1]

        def block(c_in: int, c_out: int, has_attention: bool) -> nn.Module:
            return _Block(c_in, c_out, size, dropout, has_attention)

        self.embedding = TimeEmbedding(size, condition_dim)
        self.start = nn.Conv2d(in_shape[0], width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for (c_in, c_out), has_attention in zip(itertools.pairwise([width, *channels]), attends, strict=True):
            sizes = [c_in] + [c_out] * num_blocks
            self.down.append(nn.ModuleList(block(a, b, has_attention) for a, b in itertools.pairwise(sizes)))
        self.middle = nn.ModuleList([block(inner, inner, num_attention_levels > 0), block(inner, inner, False)])
        levels = zip(itertools.pairwise([inner, *reversed(channels)]), reversed(attends), strict=True)
        for (c_in, c_out), has_attention in levels:
            sizes = [c_in] + [c_out] * num_blocks
            self.up.append(nn.ModuleList(block(a + c_out, b, has_attention) for a, b in itertools.pairwise(sizes)))
        self.end = nn.Sequential(_norm(width * multipliers[0]), nn.SiLU())
        self.head = nn.Conv2d(width * multipliers[0], out_shape[0], 3, padding=1)
        _start_at_zero(self.head)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, H, W)`, times `(B,)` about as large as 1, and a condition `(B, K)` or None, to `(B, C', H, W)`."""
        embedding = self.embedding(t, condition)
        x = self.start(x)
        twins = []
        for i, level in enumerate(self.down):
            x = F.avg_pool2d(with_even_sides(x), 2) if i > 0 else x
            for block in level:
                x = block(x, embedding)
                twins.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for level in self.up:
            x = _grown(x, twins[-1])
            for block in level:
                x = block(torch.cat([x, twins.pop()], 1), embedding)
        return self.head(self.end(x))


class _Block(nn.Module):
    """Group norm, SiLU, 3x3, group norm with scale and shift by the embedding, SiLU, 3x3, beside a shortcut; attention."""

    def __init__(self, c_in: int, c_out: int, embedding_size: int, dropout: float, has_attention: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.norm = _norm(c_out)
        self.of_embedding = nn.Linear(embedding_size, 2 * c_out)
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1))
        _start_at_zero(self.second[-1])
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = _Attention(c_out) if has_attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.of_embedding(embedding)[:, :, None, None].chunk(2, 1)
        y = self.norm(self.first(x)) * (1 + scale) + shift
        return self.attention(self.second(y) + self.shortcut(x))


class _Attention(nn.Module):
    """Every pixel looks at all pixels (Vaswani et al. 2017, arXiv:1706.03762), beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._num_heads = _largest_divisor(channels, max(1, channels // _HEAD_SIZE))
        self.norm = _norm(channels)
        self.queries_keys_values = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        _start_at_zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        of_heads = self.queries_keys_values(self.norm(x)).flatten(2).unflatten(1, (3, self._num_heads, -1))
        queries, keys, values = of_heads.transpose(-1, -2).unbind(1)  # (B, heads, pixels, channels of a head) each
        seen = F.scaled_dot_product_attention(queries, keys, values)
        return x + self.out(seen.transpose(-1, -2).reshape(x.shape))


def _grown(x: Tensor, twin: Tensor) -> Tensor:
    """`(B, C, h, w)` with its pixels repeated and cropped to the size of its twin, or as it is if it has that size."""
    if x.shape[2:] == twin.shape[2:]:
        return x
    return F.interpolate(x, scale_factor=2)[:, :, : twin.shape[2], : twin.shape[3]]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_largest_divisor(channels, min(_MAX_GROUPS, max(1, channels // _GROUP_SIZE))), channels)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most the limit."""
    return next(divisor for divisor in range(limit, 0, -1) if number % divisor == 0)


def _start_at_zero(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Conv2d)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def _require_image(in_shape: Sequence[int], out_shape: Sequence[int], num_levels: int) -> None:
    if len(in_shape) != 3 or min(in_shape[1:]) < _MIN_SIZE:
        given = "x".join(str(n) for n in in_shape)
        raise UserError(
            f"has a U-Net, which takes images with sides of at least {_MIN_SIZE} pixels; the data set gives {given} "
            "(choose a network for vectors, as network=time_mlp, or another data set with data=)"
        )
    assert tuple(out_shape[1:]) == tuple(in_shape[1:]), "a U-Net's output has the size of its input"
    inner = -(-min(in_shape[1:]) // 2 ** (num_levels - 1))  # halved, and rounded up, at every level but the first
    if inner < _MIN_INNER:
        raise UserError(
            f"has a network with {num_levels} multipliers, which halve the {in_shape[1]}x{in_shape[2]} images to less than "
            f"{_MIN_INNER} pixels; give fewer multipliers"
        )


def _require_settings(num_attention_levels: int, num_levels: int, dropout: float) -> None:
    if num_levels < 1:
        raise UserError("has a network with multipliers=[], which must be at least one number")
    if not 0 <= num_attention_levels <= num_levels:
        raise UserError(
            f"has a network with num_attention_levels={num_attention_levels}, which must be from 0 to {num_levels}, "
            "the number of its multipliers"
        )
    if not 0 <= dropout < 1:
        raise UserError(f"has a network with dropout={dropout}, which must be at least 0 and less than 1")
