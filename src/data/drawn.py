"""Data that are drawn once from a known density, the same in every run."""

import math
from pathlib import Path
from typing import Any

from src.core.density import Density
from src.core.errors import UserError, require_at_least
from src.core.rng import SampleNoise, derive_seed
from src.core.spec import CONTINUOUS, Values
from src.data.arrays import Arrays, prepare, save_splits

__all__ = ["draw_once", "require_positive"]

_SEED = 0  # of the points: the data are the same in every run


def draw_once(
    name: str,
    cache: str,
    settings: dict[str, Any],
    density: Density,
    sizes: dict[str, int],
    class_names: tuple[str, ...] = (),
) -> Arrays:
    """Prepared vectors, drawn from a density for each split.

    Args:
        name: the data set's name.
        cache: folder of prepared data sets.
        settings: what the density depends on, as plain JSON types.
        density: what is drawn from.
        sizes: points in each split, by its name.
        class_names: of the classes that the density draws; none keeps no labels.
    """
    for split, size in sizes.items():
        require_at_least(f"data.num_{split}", size, 2)

    def make(folder: Path) -> tuple[str, ...]:
        parts = []
        for i, (split, size) in enumerate(sizes.items()):
            x, classes = density.sample(size, SampleNoise(derive_seed(_SEED, i)))
            parts.append((split, x.float().numpy(), classes.numpy() if class_names and classes is not None else None))
        save_splits(folder, parts)
        return class_names

    source = {**settings, "sizes": sizes, "seed": _SEED}
    values = Values(CONTINUOUS, low=-math.inf, high=math.inf, levels=None)
    return prepare(name, cache, source, modality="vector", values=values, source_levels=None, make=make, density=density)


def require_positive(key: str, value: float) -> None:
    """Raise `UserError` unless a setting is a positive number."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{key}={value} must be a positive number")
