"""Augmentation of what a discriminator sees, the same for real and generated images, in both players' steps.

The discriminator then compares the two distributions after the transformation, so the generator does not learn to draw
transformed images as long as the transformation can be undone in distribution.

References:
    Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training" (DiffAugment), arXiv:2006.10738.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.rng import Noise
from src.core.spec import DataSpec

__all__ = ["Augmentation", "DiffAugment", "NoAugmentation", "adjust_colour", "cut_out", "translate"]

_LARGEST_SHIFT = 1 / 8  # of the side
_CUT_SIDE = 1 / 2  # of the side


class Augmentation(ABC):
    """A random transformation of each example by itself."""

    def require(self, spec: DataSpec) -> None:  # noqa: B027 - most take everything
        """Raise `UserError` for data that it is not made for."""

    @abstractmethod
    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        """Transformed examples of the same shape, differentiable in `x` `(B, *event)`."""


class NoAugmentation(Augmentation):
    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        return x


class DiffAugment(Augmentation):
    """Random brightness, saturation and contrast; random shifts; a random square set to the middle of the range.

    Args:
        colour, translation, cutout: which of them.
    """

    def __init__(self, colour: bool, translation: bool, cutout: bool) -> None:
        self._steps = [
            step for step, is_wanted in ((adjust_colour, colour), (translate, translation), (cut_out, cutout)) if is_wanted
        ]
        if not self._steps:
            raise UserError("augmentation=diffaugment does nothing: colour, translation and cutout are all false")

    def require(self, spec: DataSpec) -> None:
        if spec.modality != "image":
            raise UserError(f"augmentation=diffaugment is of images; data={spec.name} gives {spec.modality}")

    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        for step in self._steps:
            x = step(x, noise)
        return x


def adjust_colour(x: Tensor, noise: Noise) -> Tensor:
    """Images `(B, C, H, W)` with brightness + U(-0.5, 0.5), saturation * U(0, 2) and contrast * U(0.5, 1.5).

    Saturation is the distance from the mean over channels (none where there is one), contrast that from the image's mean.
    """
    brightness, saturation, contrast = noise.uniform((len(x), 3), like=x)[:, :, None, None, None].unbind(1)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = torch.lerp(grey, x, 2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, contrast + 0.5)


def translate(x: Tensor, noise: Noise) -> Tensor:
    """Images `(B, C, H, W)` shifted by whole pixels, up to an eighth of each side; zeros come in."""
    _, _, height, width = x.shape
    u = noise.uniform((len(x), 2), like=x)
    rows, row_is_inside = _shifted(height, u[:, 0])
    columns, column_is_inside = _shifted(width, u[:, 1])
    x = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, width))
    x = x.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], height, -1))
    return x * (row_is_inside[:, None, :, None] & column_is_inside[:, None, None, :])


def cut_out(x: Tensor, noise: Noise) -> Tensor:
    """Images `(B, C, H, W)` with a rectangle of half of each side set to zero, its centre anywhere in the image."""
    u = noise.uniform((len(x), 2), like=x)
    is_row, is_column = (_is_cut(side, u[:, i]) for i, side in enumerate(x.shape[2:]))
    return x * ~(is_row[:, None, :, None] & is_column[:, None, None, :])


def _shifted(side: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where each place of a shifted side comes from, `(B, side)` int64, and whether that is in the image."""
    most = int(side * _LARGEST_SHIFT + 0.5)
    shift = (u * (2 * most + 1)).long().clamp(max=2 * most) - most
    source = torch.arange(side, device=u.device) - shift[:, None]
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def _is_cut(side: int, u: Tensor) -> Tensor:
    """Which places of a side are cut, `(B, side)` bool."""
    length = int(side * _CUT_SIDE + 0.5)
    places = side + 1 - length % 2  # of the centre, as in the paper's code: the rectangle may lie half outside
    first = (u * places).long().clamp(max=places - 1) - length // 2
    place = torch.arange(side, device=u.device) - first[:, None]
    return (place >= 0) & (place < length)
