"""Handwritten digits that come with scikit-learn: 1,797 grey images of 8x8 pixels, 17 levels. No download.

The test part of the UCI data set "Optical recognition of handwritten digits" (Alpaydin, Kaynak 1998).
"""

from pathlib import Path

import numpy as np

from src.data.arrays import Arrays, prepare_images, save_splits, split_indices

__all__ = ["digits"]

_NUM_VAL, _NUM_TEST = 200, 300


def digits(cache: str, values: str) -> Arrays:
    """The digits, cut into 1,297 for training, 200 for validation and 300 for the test.

    Args:
        cache: folder of prepared data sets.
        values: "discrete", "binary_static", "binary_dynamic" or "continuous".
    """

    def make(folder: Path) -> tuple[str, ...]:
        from sklearn.datasets import load_digits  # slow to import, and needed once

        data = load_digits()
        x = data.images.astype(np.uint8)[:, None]
        parts = split_indices(len(x), _NUM_VAL, _NUM_TEST)
        save_splits(folder, ((split, x[index], data.target[index]) for split, index in parts.items()))
        return tuple(str(name) for name in data.target_names)

    source = {"sklearn": "digits", "num_val": _NUM_VAL, "num_test": _NUM_TEST}
    return prepare_images("digits", cache, source, levels=17, values=values, make=make)
