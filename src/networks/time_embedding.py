"""A time and a condition as one vector, for networks that act differently at every time of a process.

References:
    Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762, section 3.5: sines and cosines.
    Tancik et al. 2020, "Fourier features let networks learn high frequency functions in low dimensional domains",
        arXiv:2006.10739: why a network needs them to tell near inputs apart.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import require_sizes

__all__ = ["TimeEmbedding", "fourier_features"]

_NUM_FREQUENCIES = 32
_MAX_FREQUENCY = 256.0  # radians per unit of time: 1,000 steps on [0, 1] are a quarter of a radian apart


def fourier_features(t: Tensor, num_frequencies: int, max_frequency: float) -> Tensor:
    """Sines and cosines of times: `(B,)` to `(B, 2 * num_frequencies)`, in float32 at least.

        (sin(w_1 t), ..., sin(w_n t), cos(w_1 t), ..., cos(w_n t))

    with w_1 = 1 and w_n = max_frequency radians per unit of time, and the same ratio from each to the next.
    """
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponents = torch.arange(num_frequencies, device=t.device, dtype=dtype) / max(1, num_frequencies - 1)
    angles = t.to(dtype)[:, None] * torch.exp(math.log(max_frequency) * exponents)
    return torch.cat([angles.sin(), angles.cos()], 1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the Fourier features of a time, plus a linear function of the condition; then SiLU.

    Without a condition, and with one of zeros, it is that of the time alone: how an unconditional answer is asked of a
    network that knows classes.

    Args:
        width: length of the vector.
        condition_dim: size K of the condition; 0 for none.
    """

    def __init__(self, width: int, condition_dim: int = 0) -> None:
        super().__init__()
        require_sizes(width=width)
        self.first = nn.Linear(2 * _NUM_FREQUENCIES, width)
        self.second = nn.Linear(width, width)
        self.condition = nn.Linear(condition_dim, width, bias=False) if condition_dim else None
        if self.condition is not None:  # torch's default would make a one-hot class small beside the time
            nn.init.normal_(self.condition.weight)

    def forward(self, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Times `(B,)`, about as large as 1, and a condition `(B, K)` or None, to `(B, width)`."""
        dtype = self.first.weight.dtype
        features = fourier_features(t, _NUM_FREQUENCIES, _MAX_FREQUENCY).to(dtype)
        embedding = self.second(F.silu(self.first(features)))
        if condition is not None:
            assert self.condition is not None, "this network was built without a condition"
            embedding = embedding + self.condition(condition.to(dtype))
        return F.silu(embedding)
