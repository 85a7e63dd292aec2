"""Feature extractors as objects, and sets of images that are sent through each of them once."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Extractor", "Features", "ImageSet", "NetworkExtractor", "weights_sha256"]


@dataclass(frozen=True)
class Features:
    """What an extractor says of N images.

    Args:
        features: `(N, D)` float64.
        logits: `(N, K)` float64 class logits.
        labels: `(N,)` int64, the classes the images were drawn as, or None.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None

    @property
    def count(self) -> int:
        return len(self.features)


class Extractor(ABC):
    """Turns uint8 images `(B, C, H, W)` in 0 .. 255 into features and logits. Its network never trains."""

    name: str
    sha256: str  # of the weights

    @abstractmethod
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, D)` and logits `(B, K)`, float64, on the CPU (not every device has float64)."""


class NetworkExtractor(Extractor):
    """A network that takes images in [-1, 1] and returns features and logits.

    Args:
        name: what to call it on a card.
        network: the network; put in evaluation mode, its weights frozen.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name = name
        self.sha256 = weights_sha256(network)
        self._network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = next(self._network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            features, logits = self._network(images.to(device).float().div(127.5).sub(1))
        return features.cpu().double(), logits.cpu().double()


class ImageSet:
    """Images, handed out in batches, whose features are computed once for each extractor.

    Args:
        batches: called for a pass over all images: pairs of uint8 images `(B, C, H, W)` and labels `(B,)` or None.
    """

    def __init__(self, batches: Callable[[], Iterable[tuple[Tensor, Tensor | None]]]) -> None:
        self.batches = batches
        self._features: dict[tuple[str, str], Features] = {}

    def features(self, extractor: Extractor) -> Features:
        """The features of all images; computed at the first call."""
        key = (extractor.name, extractor.sha256)
        if key not in self._features:
            features, logits = [], []
            labels: list[Tensor] = []
            for images, condition in self.batches():
                some_features, some_logits = extractor(images)
                features.append(some_features)
                logits.append(some_logits)
                labels += [] if condition is None else [condition.cpu()]
            joined = torch.cat(labels) if labels else None
            self._features[key] = Features(torch.cat(features), torch.cat(logits), joined)
        return self._features[key]


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of all weights and buffers by name, the same for the same numbers on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
