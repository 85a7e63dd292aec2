"""Small convolutional classifiers of small images: the feature extractors behind `fd`, `cs` and their kin."""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["ConvClassifier", "SmallClassifier"]

_SMALL_FEATURE_DIM = 84


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
            nn.MaxPool2d(2) if in_shape[-1] >= 16 else nn.Identity(),
            nn.Conv2d(6, 16, 5, padding=2),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(5),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, _SMALL_FEATURE_DIM),
            nn.ReLU(),
        )
        self.head = nn.Linear(_SMALL_FEATURE_DIM, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` in [-1, 1] to features `(B, 84)` and logits `(B, num_classes)`."""
        features = self.features(x)
        return features, self.head(features)


class ConvClassifier(nn.Module):
    """Four convolutions with batch normalization, max pooling between them, and two linear layers: for colour photographs.

    About 450 thousand parameters on 3x32x32 images. Any image size from 8x8 on: the feature map is pooled to 4x4.

    Args:
        in_shape: `(C, H, W)`.
        num_classes: number of logits.
        width: channels of the first convolution; the second has twice, the others four times as many.
        feature_dim: length of the feature vector.
    """

    def __init__(self, in_shape: Sequence[int], num_classes: int, width: int = 32, feature_dim: int = 96) -> None:
        super().__init__()
        channels = (in_shape[0], width, 2 * width, 4 * width, 4 * width)
        kernels = (5, 3, 3, 3)
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            layers.append(nn.Conv2d(channels[i], channels[i + 1], kernel, padding=kernel // 2, bias=False))
            layers += [nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
            layers.append(nn.MaxPool2d(2) if i < 2 else nn.Identity())
        layers += [nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(4 * width * 16, feature_dim), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` in [-1, 1] to features `(B, feature_dim)` and logits `(B, num_classes)`."""
        features = self.features(x)
        return features, self.head(features)
