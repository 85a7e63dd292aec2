"""A classifier of one-channel images as one of stacks of them: it reads every channel by itself."""

from torch import Tensor

from src.core.stack import Stack
from src.metrics.features import Extractor

__all__ = ["StackExtractor"]


class StackExtractor(Extractor):
    """The features and the logits of the images of a stack, side by side, the first channel first.

    Channels that hold no image in the data are not looked at, so what a model draws there is seen in the pixels only.

    Args:
        extractor: takes one-channel images. The hash is its own, so that its file is found by it.
        stack: what the images are stacks of.
    """

    def __init__(self, extractor: Extractor, stack: Stack) -> None:
        self.name = f"{extractor.name}, on each of {stack.num_images} channels"
        self.sha256 = extractor.sha256
        # a stack is read rightly if all its images are, and those are drawn independently
        self.accuracy = None if extractor.accuracy is None else extractor.accuracy**stack.num_images
        self.is_worth_keeping = extractor.is_worth_keeping
        self.stack = stack
        self._num_images = stack.num_images
        self._extractor = extractor

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = images[:, : self._num_images].flatten(0, 1)[:, None]
        features, logits = self._extractor(parts)
        return features.reshape(len(images), -1), logits.reshape(len(images), -1)
