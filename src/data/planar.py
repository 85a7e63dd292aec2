"""Points in the plane from densities that flows are tried on, each known exactly. Nothing is downloaded.

Names are shared by definitions of different sizes, whose entropies differ; each function says which one it follows. An
entropy is the least cross-entropy that any model can have on these points.

References:
    Grathwohl et al. 2019 (FFJORD), arXiv:1810.01367: eight Gaussians, checkerboard and swiss roll, from its code
        (`lib/toy_data.py`); the same points are in De Cao, Titov, Aziz 2019 (BNAF), arXiv:1904.04676.
    Pedregosa et al. 2011, "Scikit-learn: machine learning in Python", JMLR 12: `make_moons` and `make_swiss_roll`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from src.core.density import Entropy, entropy_on_grid
from src.core.errors import UserError
from src.core.mixture import IsotropicMixture
from src.core.rng import Noise
from src.data.arrays import Arrays
from src.data.drawn import draw_once, require_positive

__all__ = ["Arc", "BlurredArcs", "Checkerboard", "checkerboard", "eight_gaussians", "swiss_roll", "two_moons"]

_FFJORD_DIVISOR = 1.414  # as it stands in the code, not the root of 2
_NODES_PER_SIGMA = 3.2  # of a quadrature along an arc; with half as many, log p is off by 1e-5 five sigma beside it
_LEAST_NODES = 64  # of an arc of few sigma: far beside it, the integrand changes as fast as the arc bends
_MAX_VALUES = 200_000  # of intermediate values at a time: they stay in the processor's cache


def two_moons(cache: str, noise: float, scale: float, shift: float, num_train: int, num_val: int, num_test: int) -> Arrays:
    """Two half circles with Gaussian noise, as scikit-learn's `make_moons`: a point's class is its moon.

    Moon 0 is (cos t, sin t), moon 1 is (1 - cos t, 1/2 - sin t), t uniform on [0, pi]; both moons are equally likely. Two
    things differ from scikit-learn, where t takes evenly spaced values and both moons have equally many points. The
    entropy is 0.289 nats with a noise of 0.05, and 1.008 with 0.1; a scale adds twice its logarithm.

    Args:
        cache: folder of prepared data sets.
        noise: standard deviation of every value before it is scaled, at least 0.01.
        scale, shift: a point p, with its noise, becomes scale p + shift; the scale is positive.
        num_train, num_val, num_test: points drawn for each split.
    """
    _require_noise(noise, least=0.01)
    if not scale > 0:
        raise UserError(f"data.scale={scale} must be positive")

    def upper(t: Tensor) -> Tensor:
        return scale * torch.stack([t.cos(), t.sin()], 1) + shift

    def lower(t: Tensor) -> Tensor:
        return scale * torch.stack([1 - t.cos(), 0.5 - t.sin()], 1) + shift

    density = BlurredArcs((Arc(upper, 0, math.pi, scale), Arc(lower, 0, math.pi, scale)), scale * float(noise))
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    settings = {"noise": noise, "scale": scale, "shift": shift}
    return draw_once("two_moons", cache, settings, density, sizes, ("0", "1"))


def swiss_roll(cache: str, noise: float, num_train: int, num_val: int, num_test: int) -> Arrays:
    """A spiral with Gaussian noise, as FFJORD: the first and the third value of scikit-learn's `make_swiss_roll`, over 5.

    It is (t cos t, t sin t) / 5 with t uniform on [3 pi / 2, 9 pi / 2], so that points are denser inside. There are no
    classes. The entropy, by quadrature, is 2.6696 nats with a noise of 1.

    Args:
        cache: folder of prepared data sets.
        noise: standard deviation of every value before the division by 5, at least 0.1.
        num_train, num_val, num_test: points drawn for each split.
    """
    _require_noise(noise, least=0.1)

    def spiral(t: Tensor) -> Tensor:
        return torch.stack([t * t.cos(), t * t.sin()], 1) / 5

    end = 4.5 * math.pi
    density = BlurredArcs((Arc(spiral, 1.5 * math.pi, end, math.sqrt(1 + end**2) / 5),), noise / 5)
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    return draw_once("swiss_roll", cache, {"noise": noise}, density, sizes)


def checkerboard(cache: str, num_train: int, num_val: int, num_test: int) -> Arrays:
    """The eight black squares of a 4x4 board on [-4, 4]^2, uniformly, as FFJORD: the one from (0, 0) to (2, 2) is black.

    There are no classes. The entropy is ln 32 = 3.4657 nats. (FFJORD's points are twice those of a board of unit squares.)

    Args:
        cache: folder of prepared data sets.
        num_train, num_val, num_test: points drawn for each split.
    """
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    return draw_once("checkerboard", cache, {}, Checkerboard(), sizes)


def eight_gaussians(cache: str, radius: float, sigma: float, num_train: int, num_val: int, num_test: int) -> Arrays:
    """Eight equally likely Gaussians around a circle, as FFJORD and BNAF: radius and sigma are divided by 1.414 there.

    A point's class is its component, counted against the clock from (radius / 1.414, 0). The entropy is 2.8319 nats with
    a radius of 4 and a sigma of 0.5. (`data=ring` is PacGAN's, and far narrower.)

    Args:
        cache: folder of prepared data sets.
        radius: of the circle, before the division.
        sigma: standard deviation of each component, before the division.
        num_train, num_val, num_test: points drawn for each split.
    """
    require_positive("data.radius", radius)
    require_positive("data.sigma", sigma)
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    means = radius / _FFJORD_DIVISOR * torch.stack([angle.cos(), angle.sin()], 1)
    density = IsotropicMixture(means, sigma / _FFJORD_DIVISOR, torch.full((8,), 1 / 8, dtype=torch.float64))
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    names = tuple(str(k) for k in range(8))
    return draw_once("eight_gaussians", cache, {"radius": radius, "sigma": sigma}, density, sizes, names)


@dataclass(frozen=True)
class Arc:
    """A curve in the plane with a parameter that is uniform between two ends.

    Args:
        point: the curve, from parameters `(N,)` float64 to points `(N, 2)`.
        start, end: of the parameter.
        max_speed: largest length of the curve's derivative, in data units.
    """

    point: Callable[[Tensor], Tensor]
    start: float
    end: float
    max_speed: float


@dataclass(frozen=True, eq=False)
class BlurredArcs:
    """Equally likely arcs with isotropic Gaussian noise: p(x) = mean_k 1/(b_k - a_k) int N(x; c_k(t), sigma^2 I) dt.

    The integral is a Gauss-Legendre sum with a spacing below sigma and at least 64 nodes, which is right to 1e-6 of its
    value and better as far as 20 sigma beyond the arcs. A class is an arc.

    Args:
        arcs: c_k.
        sigma: standard deviation of the noise, in data units.
    """

    arcs: tuple[Arc, ...]
    sigma: float

    @cached_property
    def entropy(self) -> Entropy:
        """By quadrature."""
        points = self._nodes[0]
        low, high = points.amin(0) - 8 * self.sigma, points.amax(0) + 8 * self.sigma
        return entropy_on_grid(self.log_prob, low, high, self.sigma / 2)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of points `(B, 2)`, `(B,)` float64 in nats."""
        nodes, weights = self._nodes[0] / self.sigma, self._nodes[1]
        x = x.double() / self.sigma
        # |x - c|^2 as x^2 + c^2 - 2 x.c, for speed; in float64, with arcs of at most 1,000 sigma, nothing is lost
        of_nodes, num_rows = weights.log() - 0.5 * nodes.square().sum(1), max(1, _MAX_VALUES // len(nodes))
        log_sums = [torch.logsumexp(torch.addmm(of_nodes, part, nodes.T), 1) for part in x.split(num_rows)]
        return torch.cat(log_sums) - 0.5 * x.square().sum(1) - math.log(2 * math.pi * self.sigma**2)

    def sample(self, n: int, generator: Noise) -> tuple[Tensor, Tensor]:
        """Independent points `(n, 2)` float64 and their arcs `(n,)` int64."""
        like = torch.zeros((), dtype=torch.float64)
        u = generator.uniform((n, 2), like)
        which = (u[:, 0] * len(self.arcs)).long().clamp(max=len(self.arcs) - 1)
        noise = self.sigma * generator.normal((n, 2), like)
        x = torch.empty_like(noise)
        for k, arc in enumerate(self.arcs):
            is_own = which == k
            x[is_own] = arc.point(arc.start + (arc.end - arc.start) * u[is_own, 1])
        return x + noise, which

    @cached_property
    def _nodes(self) -> tuple[Tensor, Tensor]:
        """Points `(N, 2)` on all arcs and their weights `(N,)`, float64, which add up to 1."""
        from scipy.special import roots_legendre  # slow to import

        points, weights = [], []
        for arc in self.arcs:
            length = arc.end - arc.start
            num_nodes = max(_LEAST_NODES, math.ceil(_NODES_PER_SIGMA * arc.max_speed * length / self.sigma))
            nodes, weight = roots_legendre(num_nodes)
            points.append(arc.point(arc.start + length * (torch.from_numpy(nodes) + 1) / 2))
            weights.append(torch.from_numpy(weight) / (2 * len(self.arcs)))
        return torch.cat(points), torch.cat(weights)


class Checkerboard:
    """Uniform on those squares of side 2 of the board [-4, 4]^2 whose column and row, from the middle, add up evenly."""

    _side, _num_squares = 2, 8

    @property
    def entropy(self) -> Entropy:
        """The logarithm of the area."""
        return Entropy(math.log(self._num_squares * self._side**2), None, "closed form")

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of points `(B, 2)`, `(B,)` float64 in nats: -ln 32 on black squares with their rims, else -inf."""
        place = x.double() / self._side
        is_black = torch.zeros(len(x), dtype=torch.bool)
        below, above = place.floor(), place.ceil() - 1  # on a line between two squares a point belongs to both
        for column in (below[:, 0], above[:, 0]):
            for row in (below[:, 1], above[:, 1]):
                is_on_board = (column >= -2) & (column <= 1) & (row >= -2) & (row <= 1)
                is_black |= is_on_board & ((column + row) % 2 == 0)
        return torch.full((len(x),), -self.entropy.nats, dtype=torch.float64).masked_fill(~is_black, -math.inf)

    def sample(self, n: int, generator: Noise) -> tuple[Tensor, None]:
        """Independent points `(n, 2)` float64, without classes."""
        u = generator.uniform((n, 3), torch.zeros((), dtype=torch.float64))
        x = 4 * u[:, 0] - 2
        y = u[:, 1] - 2 * (u[:, 2] < 0.5) + x.floor() % 2
        return self._side * torch.stack([x, y], 1), None


def _require_noise(noise: float, least: float) -> None:
    if not (math.isfinite(noise) and noise >= least):
        raise UserError(f"data.noise={noise} must be a number of at least {least}")
