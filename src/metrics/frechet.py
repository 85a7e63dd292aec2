"""The Fréchet distance between two sets of features, each taken as a Gaussian.

    FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2)

On the features of a domain classifier it is called `fd`; only on Inception's may it be called FID.

References:
    Dowson, Landau 1982, "The Fréchet distance between multivariate normal distributions".
    Heusel et al. 2017, "GANs trained by a two time-scale update rule", arXiv:1706.08500.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric as StatefulMetric

from src.core.errors import NotApplicable
from src.metrics.features import Extractor, ImageSet
from src.metrics.metric import Inputs, SampleMetric

__all__ = ["FrechetDistance", "GaussianStatistics", "frechet_distance"]


def frechet_distance(mu_1: Tensor, cov_1: Tensor, mu_2: Tensor, cov_2: Tensor) -> Tensor:
    """Squared Fréchet distance between N(mu_1, cov_1) and N(mu_2, cov_2), `()`, in squared feature units.

    The trace of the root comes from the eigenvalues of the symmetric S_1^1/2 S_2 S_1^1/2, which are real and not negative.

    Args:
        mu_1, mu_2: `(D,)` float64.
        cov_1, cov_2: `(D, D)` float64.
    """
    root = _matrix_root(cov_1)
    eigenvalues = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0)
    return (mu_1 - mu_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * eigenvalues.sqrt().sum()


class GaussianStatistics(StatefulMetric):
    """Mean and covariance of features, in float64, from sums that merge across batches and processes.

    The sums are shifted by a fixed vector near the mean, so that a mean much larger than the spread costs no precision.

    Args:
        shift: `(D,)`, subtracted from every feature vector before it is summed.
    """

    full_state_update = False

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        dim = len(shift)
        self.shift: Tensor
        self.register_buffer("shift", shift.double(), persistent=False)
        self.count: Tensor
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features `(B, D)`."""
        centred = features.double() - self.shift
        self.count += len(centred)
        self.total += centred.sum(0)
        self.outer += centred.T @ centred

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean `(D,)` and unbiased covariance `(D, D)`."""
        count, total = cast(Tensor, self.count), cast(Tensor, self.total)
        mean = total / count
        cov = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        shift: Tensor = self.shift
        return mean + shift, cov


class FrechetDistance(SampleMetric):
    """`fd`: the Fréchet distance on the domain classifier's features."""

    def extractor(self, inputs: Inputs) -> Extractor:
        return inputs.classifier()

    def of(self, images: ImageSet, reference: ImageSet, extractor: Extractor) -> float:
        real = reference.features(extractor).features
        return float(frechet_distance(*_gaussian(images.features(extractor).features, real[0]), *_gaussian(real, real[0])))

    def protocol(self) -> dict[str, Any]:
        return {"distance": "Fréchet, plug-in estimate"}


def _gaussian(features: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    if len(features) < 2:
        raise NotApplicable(f"a covariance needs at least two samples, not {len(features)}")
    statistics = GaussianStatistics(shift)
    statistics.update(features)
    return statistics.compute()


def _matrix_root(cov: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    eigenvalues, vectors = torch.linalg.eigh(cov)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
