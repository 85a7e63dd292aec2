"""Doubling and halving of images without aliasing, by the filter (1, 3, 3, 1) / 8 in both directions."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["downsample", "smoothing_filter", "stage_channels", "upsample", "with_even_sides"]


def stage_channels(width: int, max_width: int, num_halvings: int) -> list[int]:
    """Channels of each stage, from the image inward."""
    return [min(width * 2**i, max_width) for i in range(num_halvings + 1)]


def upsample(x: Tensor) -> Tensor:
    """`(B, C, H, W)` to `(B, C, 2H, 2W)`, bilinearly; beyond its border the image goes on as it ends."""
    return F.conv_transpose2d(_framed(x), 4 * smoothing_filter(x), stride=2, padding=3, groups=x.shape[1])


def downsample(x: Tensor) -> Tensor:
    """`(B, C, H, W)` to half the side, rounded up, by the same filter; beyond its border the image goes on as it ends."""
    return F.conv2d(_framed(with_even_sides(x)), smoothing_filter(x), stride=2, groups=x.shape[1])


def smoothing_filter(like: Tensor) -> Tensor:
    """(1, 3, 3, 1) / 8 in both directions, `(C, 1, 4, 4)`, made without a copy from the host."""
    distance = (torch.arange(4, device=like.device, dtype=like.dtype) - 1.5).abs()
    taps = 0.5 - 0.25 * distance
    return torch.outer(taps, taps).expand(like.shape[1], 1, 4, 4)


def _framed(x: Tensor) -> Tensor:
    """One more pixel on every side, a copy of the next one. Torch's own has no repeatable gradient on a GPU."""
    x = torch.cat([x[..., :1], x, x[..., -1:]], dim=-1)
    return torch.cat([x[..., :1, :], x, x[..., -1:, :]], dim=-2)


def with_even_sides(x: Tensor) -> Tensor:
    """The last row and the last column twice where their number is odd."""
    x = torch.cat([x, x[..., -1:]], dim=-1) if x.shape[-1] % 2 else x
    return torch.cat([x, x[..., -1:, :]], dim=-2) if x.shape[-2] % 2 else x
