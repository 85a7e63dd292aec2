"""Drawing from a distribution that is given place by place, each from the places before it."""

from collections.abc import Callable

import torch
from torch import Tensor

from src.core.rng import Noise

__all__ = ["ancestral_sample"]


@torch.no_grad()
def ancestral_sample(
    logits_of: Callable[[Tensor], Tensor], n: int, grid: tuple[int, int], noise: Noise, like: Tensor
) -> Tensor:
    """n draws of codes on a grid `(h, w)`, row by row, `(n, h, w)` int64; each place by inversion of its cumulated
    probabilities at one uniform number of the sample's own noise.

    Args:
        logits_of: from codes `(n, h, w)` to logits `(n, K, h, w)`, of each place from those before it; called h w times.
        grid: height and width.
        noise: row i of what it gives belongs to sample i.
        like: on whose device to draw.
    """
    height, width = grid
    codes = torch.zeros(n, height, width, dtype=torch.int64, device=like.device)
    u = noise.uniform((n, height * width), like=like).unflatten(1, grid)
    for row in range(height):
        for column in range(width):
            logits = logits_of(codes)[:, :, row, column]
            cumulated = logits.double().softmax(1).cumsum(1)
            code = (cumulated < u[:, row, column, None]).sum(1)
            codes[:, row, column] = code.clamp(max=logits.shape[1] - 1)
    return codes
