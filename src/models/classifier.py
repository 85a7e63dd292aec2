"""A classifier of the data set at hand, trained like every model; its features are what `fd` and `cs` are measured on."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from src.core.batch import Batch
from src.core.protocols import Terms
from src.core.rng import Noise
from src.core.spec import DataSpec

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Minimises the cross entropy of the class, in nats.

    Args:
        spec: the data, labelled.
        network: called as `network(in_shape=, num_classes=)`; returns features and logits.
    """

    def __init__(self, spec: DataSpec, network: Callable[..., nn.Module]) -> None:
        super().__init__()
        spec.require_modality("image")
        spec.require_classes()
        self.network = network(in_shape=spec.shape, num_classes=spec.num_classes)

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        assert batch.condition is not None, "the data of a classifier has labels"
        _, logits = self.network(batch.x)
        error = (logits.argmax(1) != batch.condition).float()
        return {"loss": F.cross_entropy(logits, batch.condition, reduction="none"), "error": error}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` in data units to features and logits."""
        return self.network(x)
