"""Flows of vectors through zuko: neural spline flows and masked autoregressive flows.

A transform changes every value by an increasing function whose parameters a masked network computes from the values
before it (of its own order) and the condition, so its Jacobian is triangular. With `passes=2` the values are in two
halves, of which the first conditions the second: a coupling, inverted in two evaluations instead of one for each value.

References:
    Papamakarios, Pavlakou, Murray 2017, "Masked autoregressive flow for density estimation", arXiv:1705.07057.
    Durkan, Bekasov, Murray, Papamakarios 2019, "Neural spline flows", arXiv:1906.04032.
    Rozet et al. 2022, "Zuko: normalizing flows in PyTorch", https://github.com/probabilists/zuko: the implementation.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from zuko.flows import MaskedAutoregressiveTransform
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

from src.core.errors import require_sizes

__all__ = ["MaskedAutoregressiveFlow", "NeuralSplineFlow"]


class _AutoregressiveFlow(nn.Module):
    """A chain of transforms from data to N(0, I), on flattened events.

    The order of the values is drawn once for each pair of transforms, of which the second has it reversed.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        hidden: Sequence[int],
        num_transforms: int,
        passes: int | None,
        condition_dim: int,
        univariate: Callable[..., Transform],
        shapes: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        require_sizes(num_transforms=num_transforms, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        if passes is not None:
            require_sizes(passes=passes)
        self._shape = tuple(in_shape)
        dim = math.prod(in_shape)
        chain: list[nn.Module] = []
        order = torch.arange(dim)
        for i in range(num_transforms):
            order = order.flip(0) if i % 2 else torch.randperm(dim)
            same: dict[str, Any] = {"univariate": univariate, "shapes": shapes, "hidden_features": tuple(hidden)}
            chain.append(MaskedAutoregressiveTransform(dim, condition_dim, passes, order, **same))
        self.transforms = nn.ModuleList(chain)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(B, *in_shape)` and a condition `(B, K)` or None, to z, same shape, and log |det dz/dx|, `(B,)` in nats."""
        z, log_det = x.flatten(1), x.new_zeros(len(x))
        for transform in self._given(condition, z):
            z, more = transform.call_and_ladj(z)
            log_det = log_det + more
        return z.unflatten(1, self._shape), log_det

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """x `(B, *in_shape)` of z, same shape."""
        x = z.flatten(1)
        for transform in reversed(self._given(condition, x)):
            x = transform.inv(x)
        return x.unflatten(1, self._shape)

    def _given(self, condition: Tensor | None, like: Tensor) -> list[Any]:
        given = None if condition is None else condition.to(like.dtype)
        return [lazy(given) for lazy in self.transforms]


class NeuralSplineFlow(_AutoregressiveFlow):
    """Monotonic rational-quadratic splines on [-5, 5] and the identity beyond, for standardized values.

    Args:
        in_shape: event shape, flattened.
        hidden: widths of the hidden layers of each transform's network.
        num_transforms: transforms in the chain.
        num_bins: pieces of each spline.
        passes: 2 for couplings; null for fully autoregressive transforms, sampled in one pass for each value.
        condition_dim: size K of the condition vector; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        hidden: Sequence[int],
        num_transforms: int,
        num_bins: int,
        passes: int | None,
        condition_dim: int = 0,
    ) -> None:
        require_sizes(num_bins=num_bins)
        shapes = [(num_bins,), (num_bins,), (num_bins - 1,)]  # widths, heights, slopes at the inner knots
        spline = partial(MonotonicRQSTransform, slope=1e-3)
        super().__init__(in_shape, hidden, num_transforms, passes, condition_dim, spline, shapes)


class MaskedAutoregressiveFlow(_AutoregressiveFlow):
    """Shift and scale, y = exp(a) x + b. See `NeuralSplineFlow` for the arguments."""

    def __init__(
        self,
        in_shape: Sequence[int],
        hidden: Sequence[int],
        num_transforms: int,
        passes: int | None,
        condition_dim: int = 0,
    ) -> None:
        super().__init__(in_shape, hidden, num_transforms, passes, condition_dim, MonotonicAffineTransform, [(), ()])
