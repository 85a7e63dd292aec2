"""Data sets in torchvision's own folder layout, with torchvision's downloader where they are missing."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from src.core.errors import UserError
from src.data.arrays import Arrays, prepare_images, save_splits

__all__ = ["cifar10", "fashion_mnist", "mnist"]

log = logging.getLogger(__name__)


def mnist(root: str, cache: str, values: str, num_val: int, download: bool) -> Arrays:
    """MNIST: 70,000 grey digits of 28x28 pixels (LeCun, Cortes, Burges 1998); 10,000 of them are the test set.

    Args:
        root: folder that holds `MNIST/raw/`.
        cache: folder of prepared data sets.
        values: "discrete", "binary_static", "binary_dynamic" or "continuous".
        num_val: examples taken from the end of the training set for validation.
        download: fetch the files if they are not under `root`.
    """
    from torchvision.datasets import MNIST

    files = [f"MNIST/raw/{part}-ubyte" for part in _IDX_FILES]
    return _prepare("mnist", MNIST, files, _DIGITS, root, cache, values, num_val, download)


def fashion_mnist(root: str, cache: str, values: str, num_val: int, download: bool) -> Arrays:
    """Fashion-MNIST: 70,000 grey articles of clothing of 28x28 pixels (Xiao, Rasul, Vollgraf 2017). Args as `mnist`."""
    from torchvision.datasets import FashionMNIST

    files = [f"FashionMNIST/raw/{part}-ubyte" for part in _IDX_FILES]
    return _prepare("fashion_mnist", FashionMNIST, files, None, root, cache, values, num_val, download)


def cifar10(root: str, cache: str, values: str, num_val: int, download: bool) -> Arrays:
    """CIFAR-10: 60,000 colour images of 32x32 pixels (Krizhevsky 2009); 10,000 are the test set. Args as `mnist`."""
    from torchvision.datasets import CIFAR10

    files = [f"cifar-10-batches-py/{part}" for part in _CIFAR_FILES]
    return _prepare("cifar10", CIFAR10, files, None, root, cache, values, num_val, download)


_IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_DIGITS = tuple(str(digit) for digit in range(10))


def _prepare(
    name: str,
    dataset: Callable[..., Any],
    files: list[str],
    class_names: tuple[str, ...] | None,
    root: str,
    cache: str,
    values: str,
    num_val: int,
    download: bool,
) -> Arrays:
    _find_or_download(name, dataset, files, root, download)
    source = {
        "files": {file: [(stat := (Path(root) / file).stat()).st_size, stat.st_mtime_ns] for file in files},
        "num_val": num_val,
    }

    def make(folder: Path) -> tuple[str, ...]:
        try:
            train, test = (dataset(root, train=is_train, download=False) for is_train in (True, False))
        except Exception as error:  # torchvision raises whatever the broken file provokes
            raise UserError(
                f"cannot read data={name} under {root}: {error} (delete the file and download it anew)"
            ) from error
        x, y = _arrays(train)
        if not 0 < num_val < len(x):
            raise UserError(f"data.num_val={num_val} must be between 1 and {len(x) - 1}")
        cut = len(x) - num_val
        save_splits(folder, [("train", x[:cut], y[:cut]), ("val", x[cut:], y[cut:]), ("test", *_arrays(test))])
        return class_names or tuple(train.classes)

    return prepare_images(name, cache, source, levels=256, values=values, make=make)


def _find_or_download(name: str, dataset: Callable[..., Any], files: list[str], root: str, download: bool) -> None:
    missing = [file for file in files if not (Path(root) / file).exists()]
    if not missing:
        return
    where = f"data={name} is not under {Path(root).resolve()} (no {missing[0]})"
    how = "set data.root= or the environment variable DATA_ROOT to the folder that holds it"
    if not download:
        raise UserError(f"{where}; {how}, or data.download=true to fetch it")
    log.info(f"{where}; downloading it")
    try:
        for is_train in (True, False):
            dataset(root, train=is_train, download=True)
    except Exception as error:  # network and file errors of many kinds; all end here
        raise UserError(f"{where}, and the download failed ({error}); {how}") from error


def _arrays(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images as `(N, C, H, W)` uint8 and labels `(N,)` of a torchvision data set."""
    x = np.asarray(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x), np.asarray(dataset.targets)
