"""Feature extractors as objects, and sets of examples that are sent through each of them once."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from src.core.errors import NotApplicable
from src.core.stack import Stack

__all__ = ["Extractor", "Features", "ImageSet", "NetworkExtractor", "weights_sha256"]


@dataclass(frozen=True)
class Features:
    """What an extractor says of N images.

    Args:
        features: `(N, D)` float32, or uint8 if they are the pixels themselves.
        part_logits: `(N, K)` float32 class logits; K is 0 if the extractor knows no classes. Of a stack those of each of
            its images side by side: 30 numbers where there are 1,000 classes.
        labels: `(N,)` int64, the classes the images were drawn as, or None.
        stack: how the logits are made of those of smaller images, if they are.
    """

    features: Tensor
    part_logits: Tensor
    labels: Tensor | None
    stack: Stack | None = None

    @property
    def count(self) -> int:
        return len(self.features)

    @property
    def num_classes(self) -> int:
        return self.part_logits.shape[1] if self.stack is None else self.stack.num_joint_classes

    @property
    def logits(self) -> Tensor:
        """`(N, num_classes)` float32. Of a stack, whose images are read independently, the sums of their log-probabilities.

        Those are computed at every call.
        """
        if self.stack is None:
            return self.part_logits
        joint, *others = self._by_image(self.stack).log_softmax(2).unbind(1)
        for some in others:
            joint = (joint[:, :, None] + some[:, None]).flatten(1)
        return joint

    @property
    def classes(self) -> Tensor:
        """`(N,)` int64, the likeliest class of each image."""
        if self.stack is None:
            return self.part_logits.argmax(1)
        return self.stack.joint_class(self._by_image(self.stack).argmax(2))

    def _by_image(self, stack: Stack) -> Tensor:
        return self.part_logits.unflatten(1, (stack.num_images, stack.num_classes))


class Extractor(ABC):
    """Turns uint8 images `(B, C, H, W)` in 0 .. 255, float32 vectors `(B, D)`, or int16 clips of sound `(B, T)`, into
    features and logits.

    It is of one of the three. Nothing in it ever trains.
    """

    name: str
    sha256: str  # of the weights, or of what stands for them
    accuracy: float | None = None  # of a classifier, on its own test images
    is_worth_keeping = True  # False: the features are computed faster than read from a disk
    stack: Stack | None = None  # how its logits are made of those of smaller images, if they are

    @abstractmethod
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, D)` and logits `(B, K)`, the `part_logits` of `Features`.

        They are on the CPU, where there is float64 to add them up in.
        """


class NetworkExtractor(Extractor):
    """A network that takes images in [-1, 1] and returns features and logits.

    Args:
        name: what to call it on a card.
        network: the network; put in evaluation mode, its weights frozen.
        sha256: the hash of its weights, if it is known; else it is computed.
        accuracy: share of its test images that it is right on, if it is known.
    """

    def __init__(self, name: str, network: nn.Module, sha256: str | None = None, accuracy: float | None = None) -> None:
        self.accuracy = accuracy
        self.name = name
        self.sha256 = sha256 or weights_sha256(network)
        self._network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = next((weight.device for weight in self._network.parameters()), images.device)
        with torch.autocast(device.type, enabled=False):
            features, logits = self._network(self._seen(images.to(device)))
        return features.cpu().float(), logits.cpu().float()

    def _seen(self, images: Tensor) -> Tensor:
        """What the network sees of images: values in [-1, 1]."""
        return images.float().div(127.5).sub(1)


class ImageSet:
    """Images, or vectors, handed out in batches.

    Args:
        batches: called for a pass over all of them: pairs of uint8 images `(B, C, H, W)`, or float32 vectors `(B, D)`, and
            labels `(B,)` or None.
        count: how many they are.
        identity: says what the images are, as plain JSON types: equal identities mean equal bytes. It is called once,
            if it is asked for. None for a model's samples.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[tuple[Tensor, Tensor | None]]],
        count: int,
        identity: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.batches = batches
        self.count = count
        self._identity = identity

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        """What the images are; None if nobody else can have the same."""
        return None if self._identity is None else self._identity()

    def features(self, extractor: Extractor) -> Features:
        """The features of all images, computed at every call (see `Store.features`), with the logits as they are given."""
        features, logits = [], []
        labels: list[Tensor] = []
        for images, condition in self.batches():
            some_features, some_logits = extractor(images)
            assert some_features.ndim == 2, "an extractor gives one vector an image"
            if not (some_features.isfinite().all() and some_logits.isfinite().all()):
                raise NotApplicable(f"{extractor.name} gives features that are not finite")
            features.append(some_features)
            logits.append(some_logits)
            labels += [] if condition is None else [condition.cpu()]
        return Features(torch.cat(features), torch.cat(logits), torch.cat(labels) if labels else None)


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of all weights and buffers by name, the same for the same numbers on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
