"""Copying of training images, and its opposite: samples that lie nearer to the training images than unseen real ones do.

Both tests compare the samples with held-out real images, which show what distance is honest.

    Copying   r(x) = d_1 / mean(d_2 ... d_50), the distances to the nearest training images: small if one stands out. The
              share of samples with an r below the 1 % quantile of held-out images, which for honest samples is 1 %.
    C_T       do samples or held-out images lie nearer to the training images? Mann and Whitney's U as a z-score, within
              each class, averaged over the classes. Far below 0: copying. Far above 0: unlike the data (underfit).

References:
    Meehan, Chaudhuri, Dasgupta 2020, "A non-parametric test to detect data-copying", arXiv:2004.05675 (C_T).
    Carlini et al. 2023, "Extracting training data from diffusion models", arXiv:2301.13188 (a ratio of distances).
"""

import math
from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError, require_at_least
from src.metrics.features import Extractor, ImageSet
from src.metrics.intervals import wilson_interval
from src.metrics.metric import HELD_OUT, ZERO, Finding, Inputs, Reading, SampleMetric, Space
from src.metrics.neighbours import nearest_distances

__all__ = ["CT", "Copying", "mann_whitney", "neighbour_ratio"]

_NUM_NEIGHBOURS = 50
_CLEAR = 4.0  # standard errors from the null: a chance of 1 in 30,000


def neighbour_ratio(distances: Tensor) -> Tensor:
    """d_1 / mean(d_2 ... d_k), `(N,)`, from ascending distances `(N, k)`; 0 where the nearest is at distance 0."""
    nearest, others = distances[:, 0], distances[:, 1:].mean(1)
    return torch.where(nearest == 0, torch.zeros_like(nearest), nearest / others)


def mann_whitney(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Share of pairs with x_i > y_j (ties count a half), and its z-score under the null that both are alike.

    Below one half, and negative, if x `(N,)` tends to be smaller than y `(M,)`. The variance is corrected for ties; the
    score is 0 if all values are equal.
    """
    n, m = len(x), len(y)
    both, inverse, ties = torch.cat([x, y]).double().unique(return_inverse=True, return_counts=True)
    last = ties.cumsum(0).double()
    rank = last - (ties.double() - 1) / 2  # the mean rank of equal values, from 1
    u = float(rank[inverse[:n]].sum()) - n * (n + 1) / 2
    total = n + m
    tied = float((ties.double().pow(3) - ties.double()).sum()) / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - tied)
    return u / (n * m), 0.0 if len(both) == 1 else (u - n * m / 2) / math.sqrt(variance)


class _ToTraining(SampleMetric):
    beside = (HELD_OUT,)
    judges_by_held_out = True

    def _distances(self, images: ImageSet, inputs: Inputs, extractor: Extractor, count: int) -> Tensor:
        """Distances `(N, k)` of the first `count` images to their nearest training images."""
        reference = inputs.reference
        most = self._count(images, inputs, extractor)
        k = min(_NUM_NEIGHBOURS, inputs.features(reference, extractor).count)
        if k < 3:
            raise NotApplicable(f"{k} training images are too few to have neighbours")

        def make() -> dict[str, Tensor]:
            x, y = (inputs.features(some, extractor).features for some in (images, reference))
            return {"distances": nearest_distances(x[:most].to(inputs.device), y.to(inputs.device), k).cpu()}

        settings = {"reference": reference.identity or id(reference), "k": k, "count": most}
        return inputs.store.get("nearest", images, extractor, settings, make)["distances"][:count]

    def _count(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> int:
        """As many images as there are held-out ones to compare with."""
        return min(inputs.features(some, extractor).count for some in (images, inputs.need_held_out()))

    def _classes(self, images: ImageSet, inputs: Inputs, count: int) -> Tensor:
        """The class `(N,)` that the domain classifier reads; all 0 where there is none."""
        try:
            return inputs.features(images, inputs.classifier()).classes[:count]
        except NotApplicable:
            return torch.zeros(count, dtype=torch.int64)


class Copying(_ToTraining):
    """Share of the samples that are suspiciously near to one training image.

    The null is the share among held-out images, weighted to the samples' classes where there is a classifier: some classes
    have closer neighbours than others, and drawing them more often is no copying.

    Args:
        space: where distances are measured: features see through small shifts, pixels through noise.
        quantile: the share of held-out images that count as suspicious, by which the threshold is set.
    """

    better = None  # fewer than among held-out images is no better

    def __init__(self, space: Space, quantile: float) -> None:
        super().__init__(space)
        if not 0 < quantile < 0.5:
            raise UserError(
                f"quantile={quantile} must be between 0 and 0.5 (metric.copying.quantile, or of copying_pixels)"
            )
        self._quantile = quantile

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        held_out = inputs.need_held_out()
        count = self._count(images, inputs, extractor)
        if count < 1 / self._quantile:
            raise NotApplicable(f"{count} held-out images are too few for their {self._quantile:g} quantile")
        ratio, honest = (
            neighbour_ratio(self._distances(some, inputs, extractor, count).double()) for some in (images, held_out)
        )
        threshold = torch.quantile(honest, self._quantile)
        hits = int((ratio <= threshold).sum())
        classes, honest_classes = (self._classes(some, inputs, count) for some in (images, held_out))
        null = _reweighted((honest <= threshold).double(), honest_classes, classes)
        return Reading(hits / count, count, wilson_interval(hits, count), {"null": null})

    def protocol(self) -> dict[str, Any]:
        return {"neighbours": _NUM_NEIGHBOURS, "threshold": f"{self._quantile:g} quantile of held-out images"}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        share, expected, n = reading.value, reading.parts["null"], reading.count
        # the threshold is itself an estimate from n held-out images
        least = max(expected, 1 / n)
        standard_error = math.sqrt(share * (1 - share) / n + least * (1 - least) / n)
        is_copying = share > 2 * max(expected, self._quantile) and share - expected > _CLEAR * standard_error
        words = f"copying {_percent(share)} in {self._space.in_words} (null {_percent(expected)})"
        return Finding(words, "copying" if is_copying else None)


class CT(_ToTraining):
    """C_T with classes as cells, weighted by the classes of the held-out images.

    Samples that are a little nearer to the training images than unseen real ones need not be copies: smooth images are, and
    where training and test set are not quite alike, even further real images are. So the alarm needs a large effect besides
    a clear score; a few copies among many samples are for `Copying` to find.

    Args:
        space: where distances are measured; the domain classifier gives the cells.
        min_cell: a class with fewer samples, or fewer held-out images, is left out.
        copying_effect: how far the probability that a sample is farther than a held-out image must be below one half.
        underfit_effect: how far it must be above one half.
    """

    unit = "z"
    better = ZERO

    def __init__(self, space: Space, min_cell: int, copying_effect: float, underfit_effect: float) -> None:
        super().__init__(space)
        require_at_least("metric.c_t.min_cell", min_cell, 2)
        require_at_least("metric.c_t.copying_effect", copying_effect, 0)
        require_at_least("metric.c_t.underfit_effect", underfit_effect, 0)
        self._min_cell = min_cell
        self._copying_effect = copying_effect
        self._underfit_effect = underfit_effect

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        held_out = inputs.need_held_out()
        count = self._count(images, inputs, extractor)
        near, honest = (self._distances(some, inputs, extractor, count)[:, 0] for some in (images, held_out))
        classes, honest_classes = (self._classes(some, inputs, count) for some in (images, held_out))
        scores, weights, effects = [], [], []
        for cell in honest_classes.unique():
            x, y = near[classes == cell], honest[honest_classes == cell]
            if min(len(x), len(y)) >= self._min_cell:
                share, z = mann_whitney(x, y)
                scores.append(z)
                weights.append(float(len(y)))
                effects.append(share - 0.5)
        if not scores:
            raise NotApplicable(f"no class has {self._min_cell} samples and {self._min_cell} held-out images")
        weight = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        parts = {
            "null_standard_deviation": float(weight.square().sum().sqrt()),  # of a weighted mean of independent N(0, 1)
            "effect": float((weight * torch.tensor(effects, dtype=torch.float64)).sum()),
            "num_cells": float(len(scores)),
        }
        return Reading(float((weight * torch.tensor(scores, dtype=torch.float64)).sum()), count, parts=parts)

    def protocol(self) -> dict[str, Any]:
        return {"cells": "classes read", "min_cell": self._min_cell}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        effect = reading.parts["effect"]
        is_clear = abs(reading.value) > _CLEAR * reading.parts["null_standard_deviation"]
        score = f"(C_T {reading.value:+.1f}" + (f", null {null.value:+.1f})" if null else ")")
        if is_clear and effect < -self._copying_effect:
            return Finding(f"much nearer to training images than unseen real ones {score}", "copying")
        if is_clear and effect > self._underfit_effect:
            return Finding(f"farther from training images than unseen real ones {score}", "underfit")
        return Finding(f"about as near to training images as unseen real ones {score}", None)


def _reweighted(values: Tensor, classes: Tensor, target_classes: Tensor) -> float:
    """Mean of `values` `(N,)` if their classes were as frequent as in `target_classes`; unseen ones are passed over."""
    num_classes = int(max(classes.max(), target_classes.max())) + 1
    seen = classes.bincount(minlength=num_classes).double()
    totals = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, classes, values)
    weight = torch.where(seen > 0, target_classes.bincount(minlength=num_classes).double(), torch.zeros_like(seen))
    if not weight.sum():
        return float(values.mean())
    return float((weight * totals / seen.clamp(min=1)).sum() / weight.sum())


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"
