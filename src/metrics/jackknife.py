"""The block jackknife: how far a statistic of a sample may be from its value on all that could have been drawn.

The sample is cut into G blocks; the statistic is computed on all of them, and on all but one, in turn:

    corrected = G T - (G - 1) mean_g T_{-g}                     free of bias of order 1/N
    SE^2      = (G - 1) / G  sum_g (T_{-g} - mean_g T_{-g})^2

and the 95 % interval is corrected +- t_{G-1} SE. A bootstrap would count the bias of a Fréchet distance twice.

References:
    Quenouille 1956, "Notes on bias in estimation"; Tukey 1958 (the standard error).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["NUM_BLOCKS", "Jackknife", "block_of", "jackknife"]

NUM_BLOCKS = 20


@dataclass(frozen=True)
class Jackknife:
    """A statistic with its uncertainty.

    Args:
        corrected: the value without its bias of order 1/N.
        standard_error: of one standard deviation.
        half_width: of the 95 % interval.
    """

    corrected: float
    standard_error: float
    half_width: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval around the corrected value."""
        return self.around(self.corrected)

    def around(self, value: float) -> tuple[float, float]:
        return value - self.half_width, value + self.half_width


def jackknife(full: Tensor, left_out: Tensor) -> Jackknife:
    """Bias-corrected value, standard error and 95 % interval.

    Args:
        full: `()`, the statistic of all blocks.
        left_out: `(G,)`, of all but one, in turn; blocks of (nearly) equal size.
    """
    num_blocks = len(left_out)
    mean = left_out.mean()
    standard_error = float(((num_blocks - 1) / num_blocks * (left_out - mean).square().sum()).sqrt())
    corrected = float(num_blocks * full - (num_blocks - 1) * mean)
    return Jackknife(corrected, standard_error, _student_quantile(num_blocks - 1) * standard_error)


def block_of(num_samples: int, num_blocks: int = NUM_BLOCKS) -> Tensor:
    """`(N,)` int64: sample i is in block i mod G, however the samples come in batches."""
    return torch.arange(num_samples) % num_blocks


@cache
def _student_quantile(degrees_of_freedom: int) -> float:
    """97.5 % of Student's t."""
    from scipy.stats import t  # slow to import

    return float(t.ppf(0.975, degrees_of_freedom))
