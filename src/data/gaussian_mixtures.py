"""Points from Gaussian mixtures: in the plane, where a collapse of modes is seen and counted, and in any dimension.

Nothing is downloaded. The conventions of `ring` and `grid` (radius, spacing, sigma, number of points) are those of PacGAN,
from its code; others have the same names (VEEGAN, "8 Gaussians"), and sizes that differ. A point's class is its component.

References:
    Lin et al. 2018 (PacGAN), arXiv:1712.04086.
    Mezzadri 2007, "How to generate random matrices from the classical compact groups", arXiv:math-ph/0609050.
"""

import math

import torch

from src.core.errors import UserError, require_at_least
from src.core.mixture import GaussianMixtureDensity, IsotropicMixture
from src.core.rng import SampleNoise, derive_seed
from src.data.arrays import Arrays
from src.data.drawn import draw_once, require_positive

__all__ = ["gaussian_mixture", "grid", "random_mixture", "ring"]


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
    require_positive("data.radius", radius)
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
    require_positive("data.spacing", spacing)
    place = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    means = torch.cartesian_prod(place, place).flip(1)
    layout = {"side": side, "spacing": spacing}
    return _drawn("grid", cache, layout, means, sigma, {"train": num_train, "val": num_val, "test": num_test})


def gaussian_mixture(
    cache: str,
    dim: int,
    num_components: int,
    spread: float,
    min_std: float,
    max_std: float,
    seed: int,
    num_train: int,
    num_val: int,
    num_test: int,
) -> Arrays:
    """A random mixture of Gaussians with full covariances, in any number of dimensions. A point's class is its component.

    It is drawn like this: means from N(0, spread^2 I); covariances Q diag(s^2) Q^T, with Q uniform among the rotations and
    reflections, and ln s uniform between ln min_std and ln max_std; weights in proportion to numbers uniform on [1, 3].
    The entropy has no closed form and is estimated.

    Args:
        cache: folder of prepared data sets.
        dim: dimensions D.
        num_components: K.
        spread: standard deviation of the means.
        min_std, max_std: smallest and largest standard deviation along an axis of a component.
        seed: of the mixture; the points are drawn from it in one way.
        num_train, num_val, num_test: points drawn for each split.
    """
    require_at_least("data.dim", dim, 1)
    require_at_least("data.num_components", num_components, 1)
    for key, value in (("spread", spread), ("min_std", min_std), ("max_std", max_std)):
        require_positive(f"data.{key}", value)
    if min_std > max_std:
        raise UserError(f"data.min_std={min_std} must not be above data.max_std={max_std}")
    density = random_mixture(dim, num_components, spread, min_std, max_std, seed)
    settings = {"dim": dim, "num_components": num_components, "spread": spread, "seed_of_mixture": seed}
    settings |= {"min_std": min_std, "max_std": max_std}
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    return draw_once("gaussian_mixture", cache, settings, density, sizes, _numbers(num_components))


def random_mixture(
    dim: int, num_components: int, spread: float, min_std: float, max_std: float, seed: int
) -> GaussianMixtureDensity:
    """The mixture of `gaussian_mixture`. Component k is the same for every number of components, but for its weight."""
    noise, like = SampleNoise(derive_seed(seed, 0)), torch.zeros((), dtype=torch.float64)
    means = spread * noise.normal((num_components, dim), like)
    q, r = torch.linalg.qr(noise.normal((num_components, dim, dim), like))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # with the signs of R it is uniform (Mezzadri 2007)
    u = noise.uniform((num_components, dim), like)
    std = (math.log(min_std) + (math.log(max_std) - math.log(min_std)) * u).exp()
    axes = q * std[:, None]
    weights = 1 + 2 * noise.uniform((num_components,), like)
    return GaussianMixtureDensity(means, torch.linalg.cholesky(axes @ axes.mT), weights / weights.sum())


def _drawn(
    name: str,
    cache: str,
    layout: dict[str, float],
    means: torch.Tensor,
    sigma: float,
    sizes: dict[str, int],
) -> Arrays:
    require_positive("data.sigma", sigma)
    weights = torch.full((len(means),), 1 / len(means), dtype=torch.float64)
    mixture = IsotropicMixture(means, float(sigma), weights)
    return draw_once(name, cache, {**layout, "sigma": sigma}, mixture, sizes, _numbers(len(means)))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(count))
