"""Intervals of shares and means."""

import math

from torch import Tensor

__all__ = ["mean_interval", "wilson_interval"]

_Z = 1.959964  # 97.5 % of the normal distribution


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, from `hits` out of `count` > 0 (Wilson 1927)."""
    share = hits / count
    centre = share + _Z**2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    low, high = (centre - half) / scale, (centre + half) / scale
    return 0.0 if hits == 0 else low, 1.0 if hits == count else high  # not nearly: rounding aside, these ends are exact


def mean_interval(values: Tensor) -> tuple[float, float] | None:
    """The 95 % interval of a mean from independent values `(N,)`, by the standard error; None for a single value."""
    if len(values) < 2:
        return None
    mean, half = float(values.mean()), _Z * float(values.std()) / math.sqrt(len(values))
    return mean - half, mean + half
