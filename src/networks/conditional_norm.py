"""Batch normalization whose scale and shift depend on the class: how a class enters a generator without widening it.

    y = (1 + gamma_c) * (x - mean) / sqrt(var + eps) + beta_c

with the mean and variance of a channel over the batch and all positions, and gamma_c, beta_c of class c and the channel.

References:
    de Vries et al. 2017, "Modulating early visual processing by language", arXiv:1707.00683: conditional batch norm.
    Dumoulin, Shlens, Kudlur 2017, "A learned representation for artistic style", arXiv:1610.07629: a row for each class.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.shapes import expand_like

__all__ = ["ConditionalBatchNorm", "batch_norm_for", "require_batch_norm", "run_layers"]

_INITIAL_STD = 0.02  # of batch norm's scales in DCGAN


class ConditionalBatchNorm(nn.Module):
    """Batch norm followed by a scale and a shift for each class.

    The scales start near 1 and the shifts near 0: gamma and beta are drawn from N(0, 0.02), so that the classes differ
    from the first step on. They are plain parameters, which `normal_init` and `normalize_spectra` leave alone.

    Args:
        num_features: channels C.
        dimensions: 1 for `(B, C)`, 2 for images `(B, C, H, W)`.
        condition_dim: size K of the condition.
    """

    def __init__(self, num_features: int, dimensions: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = _plain(num_features, dimensions, affine=False)
        self.gamma = nn.Parameter(_INITIAL_STD * torch.randn(condition_dim, num_features))
        self.beta = nn.Parameter(_INITIAL_STD * torch.randn(condition_dim, num_features))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`(B, C, ...)` and a condition `(B, K)`, one-hot for classes, to `(B, C, ...)`."""
        weights = condition.to(self.gamma.dtype)
        gamma, beta = (expand_like(weights @ table, x) for table in (self.gamma, self.beta))
        return self.norm(x) * (1 + gamma) + beta


def batch_norm_for(num_features: int, dimensions: int, condition_dim: int) -> nn.Module:
    """`ConditionalBatchNorm`, or torch's batch norm where there is no condition (`condition_dim=0`)."""
    if condition_dim:
        return ConditionalBatchNorm(num_features, dimensions, condition_dim)
    return _plain(num_features, dimensions, affine=True)


def require_batch_norm(conditional_batch_norm: bool, batch_norm: bool, condition_dim: int) -> int:
    """Size of the condition that batch norm takes: all of it, or 0 where the class enters in another way or not at all.

    Raises `UserError` where the class should enter through batch norm and there is none.
    """
    if not conditional_batch_norm:
        return 0
    if not condition_dim:
        raise UserError(
            "has a network with conditional_batch_norm=true that is given no class; choose a conditioning= that tells it, "
            "or set its conditional_batch_norm=false"
        )
    if not batch_norm:
        raise UserError(
            "has a network with conditional_batch_norm=true but no batch norm (batch_norm=false, or no hidden layers), "
            "so the class would be lost; set its batch_norm=true or its conditional_batch_norm=false"
        )
    return condition_dim


def run_layers(layers: Iterable[nn.Module], x: Tensor, condition: Tensor | None = None) -> Tensor:
    """The output of layers one after another; those that normalise by class are given the condition, too."""
    for layer in layers:
        x = layer(x, condition) if isinstance(layer, ConditionalBatchNorm) else layer(x)
    return x


def _plain(num_features: int, dimensions: int, affine: bool) -> nn.Module:
    kind = nn.BatchNorm1d if dimensions == 1 else nn.BatchNorm2d
    return kind(num_features, affine=affine)
