"""Multilayer perceptron from any event shape to any other."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Fully connected layers with one activation between them.

    Args:
        in_shape: event shape of the input; flattened.
        out_shape: event shape of the output.
        hidden: widths of the hidden layers.
        activation: module between the layers, stateless (it is shared).
        condition_dim: size K of the condition vector, appended to the flattened input; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        hidden: Sequence[int],
        activation: nn.Module,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        self._out_shape = tuple(out_shape)
        widths = [math.prod(in_shape) + condition_dim, *hidden, math.prod(out_shape)]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for width_in, width_out in zip(widths[1:-1], widths[2:], strict=True):
            layers += [activation, nn.Linear(width_in, width_out)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, *in_shape)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        flat = x.flatten(1)
        if condition is not None:
            flat = torch.cat([flat, condition.to(flat.dtype)], dim=1)
        return self.layers(flat).unflatten(1, self._out_shape)
