"""A small convolutional classifier of small images: the feature extractor behind `fd` and `cs`."""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["SmallClassifier"]

FEATURE_DIM = 84


class SmallClassifier(nn.Module):
    """Two convolutions and three linear layers, after LeNet-5 (LeCun et al. 1998), with ReLU and max pooling.

    About 62 thousand parameters on 1x28x28 images. Any image size from 8x8 on: the feature map is pooled to 5x5.

    Args:
        in_shape: `(C, H, W)`.
        num_classes: number of logits.
    """

    def __init__(self, in_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_shape[0], 6, 5, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(2) if in_shape[-1] >= 16 else nn.Identity(),
            nn.Conv2d(6, 16, 5, padding=2),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(5),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, FEATURE_DIM),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` in [-1, 1] to features `(B, 84)` and logits `(B, num_classes)`."""
        features = self.features(x)
        return features, self.head(features)
