"""A residual multilayer perceptron that knows the time: for vectors, and for images as vectors.

References:
    He et al. 2016, "Identity mappings in deep residual networks", arXiv:1603.05027: activation before weights.
    Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models", arXiv:2006.11239: time added inside every block.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import require_sizes
from src.networks.time_embedding import TimeEmbedding

__all__ = ["TimeMLP"]


class TimeMLP(nn.Module):
    """One linear layer, residual blocks, SiLU and a last linear layer that starts at zero, so that all answers do.

    A block is SiLU, linear, plus the time's embedding, SiLU, linear. All functions are smooth, as solvers of differential
    equations wish.

    Args:
        in_shape: event shape of the input; flattened.
        out_shape: event shape of the output.
        width: units of every layer, and length of the embedding of time and condition.
        num_blocks: residual blocks.
        condition_dim: size K of the condition vector, added to the time's embedding; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int = 256,
        num_blocks: int = 3,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width, num_blocks=num_blocks)
        self._out_shape = tuple(out_shape)
        self.embedding = TimeEmbedding(width, condition_dim)
        self.start = nn.Linear(math.prod(in_shape), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, math.prod(out_shape))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, *in_shape)`, times `(B,)` about as large as 1, and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        embedding = self.embedding(t, condition)
        units = self.start(x.flatten(1))
        for block in self.blocks:
            units = block(units, embedding)
        return self.head(F.silu(units)).unflatten(1, self._out_shape)


class _Block(nn.Module):
    """`(B, width)` and an embedding `(B, width)` to `(B, width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.of_embedding = nn.Linear(width, width, bias=False)  # the first layer has a bias
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x)) + self.of_embedding(embedding)))
