"""The 2-Wasserstein distance between samples and as many held-out points, by an exact optimal assignment.

    W2(x, y)^2 = min over permutations s of  1/n sum_i |x_i - y_s(i)|^2

Two sets of n draws from one distribution are not at distance 0: their distance falls slowly with n, and every value of a
model lies on that floor. So real points against real points stand beside each value, and n belongs to it.

References:
    Peyré, Cuturi 2019, "Computational optimal transport", arXiv:1803.00567, section 2.2.
    Tong et al. 2023, "Improving and generalizing flow-based generative models with minibatch optimal transport",
        arXiv:2302.00482: W2 of points in the plane as a measure of samples.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError
from src.core.rng import derive_seed
from src.metrics.features import Extractor, ImageSet
from src.metrics.metric import HELD_OUT, NOISE, STANDARDIZED, Inputs, Measurement, Reading, SampleMetric, Space

__all__ = ["Wasserstein", "wasserstein_2"]

_MAX_POINTS = 2000


def wasserstein_2(x: Tensor, y: Tensor) -> float:
    """W2 between the points x `(n, D)` and y `(n, D)`, each of weight 1 / n, in their units. The cost is of order n^3."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    assert x.shape == y.shape
    x, y = x.double(), y.double()
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(cost[rows, columns].mean())


class Vectors(Space):
    """The vectors themselves."""

    in_words = "data units"

    def extractor(self, inputs: Inputs) -> Extractor:
        if inputs.spec.modality != "vector":
            raise NotApplicable(f"it is of vectors; data={inputs.spec.name} gives {inputs.spec.modality}")
        return _VectorExtractor()


class _VectorExtractor(Extractor):
    name, sha256, is_worth_keeping = "the values themselves", "none", False

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1).cpu(), torch.zeros(len(images), 0)


class Wasserstein(SampleMetric):
    """W2 between some of the samples and as many held-out points, in data units. Its held-out row is the floor: further
    real points against the same held-out points.

    Of a table, whose columns are standardized, a distance is one of standardized columns: in the table's own units the
    column with the largest numbers would be all that counts.

    Args:
        num_points: n, at most 2000; fewer if there are fewer samples or held-out points.
    """

    unit = "data units"
    beside = (HELD_OUT, NOISE)
    judges_by_held_out = True

    def __init__(self, num_points: int) -> None:
        super().__init__(Vectors())
        if not 2 <= num_points <= _MAX_POINTS:
            raise UserError(f"metric.wasserstein.num_points={num_points} must be from 2 to {_MAX_POINTS:,}")
        self._num_points = num_points

    def extractor(self, inputs: Inputs) -> Extractor:
        return self._space.extractor(inputs)

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        held_out = inputs.need_held_out()
        x, y = (inputs.features(some, extractor).features for some in (images, held_out))
        count = min(self._num_points, len(x), len(y), inputs.unseen.count if inputs.unseen else _MAX_POINTS)

        def make() -> dict[str, Tensor]:
            return {"distance": torch.tensor(wasserstein_2(_some(x, count), _some(y, count)), dtype=torch.float64)}

        settings = {"count": count, "reference": held_out.identity or id(held_out)}
        distance = inputs.store.get("wasserstein", images, extractor, settings, make)["distance"]
        return Reading(float(distance), count)

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        units = {} if inputs.spec.own_units is None else {"units": STANDARDIZED}
        return {"num_reference": reading.count, "reference_split": "test", **units, **self.protocol()}

    def measure(self, inputs: Inputs) -> Measurement:
        found = super().measure(inputs)
        return found if inputs.spec.own_units is None else replace(found, unit="standardized units")

    def protocol(self) -> dict[str, Any]:
        return {"order": 2, "assignment": "exact"}


def _some(x: Tensor, count: int) -> Tensor:
    """A random part `(count, D)` of vectors, always the same: held-out points may come in an order that says something."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(derive_seed(0, 6)))[:count]]
