"""Points in the plane from Gaussian mixtures, on which a collapse of modes is seen and counted. Nothing is downloaded.

The conventions (radius, spacing, sigma, number of points) are those of Lin et al. 2018 (PacGAN), arXiv:1712.04086, from
its code; others have the same names (VEEGAN, "8 Gaussians"), and sizes that differ. A point's class is its component.
"""

import math
from pathlib import Path

import torch

from src.core.errors import UserError, require_at_least
from src.core.mixture import IsotropicMixture
from src.core.rng import SampleNoise, derive_seed
from src.core.spec import CONTINUOUS, Values
from src.data.arrays import Arrays, prepare, save_splits

__all__ = ["grid", "ring"]

_SEED = 0  # of the points: the data are the same in every run


def ring(cache: str, num_modes: int, radius: float, sigma: float, num_train: int, num_val: int, num_test: int) -> Arrays:
    """Equally likely Gaussians with their means evenly on a circle about the origin, the first one at (radius, 0).

    Args:
        cache: folder of prepared data sets.
        num_modes: number of components.
        radius: of the circle.
        sigma: standard deviation of each component.
        num_train, num_val, num_test: points drawn for each split.
    """
    require_at_least("data.num_modes", num_modes, 1)
    _require_positive("data.radius", radius)
    angle = 2 * math.pi * torch.arange(num_modes, dtype=torch.float64) / num_modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    layout = {"num_modes": num_modes, "radius": radius}
    return _drawn("ring", cache, layout, means, sigma, {"train": num_train, "val": num_val, "test": num_test})


def grid(cache: str, side: int, spacing: float, sigma: float, num_train: int, num_val: int, num_test: int) -> Arrays:
    """Equally likely Gaussians with their means on a square grid about the origin, row by row from below.

    Args:
        cache: folder of prepared data sets.
        side: components in a row, and rows.
        spacing: distance between neighbouring means.
        sigma: standard deviation of each component.
        num_train, num_val, num_test: points drawn for each split.
    """
    require_at_least("data.side", side, 1)
    _require_positive("data.spacing", spacing)
    place = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    means = torch.cartesian_prod(place, place).flip(1)
    layout = {"side": side, "spacing": spacing}
    return _drawn("grid", cache, layout, means, sigma, {"train": num_train, "val": num_val, "test": num_test})


def _drawn(
    name: str,
    cache: str,
    layout: dict[str, float],
    means: torch.Tensor,
    sigma: float,
    sizes: dict[str, int],
) -> Arrays:
    _require_positive("data.sigma", sigma)
    for split, size in sizes.items():
        require_at_least(f"data.num_{split}", size, 2)
    num_modes = len(means)
    weights = torch.full((num_modes,), 1 / num_modes, dtype=torch.float64)
    mixture = IsotropicMixture(means, float(sigma), weights)

    def make(folder: Path) -> tuple[str, ...]:
        parts = []
        for i, (split, size) in enumerate(sizes.items()):
            x, component = mixture.sample(size, SampleNoise(derive_seed(_SEED, i)))
            parts.append((split, x.float().numpy(), component.numpy()))
        save_splits(folder, parts)
        return tuple(str(k) for k in range(num_modes))

    source = {**layout, "sigma": sigma, "sizes": sizes, "seed": _SEED}
    values = Values(CONTINUOUS, low=-math.inf, high=math.inf, levels=None)
    return prepare(name, cache, source, modality="vector", values=values, source_levels=None, make=make, mixture=mixture)


def _require_positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{key}={value} must be a positive number")
