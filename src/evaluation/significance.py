"""Is a difference more than chance? Intervals and tests for runs that share seeds, and for single values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Difference", "holm", "independent_difference", "paired_difference", "sign_flip_p"]

_Z = 1.96  # 97.5 % point of the standard normal distribution
_ROUNDING = 1e-9  # a spread below this part of the values is none


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval, and the two-sided p of "there is none"."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(differences: Sequence[float]) -> Difference | None:
    """Mean of n >= 2 paired differences `(n,)`, in their unit: mean ± t_{n-1, 0.975} sd / sqrt(n), with the t-test's p.

    None where they are all the same: a few equal differences do not say how much another one would differ.

    References:
        Student 1908, "The probable error of a mean".
    """
    from scipy.special import stdtr, stdtrit

    n, sd = len(differences), stdev(differences)
    if sd <= _ROUNDING * max(map(abs, differences)):
        return None
    mean, error = fmean(differences), sd / math.sqrt(n)
    half = float(stdtrit(n - 1, 0.975)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return Difference(mean, mean - half, mean + half, p)


def independent_difference(
    y: float, y_interval: tuple[float, float], x: float, x_interval: tuple[float, float]
) -> Difference | None:
    """y - x of independent values with 95 % intervals, in their unit: y - x ± 1.96 sqrt(se_y^2 + se_x^2).

    A standard error se is half an interval / 1.96; the p is that of the normal distribution. None where an interval has no
    width: it comes from values that were all the same, as a share of exactly 1, and is no measure of what is not known.
    """
    if any(high - low <= _ROUNDING * max(abs(low), abs(high)) for low, high in (y_interval, x_interval)):
        return None
    error = math.hypot(y_interval[1] - y_interval[0], x_interval[1] - x_interval[0]) / 2 / _Z
    value, half = y - x, _Z * error
    p = math.erfc(abs(value) / error / math.sqrt(2))
    return Difference(value, value - half, value + half, p)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p of paired differences `(n,)`: the part of all 2^n sign flips whose |sum| is at least the one seen.

    References:
        Fisher 1935, "The design of experiments", section 21.
    """
    sums = [0.0]
    for d in differences:
        sums = [total + signed for signed in (d, -d) for total in sums]
    seen = abs(math.fsum(differences)) - 1e-9 * math.fsum(map(abs, differences))  # equal sums differ by rounding
    return sum(abs(total) >= seen for total in sums) / len(sums)


def holm(ps: Sequence[float]) -> list[float]:
    """Each p `(m,)` adjusted for being one of m: the largest min(1, (m - j + 1) p_(j)) of those up to it in order of size.

    References:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = largest
    return adjusted
