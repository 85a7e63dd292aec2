"""The few reshapes that everybody needs: event dimensions and conditions."""

import torch
from torch import Tensor

__all__ = ["append_condition", "expand_like", "flatten_event", "sum_event"]


def sum_event(x: Tensor) -> Tensor:
    """`(B, *event)` to `(B,)`: the sum over all event dimensions."""
    return x.flatten(1).sum(1)


def flatten_event(x: Tensor) -> Tensor:
    """`(B, *event)` to `(B, D)`."""
    return x.flatten(1)


def expand_like(v: Tensor, x: Tensor) -> Tensor:
    """`(B, K)` to `(B, K, *x.shape[2:])`: one constant plane for each of K features."""
    return v.reshape(*v.shape, *([1] * (x.ndim - 2))).expand(*v.shape, *x.shape[2:])


def append_condition(x: Tensor, condition: Tensor | None) -> Tensor:
    """Append a condition vector `(B, K)` to the channels of `x` `(B, C, ...)`: `(B, C+K, ...)`; None appends nothing."""
    if condition is None:
        return x
    return torch.cat([x, expand_like(condition.to(x.dtype), x)], dim=1)
