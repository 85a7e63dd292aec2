"""Precision, recall, density and coverage: are samples where real images are, and are real images where samples are?

Around each example of a set lies a ball that reaches to its k-th nearest neighbour in the set.

    precision   share of samples that lie in the ball of a real image
    recall      share of real images that lie in the ball of a sample
    density     mean number of real balls that a sample lies in, over k; can exceed 1
    coverage    share of real images whose ball holds a sample

References:
    Kynkäänniemi et al. 2019, "Improved precision and recall metric", arXiv:1904.06991.
    Naeem et al. 2020, "Reliable fidelity and diversity metrics", arXiv:2002.09797: density and coverage.
"""

from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError, require_at_least
from src.metrics.features import Extractor, ImageSet
from src.metrics.intervals import mean_interval, wilson_interval
from src.metrics.metric import HELD_OUT, HIGHER, NOISE, Inputs, Reading, SampleMetric, Space
from src.metrics.neighbours import neighbour_radii, squared_distances

__all__ = ["QUANTITIES", "Manifold", "prdc"]

QUANTITIES = ("precision", "recall", "density", "coverage")
_CHUNK = 1024
_INSIDE = 1 - 1e-9  # what lies on the edge of a ball is outside, however the edge was rounded


def prdc(samples: Tensor, real: Tensor, sample_radii: Tensor, real_radii: Tensor, k: int) -> dict[str, Tensor]:
    """What each quantity is the mean of, float64: over samples `(N,)` or over real images `(M,)`.

    Args:
        samples: `(N, D)` float64.
        real: `(M, D)` float64.
        sample_radii: `(N,)`, distance to the k-th nearest other sample.
        real_radii: `(M,)`, likewise.
    """
    balls_around = torch.zeros(len(samples), dtype=torch.float64)
    is_recalled = torch.zeros(len(real), dtype=torch.bool)
    is_covered = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(samples), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances = squared_distances(samples[part], real)
        in_real_ball = distances < _INSIDE * real_radii.square()
        balls_around[part] = in_real_ball.sum(1).double()
        is_covered |= in_real_ball.any(0)
        is_recalled |= (distances < _INSIDE * sample_radii[part, None].square()).any(0)
    return {
        "precision": (balls_around > 0).double(),
        "recall": is_recalled.double(),
        "density": balls_around / k,
        "coverage": is_covered.double(),
    }


class Manifold(SampleMetric):
    """One of the four quantities, of the samples and equally many training images.

    Precision and density have an interval, from the samples being independent draws; recall and coverage have none.

    Args:
        space: where it is measured.
        quantity: "precision", "recall", "density" or "coverage".
        k: the ball around an example reaches to its k-th nearest neighbour.
    """

    beside = (HELD_OUT, NOISE)

    def __init__(self, space: Space, quantity: str, k: int) -> None:
        super().__init__(space)
        if quantity not in QUANTITIES:
            raise UserError(f"metric.*.quantity={quantity} is not known; allowed: {', '.join(QUANTITIES)}")
        require_at_least(f"metric.{quantity}.k", k, 1)
        self._quantity = quantity
        self._k = k
        self.better = None if quantity == "density" else HIGHER  # denser than real images is no better

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        samples = inputs.features(images, extractor).features.double()
        real = inputs.reference_part(extractor, len(samples)).double()
        count = min(len(samples), len(real))
        if count <= self._k:
            raise NotApplicable(f"{count} images are too few for {self._k} nearest neighbours of each")
        samples, real = samples[:count], real[:count]
        settings = {"k": self._k, "count": count}

        def radii() -> dict[str, Tensor]:
            return {"radii": neighbour_radii(real, self._k)}

        def all_four() -> dict[str, Tensor]:
            real_radii = inputs.store.get("radii", inputs.reference, extractor, settings, radii)["radii"]
            return prdc(samples, real, neighbour_radii(samples, self._k), real_radii, self._k)

        of_reference = {"reference": inputs.reference.identity or id(inputs.reference)}
        values = inputs.store.get("prdc", images, extractor, settings | of_reference, all_four)[self._quantity]
        interval = None
        if self._quantity == "precision":
            interval = wilson_interval(int(values.sum()), count)
        elif self._quantity == "density":
            interval = mean_interval(values)
        return Reading(float(values.mean()), count, interval)

    def protocol(self) -> dict[str, Any]:
        return {"k": self._k, "reference_part": "as many as samples"}
