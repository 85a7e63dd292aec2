"""Real MNIST for tests that need it, and a model whose samples are given images."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.build import build
from src.core.rng import SampleNoise
from src.core.spec import DISCRETE
from src.data.arrays import Arrays, Split
from src.data.loading import ArrayData
from src.metrics.features import NetworkExtractor
from src.metrics.frozen_classifier import SHIPPED, read_frozen
from tests.examples import image_spec

__all__ = ["DATA_ROOT", "Given", "mnist_arrays", "mnist_classifier", "mnist_data", "needs_mnist", "noisy"]

DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))

needs_mnist = pytest.mark.skipif(
    not (DATA_ROOT / "MNIST" / "raw").is_dir(), reason=f"no MNIST under {DATA_ROOT}; set DATA_ROOT"
)


def mnist_data(root: Path) -> ArrayData:
    """MNIST with all 60,000 images for training."""
    from torchvision.datasets import MNIST

    parts = [MNIST(str(root), train=is_train, download=False) for is_train in (True, False)]
    train, test = (Split(np.asarray(part.data[:, None]), np.asarray(part.targets)) for part in parts)
    return mnist_arrays({"train": train, "val": test, "test": test}, "mnist")


def mnist_arrays(splits: dict[str, Split], fingerprint: str) -> ArrayData:
    spec = image_spec((1, 28, 28), DISCRETE, num_classes=10)
    return ArrayData(Arrays(spec, 256, splits, fingerprint), 100, 500, 0, 0)


def mnist_classifier() -> NetworkExtractor:
    """The classifier of MNIST that ships with the project."""
    state, about, sha256 = read_frozen(SHIPPED / "mnist.safetensors", None)
    network = build(about["network"])
    network.load_state_dict(state)
    return NetworkExtractor("mnist", network, sha256)


def noisy(x: Tensor, sigma: float, seed: int) -> Tensor:
    """uint8 images with Gaussian noise of `sigma`, where the grey values span 1."""
    noise = SampleNoise(seed).normal(tuple(x.shape), torch.zeros(()))
    return (x + 255 * sigma * noise).clamp(0, 255).round().byte()


class Given(nn.Module):
    """A model whose samples are given uint8 images, in order."""

    is_conditional = False

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.where = nn.Parameter(torch.zeros(()))  # says on which device the model lies
        self._images = images
        self._next = 0

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Any = None) -> Tensor:
        drawn = self._images[self._next : self._next + n]
        self._next += n
        return drawn.float() / 127.5 - 1
