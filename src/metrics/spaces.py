"""Where a metric of image sets is measured: the features of the domain classifier, principal components, or the pixels."""

import hashlib
import json

import torch
from torch import Tensor
from torch.nn import functional as F

from src.core.errors import NotApplicable, require_at_least
from src.core.rng import derive_seed
from src.metrics.features import Extractor, ImageSet
from src.metrics.frechet import gaussian_of
from src.metrics.metric import Inputs, Space

__all__ = ["DomainClassifier", "Pixels", "PrincipalComponents"]

_MAX_SIDE = 32  # larger images are averaged down before their components are sought
_MAX_FITTED = 10_000  # images the components are sought on


class DomainClassifier(Space):
    """The features of the frozen classifier of the data set."""

    takes_sound = True

    def extractor(self, inputs: Inputs) -> Extractor:
        return inputs.classifier()


class Pixels(Space):
    """The pixels themselves, 0 .. 255."""

    in_words = "pixels"

    def extractor(self, inputs: Inputs) -> Extractor:
        return _PixelExtractor()


class PrincipalComponents(Space):
    """The first principal components of the pixels of training images: needs no labels and no classifier.

    Pixels are in [-1, 1]; images larger than 32x32 are averaged down to it first. The components are sought on at most
    10,000 training images, always the same ones.

    Args:
        num_components: how many; fewer if there are fewer pixels.
    """

    in_words = "principal components"

    def __init__(self, num_components: int) -> None:
        require_at_least("metric.*.space.num_components", num_components, 2)
        self._num_components = num_components

    def extractor(self, inputs: Inputs) -> Extractor:
        settings = {"num_components": self._num_components, "max_side": _MAX_SIDE, "max_fitted": _MAX_FITTED}

        def make() -> dict[str, Tensor]:
            x = _some_of(inputs.reference, _MAX_FITTED)
            if len(x) < 2:
                raise NotApplicable(f"principal components need at least two training images, not {len(x)}")
            mean, cov = gaussian_of(x)
            _, vectors = torch.linalg.eigh(cov)  # in ascending order
            return {"mean": mean.float(), "components": vectors.flip(1)[:, : self._num_components].float().contiguous()}

        found = inputs.store.get("principal_components", inputs.reference, None, settings, make)
        # named after what they are computed from: their last digits, and their signs, may differ between machines
        key = json.dumps({"data": inputs.reference.identity or id(inputs.reference), **settings}, sort_keys=True)
        return _ComponentExtractor(found["mean"], found["components"], hashlib.sha256(key.encode()).hexdigest())


def _some_of(images: ImageSet, count: int) -> Tensor:
    """Small pixels of a random part of the images, always the same; of all of them if they are fewer."""
    order = torch.randperm(images.count, generator=torch.Generator().manual_seed(derive_seed(0, 5)))
    is_chosen = torch.zeros(images.count, dtype=torch.bool)
    is_chosen[order[:count]] = True
    parts, start = [], 0
    for batch, _ in images.batches():
        parts.append(_small_pixels(batch[is_chosen[start : start + len(batch)]]))
        start += len(batch)
    return torch.cat(parts)


class _PixelExtractor(Extractor):
    name, sha256, is_worth_keeping = "pixels", "none", False

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1).cpu(), torch.zeros(len(images), 0)


def _small_pixels(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] `(B, D)` of images averaged down to at most 32x32."""
    x = images.cpu().float().div(127.5).sub(1)
    height, width = x.shape[2:]
    if max(height, width) > _MAX_SIDE:
        x = F.adaptive_avg_pool2d(x, (min(height, _MAX_SIDE), min(width, _MAX_SIDE)))
    return x.flatten(1)


class _ComponentExtractor(Extractor):
    def __init__(self, mean: Tensor, components: Tensor, sha256: str) -> None:
        self.name = f"{components.shape[1]} principal components of the pixels"
        self.sha256 = sha256
        self._mean, self._components = mean, components

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return (_small_pixels(images) - self._mean) @ self._components, torch.zeros(len(images), 0)
