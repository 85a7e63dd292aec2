"""Stacked MNIST: three digits in the three channels of a colour image, so 1,000 modes that a classifier of digits counts.

The protocol is PacGAN's: 128,000 random triples of training digits, the same ones in every epoch, and a test of 26,000
samples. Metz et al. 2017 (unrolled GANs), arXiv:1611.02163, had the idea; Srivastava et al. 2017 (VEEGAN),
arXiv:1705.07761, and Lin et al. 2018 (PacGAN), arXiv:1712.04086, section 4.2, measured on it. Others draw other numbers of
triples, pad the images to 32x32, or draw new triples in every epoch.
"""

from pathlib import Path

import numpy as np
import torch

from src.core.errors import UserError, require_at_least
from src.core.rng import derive_seed, hash_bits
from src.core.spec import DISCRETE
from src.core.stack import Stack
from src.data.arrays import Arrays, Split, prepare_images, save_in_chunks
from src.data.torchvision_sets import mnist

__all__ = ["stacked_mnist"]

_SEED = 0  # of the choice of digits: the data are the same in every run
_NUM_CHANNELS = 3
_CHUNK = 4096  # stacks written at a time


def stacked_mnist(
    root: str,
    cache: str,
    values: str,
    num_digits: int,
    num_train: int,
    num_val: int,
    num_test: int,
    download: bool,
) -> Arrays:
    """Colour images of 28x28 pixels with an MNIST digit, drawn with replacement, in each of the first channels.

    The class is the number that the digits make, red first. No digit is in stacks of two splits. The prepared arrays take
    2.4 kB a stack, 375 MB by default.

    Args:
        root: folder that holds `MNIST/raw/`.
        cache: folder of prepared data sets; MNIST itself is prepared in it, too.
        values: "discrete", "binary_static", "binary_dynamic" or "continuous".
        num_digits: channels that hold a digit, 1 to 3; the others are black. The data have `10**num_digits` modes.
        num_train: stacks of training digits.
        num_val: images taken from the end of MNIST's training set, and stacks made of them.
        num_test: stacks of test digits.
        download: fetch the files if they are not under `root`.
    """
    if num_digits not in range(1, _NUM_CHANNELS + 1):
        raise UserError(f"data.num_digits={num_digits} must be 1, 2 or 3")
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    for split, size in sizes.items():
        require_at_least(f"data.num_{split}", size, 2)
    digits = mnist(root, cache, DISCRETE, num_val, download)
    stack = Stack(num_digits, digits.spec.num_classes)

    def make(folder: Path) -> tuple[str, ...]:
        for i, (split, size) in enumerate(sizes.items()):
            _write(folder, split, digits.splits[split], stack, size, seed=derive_seed(_SEED, i))
        return tuple(f"{number:0{num_digits}d}" for number in range(stack.num_joint_classes))

    source = {"digits": digits.fingerprint, "num_digits": num_digits, "sizes": sizes, "seed": _SEED}
    assert digits.source_levels is not None
    return prepare_images("stacked_mnist", cache, source, digits.source_levels, values, make, stack)


def _write(folder: Path, split: str, digits: Split, stack: Stack, size: int, seed: int) -> None:
    assert digits.y is not None
    chosen = hash_bits(seed, torch.arange(size), stack.num_images) % len(digits)  # (size, num_images)
    x = (_stacked(digits.x, some.numpy()) for some in chosen.split(_CHUNK))
    labels = stack.joint_class(torch.from_numpy(digits.y)[chosen])
    save_in_chunks(folder, split, (size, _NUM_CHANNELS, *digits.x.shape[2:]), x, labels.numpy())


def _stacked(digits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Stacks `(B, 3, H, W)` of the digits `(N, 1, H, W)` that are chosen for each, `(B, num_images)`."""
    x = np.zeros((len(chosen), _NUM_CHANNELS, *digits.shape[2:]), dtype=np.uint8)
    x[:, : chosen.shape[1]] = digits[chosen, 0]
    return x
