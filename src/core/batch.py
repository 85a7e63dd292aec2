"""One batch of examples, as it travels from the loader to a model."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """A batch.

    Args:
        x: `(B, *event)`; raw levels (uint8) or dequantised values straight from the loader, data units after it.
        condition: `(B,)` int64 class labels, or None if the data set has none.
    """

    x: Tensor
    condition: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        condition = None if self.condition is None else self.condition.to(device, non_blocking=non_blocking)
        return Batch(self.x.to(device, non_blocking=non_blocking), condition)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from where it travels faster to a GPU."""
        return Batch(self.x.pin_memory(), None if self.condition is None else self.condition.pin_memory())

    def with_x(self, x: Tensor) -> "Batch":
        return replace(self, x=x)
