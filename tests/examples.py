"""Tiny data sets made in memory, and noise whose values a test knows."""

import numpy as np
import torch
from torch import Tensor

from src.core.rng import Noise, SampleNoise
from src.core.sound import WAVEFORM, Sound
from src.core.spec import DataSpec, Values
from src.data.arrays import Arrays, Split, image_values
from src.data.loading import ArrayData

__all__ = [
    "FixedNoise",
    "RepeatingNoise",
    "image_data",
    "image_spec",
    "token_data",
    "token_spec",
    "vector_spec",
    "waveform_data",
    "waveform_spec",
]


def image_spec(shape: tuple[int, ...], values: str, levels: int = 256, num_classes: int = 3) -> DataSpec:
    """Images called `made_up`, as models see them."""
    return DataSpec("made_up", "image", shape, image_values(values, levels), _names(num_classes))


def vector_spec(dim: int, num_classes: int = 0) -> DataSpec:
    """Unbounded real vectors called `made_up`."""
    values = Values("continuous", low=-float("inf"), high=float("inf"), levels=None)
    return DataSpec("made_up", "vector", (dim,), values, _names(num_classes))


def token_spec(length: int = 16, levels: int = 100, num_classes: int = 0) -> DataSpec:
    """Sequences of tokens called `made_up`."""
    return DataSpec(
        "made_up", "tokens", (length,), Values("discrete", low=0, high=levels - 1, levels=levels), _names(num_classes)
    )


def waveform_spec(num_samples: int = 64, num_classes: int = 3) -> DataSpec:
    """Waveforms called `made_up`."""
    sound = Sound(4000, num_samples, WAVEFORM, 16, 8, 4, -16.0, 2.0)
    return DataSpec(
        "made_up", "audio", sound.shape, Values("continuous", -1.0, 1.0, None), _names(num_classes), sound=sound
    )


def image_data(
    shape: tuple[int, ...], values: str, num_classes: int = 3, count: int = 24, batch_size: int = 8
) -> ArrayData:
    """Random 8-bit images with labels that take turns, and their loaders."""
    x = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    split = Split(x, np.arange(count) % num_classes if num_classes else None)
    spec = image_spec(shape, values, num_classes=num_classes)
    arrays = Arrays(spec, 256, {"train": split, "val": split, "test": split}, "made_up")
    return ArrayData(arrays, batch_size=batch_size, eval_batch_size=batch_size, num_workers=0, seed=0)


def waveform_data(num_classes: int = 3, count: int = 24, batch_size: int = 8) -> ArrayData:
    """Clips of noise of 16 bits with labels that take turns, and their loaders."""
    spec = waveform_spec(num_classes=num_classes)
    x = np.random.default_rng(0).integers(-(2**15), 2**15, (count, spec.num_dims), dtype=np.int16)
    split = Split(x, np.arange(count) % num_classes if num_classes else None)
    arrays = Arrays(spec, 2**16, {"train": split, "val": split, "test": split}, "made_up")
    return ArrayData(arrays, batch_size=batch_size, eval_batch_size=batch_size, num_workers=0, seed=0)


def token_data(num_classes: int = 3, count: int = 24, batch_size: int = 8) -> ArrayData:
    """Random sequences of tokens with labels that take turns, and their loaders."""
    spec = token_spec(num_classes=num_classes)
    x = np.random.default_rng(0).integers(0, spec.values.levels, (count, *spec.shape), dtype=np.uint16)
    split = Split(x, np.arange(count) % num_classes if num_classes else None)
    arrays = Arrays(spec, spec.values.levels, {"train": split, "val": split, "test": split}, "made_up")
    return ArrayData(arrays, batch_size=batch_size, eval_batch_size=batch_size, num_workers=0, seed=0)


class FixedNoise(Noise):
    """Hands out one given tensor, whatever is asked for."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._value.to(like).expand(shape)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self.normal(shape, like)


class RepeatingNoise(Noise):
    """The same `period` rows again and again in every draw, so that a repeated batch meets repeated noise."""

    def __init__(self, period: int) -> None:
        self._period = period
        self._rows = SampleNoise(seed=0)

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._repeated(self._rows.normal((self._period, *shape[1:]), like), shape)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._repeated(self._rows.uniform((self._period, *shape[1:]), like), shape)

    def _repeated(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        return rows[torch.arange(shape[0]) % self._period]


def _names(num_classes: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(num_classes))
