"""Multilayer perceptrons from any event shape to any other."""

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from src.core.errors import require_sizes
from src.core.shapes import append_condition
from src.networks.conditional_norm import batch_norm_for, require_batch_norm, run_layers
from src.networks.convolutional import normal_init

__all__ = ["MLP", "MaxoutMLP"]


class MLP(nn.Module):
    """Fully connected layers with one activation between them.

    Args:
        in_shape: event shape of the input; flattened.
        out_shape: event shape of the output.
        hidden: widths of the hidden layers.
        activation: module between the layers, stateless (it is shared).
        batch_norm: normalise before every activation; the linear layers before it have no bias.
        conditional_batch_norm: the condition sets scale and shift of batch norm instead of being appended to the input.
        initial_std: standard deviation of the initial weights; None keeps torch's defaults.
        condition_dim: size K of the condition vector, appended to the flattened input; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        hidden: Sequence[int],
        activation: nn.Module,
        batch_norm: bool = False,
        conditional_batch_norm: bool = False,
        initial_std: float | None = None,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        self._out_shape = tuple(out_shape)
        norm_dim = require_batch_norm(conditional_batch_norm, batch_norm and len(hidden) > 0, condition_dim)
        self._appends_condition = norm_dim == 0
        widths = [math.prod(in_shape) + condition_dim - norm_dim, *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers.append(nn.Linear(width_in, width_out, bias=not batch_norm))  # batch norm subtracts any bias again
            layers += [batch_norm_for(width_out, 1, norm_dim)] if batch_norm else []
            layers.append(activation)
        self.num_features = widths[-1]
        self.layers = nn.Sequential(*layers, nn.Linear(self.num_features, math.prod(out_shape)))
        if initial_std is not None:
            normal_init(self, initial_std)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return cast("nn.Linear", self.layers[-1])

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the last layer sees, `(B, num_features)`."""
        flat = append_condition(x.flatten(1), condition if self._appends_condition else None)
        return run_layers(self.layers[:-1], flat, condition)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, *in_shape)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.head(self.features(x, condition)).unflatten(1, self._out_shape)


class MaxoutMLP(nn.Module):
    """Fully connected layers whose units are each the largest of some linear functions; the last layer is linear.

    References:
        Goodfellow et al. 2013, "Maxout networks", arXiv:1302.4389.
        Lin et al. 2018, PacGAN, arXiv:1712.04086: a discriminator with hidden = [200, 200, 200] and 5 pieces.

    Args:
        in_shape: event shape of the input; flattened.
        out_shape: event shape of the output.
        hidden: units of the hidden layers.
        num_pieces: linear functions of each unit.
        initial_std: standard deviation of the initial weights; None keeps torch's defaults.
        condition_dim: size K of the condition vector, appended to the flattened input; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        hidden: Sequence[int],
        num_pieces: int,
        initial_std: float | None,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(num_pieces=num_pieces, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        self._out_shape = tuple(out_shape)
        self._num_pieces = num_pieces
        widths = [math.prod(in_shape) + condition_dim, *hidden]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out * num_pieces) for n_in, n_out in pairs)
        self.num_features = widths[-1]
        self.head = nn.Linear(self.num_features, math.prod(out_shape))
        if initial_std is not None:
            normal_init(self, initial_std)

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the last layer sees, `(B, num_features)`."""
        units = append_condition(x.flatten(1), condition)
        for layer in self.hidden:
            units = layer(units).unflatten(1, (-1, self._num_pieces)).amax(2)
        return units

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, *in_shape)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.head(self.features(x, condition)).unflatten(1, self._out_shape)
