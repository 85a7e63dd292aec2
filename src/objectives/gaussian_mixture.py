"""Mixtures of Gaussians as functions of tensors: densities, the two steps of expectation maximization, a first guess.

    p(z) = sum_k w_k N(z; mu_k, Sigma_k),    Sigma_k^-1 = P_k P_k^T

A component is held by its mean and the factor P of its precision: then a density needs one product and no inverse. An
exponential family is learned from sums: with s(z) = (1, z, the second-order features of z),

    E step    r_k(z) = p(k | z),    S_k = sum over examples of r_k(z) s(z)
    M step    w_k, mu_k, Sigma_k = what S_k gives

and log w_k N(z; mu_k, Sigma_k) is linear in s(z), too. So both steps are one matrix product for all components: of their
coefficients with s, and of their responsibilities with s. This costs half of what K separate products with symmetric
matrices do.

Written out like this a square is the difference of larger numbers. All is float64, z has to be centred at the mean of the
data, and no covariance has an eigenvalue below a floor; then what is lost is of the order 1e-16 |z|^2 / floor.

Sizes: K components, D dimensions, B examples, F second-order features.

References:
    Dempster, Laird, Rubin 1977, "Maximum likelihood from incomplete data via the EM algorithm", JRSS B 39.
    Bishop 2006, "Pattern recognition and machine learning", section 9.2: EM for mixtures, and their singularities.
    Arthur, Vassilvitskii 2007, "k-means++: the advantages of careful seeding", SODA.
    Lloyd 1982, "Least squares quantization in PCM", IEEE Transactions on information theory 28.
    Fraley, Raftery 2007, "Bayesian regularization for normal mixture estimation and model-based clustering", Journal of
        classification 24: a prior of the covariances.
    Ueda, Nakano, Ghahramani, Hinton 2000, "SMEM algorithm for mixture models", Neural computation 12: splitting components.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from src.core.rng import Noise

__all__ = [
    "COVARIANCES",
    "Covariance",
    "DiagonalCovariance",
    "FullCovariance",
    "Gaussians",
    "SphericalCovariance",
    "add_statistics",
    "coefficients",
    "draw",
    "from_clusters",
    "from_statistics",
    "kmeans_plus_plus",
    "lloyd",
    "log_joint",
    "revive",
    "statistics_of",
]

_CACHED_VALUES = 2**19  # float64 values that a core keeps at hand
_VALUES = 2**25  # that are computed at a time, elsewhere
_LEAST_EXAMPLES, _EXAMPLES = 128, 256  # in a product: with all of their features, or with a part of them


@dataclass(frozen=True)
class Gaussians:
    """K weighted Gaussians in D dimensions, all float64.

    Args:
        log_weights: log w `(K,)`; the weights add up to 1.
        means: `(K, D)`.
        factors: P of each component, in the shape of its `Covariance`.
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor


class Covariance(ABC):
    """What the covariance matrices of the components may be, and the second-order features that they are learned from."""

    in_words: ClassVar[str]

    @abstractmethod
    def shape(self, dim: int) -> tuple[int, ...]:
        """Of a component's covariance as it is stored, and of its factor."""

    @abstractmethod
    def num_features(self, dim: int) -> int:
        """F, the numbers that z z^T is summed up in. Those of dimensions `first` to D are the last F(D - first)."""

    @abstractmethod
    def write_features(self, z: Tensor, first: int, last: int, out: Tensor) -> None:
        """The features of dimensions `first` to before `last` of z `(D, B)` into `(f, B)`."""

    def parts(self, dim: int, limit: int) -> list[tuple[int, int]]:
        """Ranges of dimensions, each with at most so many features, or of one dimension; by default all in one."""
        return [(0, dim)]

    @abstractmethod
    def from_moments(self, moments: Tensor, means: Tensor) -> Tensor:
        """Covariances `(K, *shape)` from mean features `(K, F)` and means `(K, D)`."""

    @abstractmethod
    def to_moments(self, covariances: Tensor, means: Tensor) -> Tensor:
        """Mean features `(K, F)`: the inverse of `from_moments`."""

    @abstractmethod
    def factors(self, covariances: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """P `(K, *shape)` of covariances whose eigenvalues below the floor are raised to it, and which were, `(K,)` bool.

        Of all covariances with no eigenvalue below the floor this is the one of the largest likelihood, so an M step with a
        floor is still a maximization, and a component that needs none is not changed.
        """

    @abstractmethod
    def to_covariances(self, factors: Tensor) -> Tensor:
        """The inverse of `factors`."""

    @abstractmethod
    def log_det(self, factors: Tensor, dim: int) -> Tensor:
        """log det P, `(K,)`."""

    @abstractmethod
    def whiten(self, differences: Tensor, factors: Tensor) -> Tensor:
        """P^T (z - mu) of differences `(K, B, D)`, same shape: N(0, I) if z is of the component."""

    @abstractmethod
    def colour(self, noise: Tensor, factor: Tensor) -> Tensor:
        """N(0, Sigma) values from N(0, I) values `(B, D)` of one component, whose factor is `shape`."""

    @abstractmethod
    def linear(self, means: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Of -(z - mu)^T P P^T (z - mu) / 2 the coefficients of z `(K, D)`, and of the features `(K, F)`."""

    @abstractmethod
    def longest_axis(self, covariance: Tensor, dim: int) -> Tensor:
        """The direction of one component's largest variance, as long as the standard deviation there, `(D,)`."""


class FullCovariance(Covariance):
    """Any covariance `(D, D)`. Features: z_i z_j for i <= j, row by row."""

    in_words = "full"

    def shape(self, dim: int) -> tuple[int, ...]:
        return (dim, dim)

    def num_features(self, dim: int) -> int:
        return dim * (dim + 1) // 2

    def write_features(self, z: Tensor, first: int, last: int, out: Tensor) -> None:
        start = 0
        for i in range(first, last):  # whole rows: to gather the pairs by index takes several times as long
            end = start + len(z) - i
            torch.mul(z[i], z[i:], out=out[start:end])
            start = end

    def parts(self, dim: int, limit: int) -> list[tuple[int, int]]:
        parts, first, size = [], 0, 0
        for i in range(dim):
            if i > first and size + dim - i > limit:
                parts.append((first, i))
                first, size = i, 0
            size += dim - i
        return [*parts, (first, dim)]

    def from_moments(self, moments: Tensor, means: Tensor) -> Tensor:
        dim = means.shape[1]
        i, j = torch.triu_indices(dim, dim, device=means.device)
        full = moments.new_empty(len(means), dim, dim)
        full[:, i, j] = full[:, j, i] = moments
        return full - means[:, :, None] * means[:, None, :]

    def to_moments(self, covariances: Tensor, means: Tensor) -> Tensor:
        i, j = torch.triu_indices(means.shape[1], means.shape[1], device=means.device)
        return covariances[:, i, j] + means[:, i] * means[:, j]

    def factors(self, covariances: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        eye = torch.eye(covariances.shape[1], dtype=covariances.dtype, device=covariances.device)
        _, failures = torch.linalg.cholesky_ex(covariances - floor * eye)
        is_low = failures != 0
        if is_low.any():
            covariances = covariances.clone()
            for k in is_low.nonzero()[:, 0].tolist():  # one at a time: a batch of large ones is slow on some devices
                values, vectors = torch.linalg.eigh(covariances[k])
                raised = (vectors * values.clamp(min=floor)) @ vectors.T
                covariances[k] = (raised + raised.T) / 2
        lower = torch.linalg.cholesky(covariances)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT.contiguous(), is_low

    def to_covariances(self, factors: Tensor) -> Tensor:
        eye = torch.eye(factors.shape[1], dtype=factors.dtype, device=factors.device)
        lower = torch.linalg.solve_triangular(factors.mT, eye.expand_as(factors), upper=False)
        return lower @ lower.mT

    def log_det(self, factors: Tensor, dim: int) -> Tensor:
        return factors.diagonal(dim1=1, dim2=2).log().sum(1)

    def whiten(self, differences: Tensor, factors: Tensor) -> Tensor:
        return differences @ factors

    def colour(self, noise: Tensor, factor: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor.T, noise.T, upper=False).T

    def linear(self, means: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        dim = means.shape[1]
        precisions = factors @ factors.mT
        i, j = torch.triu_indices(dim, dim, device=means.device)
        of_pairs = torch.where(i == j, -0.5, -1.0).to(means)  # a pair i < j stands for j, i as well
        return (precisions @ means[:, :, None])[:, :, 0], of_pairs * precisions[:, i, j]

    def longest_axis(self, covariance: Tensor, dim: int) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        return vectors[:, -1] * values[-1].clamp(min=0).sqrt()


class DiagonalCovariance(Covariance):
    """A variance for each dimension, `(D,)`. Features: z_i^2."""

    in_words = "diagonal"

    def shape(self, dim: int) -> tuple[int, ...]:
        return (dim,)

    def num_features(self, dim: int) -> int:
        return dim

    def write_features(self, z: Tensor, first: int, last: int, out: Tensor) -> None:
        torch.square(z[first:last], out=out)

    def from_moments(self, moments: Tensor, means: Tensor) -> Tensor:
        return moments - means.square()

    def to_moments(self, covariances: Tensor, means: Tensor) -> Tensor:
        return covariances + means.square()

    def factors(self, covariances: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        return covariances.clamp(min=floor).rsqrt(), (covariances < floor).any(1)

    def to_covariances(self, factors: Tensor) -> Tensor:
        return factors.square().reciprocal()

    def log_det(self, factors: Tensor, dim: int) -> Tensor:
        return factors.log().sum(1) * (dim / factors.shape[1])

    def whiten(self, differences: Tensor, factors: Tensor) -> Tensor:
        return differences * factors[:, None]

    def colour(self, noise: Tensor, factor: Tensor) -> Tensor:
        return noise / factor

    def linear(self, means: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        precisions = factors.square()
        return precisions * means, -0.5 * precisions

    def longest_axis(self, covariance: Tensor, dim: int) -> Tensor:
        variance, where = covariance.expand(dim).max(0)
        axis = torch.zeros(dim, dtype=covariance.dtype, device=covariance.device)
        axis[where] = variance.sqrt()
        return axis


class SphericalCovariance(DiagonalCovariance):
    """One variance for all dimensions, `(1,)`. Feature: |z|^2."""

    in_words = "spherical"

    def shape(self, dim: int) -> tuple[int, ...]:
        return (1,)

    def num_features(self, dim: int) -> int:
        return min(dim, 1)

    def write_features(self, z: Tensor, first: int, last: int, out: Tensor) -> None:
        torch.sum(z[first:last].square(), 0, keepdim=True, out=out)

    def from_moments(self, moments: Tensor, means: Tensor) -> Tensor:
        return (moments - means.square().sum(1, keepdim=True)) / means.shape[1]

    def to_moments(self, covariances: Tensor, means: Tensor) -> Tensor:
        return means.shape[1] * covariances + means.square().sum(1, keepdim=True)


COVARIANCES: dict[str, Covariance] = {
    kind.in_words: kind for kind in (FullCovariance(), DiagonalCovariance(), SphericalCovariance())
}


def log_joint(z: Tensor, gaussians: Gaussians, covariance: Covariance) -> Tensor:
    """log w_k N(z; mu_k, Sigma_k) of points `(B, D)`, `(B, K)` float64 in nats, by -|P^T (z - mu)|^2 / 2 as it stands.

    Its logsumexp over the components is log p(z).
    """
    num_components, dim = gaussians.means.shape
    height = gaussians.log_weights + covariance.log_det(gaussians.factors, dim) - 0.5 * dim * math.log(2 * math.pi)
    parts = []
    for some in z.double().split(max(1, _VALUES // (num_components * dim))):
        differences = some[None] - gaussians.means[:, None]
        parts.append(-0.5 * covariance.whiten(differences, gaussians.factors).square().sum(2).T)
    return torch.cat(parts) + height


def coefficients(gaussians: Gaussians, covariance: Covariance) -> Tensor:
    """Of s(z) in log w_k N(z; mu_k, Sigma_k), `(K, 1 + D + F)`: the natural parameters, with the normalizer first."""
    means, dim = gaussians.means, gaussians.means.shape[1]
    of_z, of_features = covariance.linear(means, gaussians.factors)
    height = gaussians.log_weights + covariance.log_det(gaussians.factors, dim) - 0.5 * dim * math.log(2 * math.pi)
    constant = height - 0.5 * (of_z * means).sum(1)
    return torch.cat([constant[:, None], of_z, of_features], 1)


def add_statistics(z: Tensor, coefficients: Tensor, covariance: Covariance, statistics: Tensor) -> Tensor:
    """The E step: add r_k(z) s(z) of all points to the statistics, in place.

    Args:
        z: `(B, D)`, centred at the mean of the data.
        coefficients: of the present components, from `coefficients`.
        covariance: their kind.
        statistics: `(K, 1 + D + F)` float64.

    Returns:
        log p(z) under the present components, `(B,)` float64 in nats.
    """
    log_prob = []
    for block in _blocks(z, covariance):
        joint = z.new_zeros(len(statistics), block.size, dtype=torch.float64)
        for columns, s in block.features():
            joint.addmm_(coefficients[:, columns], s)
        total = joint.logsumexp(0)
        responsibilities = joint.sub_(total).exp_()
        for columns, s in block.features():
            statistics[:, columns].addmm_(responsibilities, s.T)
        log_prob.append(total)
    return torch.cat(log_prob)


def from_statistics(
    statistics: Tensor,
    dim: int,
    covariance: Covariance,
    floor: float,
    prior: Tensor | None = None,
    prior_count: float = 0.0,
) -> tuple[Gaussians, Tensor]:
    """The M step: the components of the largest likelihood given the responsibilities, or of the largest posterior.

    With a prior, |Sigma_k|^(-n_0 / 2) exp(-n_0 tr(Sigma_k^-1 Sigma_0) / 2), a covariance is the mean of what the examples
    of the component say and of Sigma_0, which counts as n_0 examples.

    Args:
        statistics: `(K, 1 + D + F)`. A component without any gets a weight that is next to nothing.
        dim: D.
        covariance: the kind of the components.
        floor: the least eigenvalue of a covariance, more than 0.
        prior: Sigma_0, in the shape of a covariance; None for none.
        prior_count: n_0.

    Returns:
        The components, and which of them were held up by the floor, `(K,)` bool.
    """
    counts, sums, moments = statistics.split([1, dim, statistics.shape[1] - 1 - dim], 1)
    counts = counts.clamp(min=torch.finfo(counts.dtype).tiny)
    means = sums / counts
    covariances = covariance.from_moments(moments / counts, means)
    if prior is not None:
        covariances = _averaged(covariances, counts, prior, prior_count)
    factors, is_low = covariance.factors(covariances, floor)
    weights = counts[:, 0] / counts.sum()
    return Gaussians(weights.log(), means, factors), is_low


def statistics_of(gaussians: Gaussians, covariance: Covariance) -> Tensor:
    """Mean statistics of one example `(K, 1 + D + F)` whose M step gives these components: the inverse of it."""
    moments = covariance.to_moments(covariance.to_covariances(gaussians.factors), gaussians.means)
    each = torch.cat([torch.ones_like(gaussians.means[:, :1]), gaussians.means, moments], 1)
    return gaussians.log_weights.exp()[:, None] * each


def revive(gaussians: Gaussians, covariance: Covariance, is_lost: Tensor) -> Gaussians:
    """Give each lost component half of the heaviest one: half of its weight, its covariance, and a place beside it.

    The two lie a standard deviation apart on the longest axis of the one that they were. (So no data is needed, and all
    devices do the same.) A weight that is nothing is left behind.
    """
    weights, means, factors = gaussians.log_weights.exp(), gaussians.means.clone(), gaussians.factors.clone()
    for lost in is_lost.nonzero()[:, 0].tolist():
        weights[lost] = 0
        heaviest = int(weights.argmax())
        weights[[lost, heaviest]] = weights[heaviest] / 2
        factors[lost] = factors[heaviest]
        axis = covariance.longest_axis(covariance.to_covariances(factors[lost][None])[0], means.shape[1])
        means[lost] = means[heaviest] + axis / 2
        means[heaviest] -= axis / 2
    return Gaussians((weights / weights.sum()).log(), means, factors)


def draw(
    n: int, gaussians: Gaussians, covariance: Covariance, generator: Noise, is_allowed: Tensor | None = None
) -> Tensor:
    """n independent points, `(n, D)` float64; point i from those components alone where `is_allowed` `(n, K)` is True."""
    means, weights = gaussians.means, gaussians.log_weights.exp()
    u = generator.uniform((n,), like=means)
    if is_allowed is None:
        cumulated = weights.cumsum(0)
        component = torch.searchsorted(cumulated, u * cumulated[-1])
    else:
        cumulated = (weights * is_allowed).cumsum(1)
        component = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:])[:, 0]
    component = component.clamp(max=len(means) - 1)
    noise = generator.normal((n, means.shape[1]), like=means)
    z = means[component]
    for k in component.unique().tolist():
        own = component == k
        z[own] += covariance.colour(noise[own], gaussians.factors[k])
    return z


def kmeans_plus_plus(z: Tensor, num_clusters: int, generator: Noise) -> Tensor:
    """Centres `(K, D)` among points `(N, D)`: each drawn with a chance that grows with the squared distance to the others.

    The first is any. For each further one a few points are drawn, and the one is taken that leaves the smallest sum of
    squares (the greedy variant that Arthur and Vassilvitskii mention in section 7).
    """
    num_candidates = 2 + int(math.log(num_clusters))
    first = int(generator.uniform((1,), like=z)[0] * len(z))
    chosen = [min(first, len(z) - 1)]
    nearest = _squared_distances(z, z[chosen])[:, 0]
    for _ in range(num_clusters - 1):
        cumulated = nearest.cumsum(0)
        u = generator.uniform((num_candidates,), like=z) * cumulated[-1]
        candidates = torch.searchsorted(cumulated, u).clamp(max=len(z) - 1)
        after = torch.minimum(nearest[:, None], _squared_distances(z, z[candidates]))
        best = int(after.sum(0).argmin())
        chosen.append(int(candidates[best]))
        nearest = after[:, best]
    return z[chosen]


def lloyd(z: Tensor, centres: Tensor, num_iterations: int) -> Tensor:
    """k-means of points `(N, D)` from centres `(K, D)`: the cluster of each point, `(N,)` int64. An empty one stays."""
    clusters = _squared_distances(z, centres).argmin(1)
    for _ in range(num_iterations):
        sums = torch.zeros_like(centres).index_add_(0, clusters, z)
        counts = clusters.bincount(minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        before, clusters = clusters, _squared_distances(z, centres).argmin(1)
        if torch.equal(before, clusters):
            break
    return clusters


def from_clusters(
    z: Tensor, clusters: Tensor, num_clusters: int, covariance: Covariance, floor: float
) -> tuple[Gaussians, Tensor]:
    """A component for each cluster `(N,)` of points `(N, D)`, centred at the mean of the data.

    The covariance of a cluster is averaged with the mean covariance of all points in their clusters, which counts as D + 1
    points: a cluster of few points would otherwise begin as flat as they lie, and stay so.

    Returns:
        The components, and that mean covariance.
    """
    dim = z.shape[1]
    statistics = z.new_zeros(num_clusters, 1 + dim + covariance.num_features(dim))
    is_of = (clusters == torch.arange(num_clusters, device=z.device)[:, None]).to(z)
    start = 0
    for block in _blocks(z, covariance):
        for columns, s in block.features():
            statistics[:, columns].addmm_(is_of[:, start : start + block.size], s.T)
        start += block.size
    counts, sums, moments = statistics.split([1, dim, statistics.shape[1] - 1 - dim], 1)
    means = sums / counts.clamp(min=1)
    covariances = covariance.from_moments(moments / counts.clamp(min=1), means)
    pooled = torch.tensordot(counts[:, 0] / len(z), covariances, 1)
    factors, _ = covariance.factors(_averaged(covariances, counts, pooled, dim + 1), floor)
    weights = counts[:, 0].clamp(min=1e-3)
    return Gaussians((weights / weights.sum()).log(), means, factors), pooled


def _averaged(covariances: Tensor, counts: Tensor, prior: Tensor, prior_count: float) -> Tensor:
    """The means of covariances `(K, *shape)` of so many examples `(K, 1)` each and of one `shape`, of n_0 examples."""
    counts = counts.view(-1, *[1] * prior.ndim)
    return (counts * covariances + prior_count * prior) / (counts + prior_count)


class _Block:
    """s(z) of a few points, in parts that fit the cache. A single part is kept, several are computed whenever asked for.

    Args:
        z: `(D, b)` float64.
        covariance: whose features.
        parts: ranges of dimensions.
        scratch: space for the features of one part, `(f, at least b)`.
    """

    def __init__(self, z: Tensor, covariance: Covariance, parts: list[tuple[int, int]], scratch: Tensor) -> None:
        self.size = z.shape[1]
        self._covariance = covariance
        self._parts = parts
        self._scratch = scratch[:, : self.size]
        self._head = torch.cat([torch.ones_like(z[:1]), z])
        self._written: int | None = None

    def features(self) -> Iterator[tuple[slice, Tensor]]:
        """The columns of a part in the statistics, and its rows `(f, b)`, which the next one overwrites."""
        z, start = self._head[1:], len(self._head)
        yield slice(0, start), self._head
        for first, last in self._parts:
            size = self._covariance.num_features(len(z) - first) - self._covariance.num_features(len(z) - last)
            s = self._scratch[:size]
            if self._written != first:
                self._covariance.write_features(z, first, last, s)
                self._written = first
            yield slice(start, start + size), s
            start += size


def _blocks(z: Tensor, covariance: Covariance) -> Iterator[_Block]:
    """s(z) of points `(B, D)`, a few at a time."""
    dim, values = z.shape[1], _CACHED_VALUES if z.device.type == "cpu" else _VALUES
    num_rows = covariance.num_features(dim)
    if num_rows * _LEAST_EXAMPLES <= values:
        parts, size = [(0, dim)], values // num_rows
    else:
        parts, size = covariance.parts(dim, values // _EXAMPLES), _EXAMPLES
        num_rows = max(values // _EXAMPLES, dim)
    size = -(-len(z) // -(-len(z) // size))  # all of nearly one size
    scratch = torch.empty(num_rows, size, dtype=torch.float64, device=z.device)
    for some in z.double().T.contiguous().split(size, 1):
        yield _Block(some, covariance, parts, scratch)


def _squared_distances(z: Tensor, centres: Tensor) -> Tensor:
    """|z - c|^2 of points `(N, D)` and centres `(K, D)`, `(N, K)`, not below 0."""
    return torch.addmm(z.square().sum(1, keepdim=True) + centres.square().sum(1), z, centres.T, alpha=-2).clamp_(min=0)
