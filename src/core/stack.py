"""Images that are stacks of smaller ones, one in each channel, where that is known: their classes combine to one."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Stack"]


@dataclass(frozen=True)
class Stack:
    """The first channels of an image are one-channel images of their own, drawn independently; any others are black.

    Args:
        num_images: channels that hold an image.
        num_classes: classes of each of these images; they are about equally likely.
    """

    num_images: int
    num_classes: int

    def __post_init__(self) -> None:
        assert self.num_images >= 1
        assert self.num_classes >= 1

    @property
    def num_joint_classes(self) -> int:
        """Number of combinations, each of which is a class of the stack."""
        return self.num_classes**self.num_images

    def joint_class(self, classes: Tensor) -> Tensor:
        """The class `(N,)` int64 of stacks from those of their images `(N, num_images)`, read as the digits of a number.

        The first channel is the most significant one: red 3, green 1, blue 4 is 314.
        """
        joint = classes[:, 0]
        for some in classes.T[1:]:
            joint = self.num_classes * joint + some
        return joint
