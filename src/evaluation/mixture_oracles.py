"""Known values of Gaussian mixtures: against scikit-learn's, and of expectation maximization."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from src.core.batch import Batch
from src.core.rng import SampleNoise, StreamNoise
from src.core.spec import CONTINUOUS, DataSpec, Values
from src.evaluation.oracle import Oracle
from src.models.gmm import GaussianMixture
from src.objectives.gaussian_mixture import COVARIANCES

__all__ = ["CHECKS"]

Oracles = Iterator[Oracle]

_NAMES = {"full": "full", "diagonal": "diag", "spherical": "spherical"}  # ours, and scikit-learn's
_UNBOUNDED = Values(CONTINUOUS, low=-math.inf, high=math.inf, levels=None)


def density_against_sklearn() -> Oracles:
    """log p of the same mixture by scikit-learn's score_samples, after some M steps."""
    from sklearn.mixture import GaussianMixture as Theirs  # slow to import

    x = _clusters()
    for name in COVARIANCES:
        ours = _fitted(x, num_components=3, covariance=name, num_steps=3)
        theirs = Theirs(3, covariance_type=_NAMES[name])
        mixture = ours.gaussians
        covariances = ours._covariance.to_covariances(mixture.factors)
        precisions = torch.linalg.inv(covariances) if covariances.ndim == 3 else 1 / covariances
        precisions = precisions.flatten() if name == "spherical" else precisions
        factors = torch.linalg.cholesky(precisions) if precisions.ndim == 3 else precisions.sqrt()
        theirs.weights_ = mixture.log_weights.exp().numpy()
        theirs.means_ = (mixture.means + ours.centre).numpy()
        theirs.precisions_cholesky_ = factors.numpy()
        worst = float((ours.log_prob(x) - torch.from_numpy(theirs.score_samples(x.numpy()))).abs().max())
        yield Oracle(f"largest error of log p by scikit-learn, {name} covariances", 0.0, worst, 1e-8)


def one_gaussian_by_maximum_likelihood() -> Oracles:
    """-1/2 log det(2 pi e S) is the mean log likelihood of one Gaussian with the data's covariance S."""
    x = _clusters()
    covariance = torch.cov(x.T, correction=0)
    expected = -0.5 * float(torch.logdet(2 * math.pi * math.e * covariance))
    got = float(_fitted(x, num_components=1, covariance="full", num_steps=1).log_prob(x).mean())
    yield Oracle("mean log p of one fitted Gaussian", expected, got, 1e-5)


def expectation_maximization_climbs() -> Oracles:
    """No M step lowers the log likelihood of the examples."""
    x = _clusters()
    reached = [float(_fitted(x, 3, "full", steps).log_prob(x).mean()) for steps in range(6)]
    fall = max(max(0.0, before - after) for before, after in zip(reached, reached[1:], strict=False))
    yield Oracle("largest fall of the log likelihood in an M step", 0.0, fall, 1e-9)


CHECKS: tuple[Callable[[], Oracles], ...] = (
    density_against_sklearn,
    one_gaussian_by_maximum_likelihood,
    expectation_maximization_climbs,
)


def _clusters() -> Tensor:
    """300 points `(300, 2)` float64 about three places."""
    z = SampleNoise(3).normal((300, 2), torch.zeros((), dtype=torch.float64))
    return z + 4.0 * torch.arange(300)[:, None].remainder(3) * torch.tensor([1.0, -0.5], dtype=torch.float64)


def _fitted(x: Tensor, num_components: int, covariance: str, num_steps: int) -> GaussianMixture:
    with torch.random.fork_rng():  # its first means, replaced at once, come from the global generator
        model = GaussianMixture(DataSpec("clusters", "vector", (2,), _UNBOUNDED), num_components, covariance)
    model.prepare(lambda: [Batch(x)], generator=StreamNoise(0))
    for _ in range(num_steps):
        model.accumulate(Batch(x))
        model.maximize()
    return model
