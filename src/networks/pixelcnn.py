"""A gated PixelCNN over a grid of codes: the distribution of each given those before it, row by row from the upper left.

Two stacks of masked convolutions: the vertical one sees all rows above, the horizontal one its own row to the left and, at
every layer, the vertical one. So nothing above is out of sight, as it is for one stack of square masked kernels.

References:
    van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu 2016, "Conditional image generation with PixelCNN
        decoders", arXiv:1606.05328, section 2.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError, require_sizes

__all__ = ["GatedPixelCNN"]


class GatedPixelCNN(nn.Module):
    """Logits of the code at each place of a grid, from the codes at the places before it.

    The codes enter shifted, by a row into the vertical stack and by a column into the horizontal one; from there on each
    layer may see its own place, so no kernel needs a mask.

    Args:
        num_codes: K.
        width: channels of both stacks.
        num_layers: gated layers, each of which sees kernel_size // 2 places farther.
        kernel_size: width of the vertical kernel, odd.
        condition_dim: size of the condition vector; 0 for none.
    """

    def __init__(self, num_codes: int, width: int, num_layers: int, kernel_size: int, condition_dim: int = 0) -> None:
        super().__init__()
        require_sizes(num_codes=num_codes, width=width, num_layers=num_layers, kernel_size=kernel_size)
        if kernel_size % 2 == 0 or kernel_size < 3:
            raise UserError(f"has a network with kernel_size={kernel_size}, which must be odd and at least 3")
        self.embedding = nn.Embedding(num_codes, width)
        self.layers = nn.ModuleList(_GatedLayer(width, kernel_size, condition_dim) for _ in range(num_layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, num_codes, 1))

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Codes `(B, h, w)` int64 and a condition `(B, condition_dim)` or None, to logits `(B, K, h, w)`."""
        x = self.embedding(codes).movedim(3, 1)
        vertical = F.pad(x, (0, 0, 1, 0))[:, :, :-1]
        horizontal = F.pad(x, (1, 0))[:, :, :, :-1]
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, condition)
        return self.head(horizontal)


class _GatedLayer(nn.Module):
    """tanh(a) sigmoid(b) in both stacks, with a residual connection in the horizontal one."""

    def __init__(self, width: int, kernel_size: int, condition_dim: int) -> None:
        super().__init__()
        reach = kernel_size // 2
        self._above = (reach, reach, reach, 0)  # left, right, top, bottom
        self._before = (reach, 0)
        self.vertical = nn.Conv2d(width, 2 * width, (reach + 1, kernel_size))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, reach + 1))
        self.down = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.condition = nn.Linear(condition_dim, 4 * width, bias=False) if condition_dim else None

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks `(B, width, h, w)`, and a condition `(B, condition_dim)` or None, to both stacks."""
        v = self.vertical(F.pad(vertical, self._above))
        h = self.horizontal(F.pad(horizontal, self._before))
        if self.condition is not None:
            assert condition is not None, "a conditional model needs class labels"
            of_v, of_h = self.condition(condition.to(v.dtype))[:, :, None, None].chunk(2, dim=1)
            v, h = v + of_v, h + of_h
        return _gate(v), horizontal + self.out(_gate(h + self.down(v)))


def _gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of the channels."""
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()
