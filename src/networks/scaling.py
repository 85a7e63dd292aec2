"""Where a flow begins: values onto the real line, with mean 0 and standard deviation 1 in every dimension.

Its parameters are no weights: they are set by the training data before the first step.

References:
    Dinh, Sohl-Dickstein, Bengio 2017, "Density estimation using Real NVP", arXiv:1605.08803, section 4.1: the logit of
        values in an interval, drawn in a little so that its ends stay finite.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from src.core.shapes import sum_event

__all__ = ["Scaling", "logit", "sigmoid"]

_MARGIN = 1e-5  # so far are the ends of (0, 1) drawn in: their logits are -11.5 and 11.5


def logit(v: Tensor) -> tuple[Tensor, Tensor]:
    """y = log s / (1 - s) of s = a + (1 - 2a) v with a small margin a, and log |det dy/dv| = sum log (1 - 2a) / s(1 - s).

    Args:
        v: values in [0, 1], `(B, *event)`.

    Returns:
        y, same shape, and the log determinant, `(B,)` in nats.
    """
    s = _MARGIN + (1 - 2 * _MARGIN) * v
    log_s, log_rest = s.log(), torch.log1p(-s)
    return log_s - log_rest, sum_event(torch.log1p(s.new_tensor(-2 * _MARGIN)) - log_s - log_rest)


def sigmoid(y: Tensor) -> Tensor:
    """Inverse of `logit`; beyond its range the ends 0 and 1."""
    return ((y.sigmoid() - _MARGIN) / (1 - 2 * _MARGIN)).clamp(0, 1)


class Scaling(nn.Module):
    """z = (y - mean) / std in every dimension, of y = logit(v) for values v in [0, 1], or of y itself.

    Args:
        shape: event shape.
        is_bounded: the values are in [0, 1]; else any real numbers.
    """

    mean: Tensor
    log_std: Tensor

    def __init__(self, shape: Sequence[int], is_bounded: bool) -> None:
        super().__init__()
        self._is_bounded = is_bounded
        self.register_buffer("mean", torch.zeros(tuple(shape)))
        self.register_buffer("log_std", torch.zeros(tuple(shape)))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Mean and standard deviation of all values `(B, *event)`; where they are all the same, the scale stays 1."""
        count = 0
        total, squares = (torch.zeros_like(self.mean, dtype=torch.float64) for _ in range(2))
        for values in batches:
            y = (logit(values)[0] if self._is_bounded else values).double()
            count += len(y)
            total += y.sum(0)
            squares += y.square().sum(0)
        mean = total / count
        variance = squares / count - mean.square()
        has_spread = variance > 1e-12 * (squares / count)
        self.mean.copy_(mean)
        self.log_std.copy_(torch.where(has_spread, 0.5 * variance.clamp(min=1e-300).log(), 0))

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """z, same shape, and log |det dz/dv|, `(B,)` in nats."""
        y, log_det = logit(v) if self._is_bounded else (v, v.new_zeros(len(v)))
        return (y - self.mean) * (-self.log_std).exp(), log_det - self.log_std.sum()

    def inverse(self, z: Tensor) -> Tensor:
        """v, same shape."""
        y = self.mean + self.log_std.exp() * z
        return sigmoid(y) if self._is_bounded else y
