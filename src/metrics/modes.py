"""Mode collapse over classes: which classes the samples reach, and how far their histogram is from that of the data.

Classes are those that the domain classifier reads, on samples and training images alike, so that its own errors fall on
both sides; what they cost is seen at the held-out images beside.

References:
    Srivastava et al. 2017 (VEEGAN), arXiv:1705.07761; Lin et al. 2018 (PacGAN), arXiv:1712.04086: both quantities.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError, require_at_least
from src.metrics.features import Extractor, ImageSet
from src.metrics.metric import HELD_OUT, HIGHER, NOISE, Finding, Inputs, Reading, SampleMetric, Space

__all__ = [
    "RARE", "ClassKL", "ModesCovered", "chi_square_quantile", "covered_finding", "histogram_kl", "missing_parts",
    "poisson_cdf",
]  # fmt: skip

RARE = 1e-4  # the chance of a false alarm
_MISSING = "missing_"  # what the name of a part begins with
_NUM_NAMED = 10  # of the modes that are missing, in a sentence


def histogram_kl(counts: Tensor, reference_counts: Tensor) -> Tensor:
    """KL(p || q) in nats, `()`, of histograms `(K,)`; half a count is added to every class of q, so that none is empty."""
    p = counts.double() / counts.sum()
    smoothed = reference_counts.double() + 0.5
    q = smoothed / smoothed.sum()
    return torch.special.xlogy(p, p / q).sum().clamp(min=0)


def poisson_cdf(counts: Tensor, means: Tensor) -> Tensor:
    """P(X <= count) of Poisson variables, `(K,)` float64, from counts and means `(K,)`."""
    return torch.special.gammaincc(counts.double() + 1, means.double())


def missing_parts(is_missing: Tensor, values: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The modes that are missing `(K,)`, each with a value `(K,)` of its own, as parts of a reading."""
    return {f"{_MISSING}{names[k]}": float(values[k]) for k in is_missing.nonzero().flatten().tolist()}


def covered_finding(reading: Reading, mode: str) -> Finding:
    """What a number of modes means, with the part `of` that says how many there are, and those of `missing_parts`.

    It is an alarm if any is missing. A mode that was not reached in too few samples is not called missing; the part
    `expected`, if there is one, says how many modes are to be reached in as many.

    Args:
        mode: what to call one.
    """
    missing = [name.removeprefix(_MISSING) for name in reading.parts if name.startswith(_MISSING)]
    which = ""
    if missing and reading.value:
        more = f" and {len(missing) - _NUM_NAMED:,} more" if len(missing) > _NUM_NAMED else ""
        which = f" (missing: {', '.join(missing[:_NUM_NAMED])}{more})"
    elif not missing and reading.value < reading.parts["of"]:
        expected = reading.parts.get("expected")
        perfect = "" if expected is None else f"; a perfect sampler reaches about {expected:,.0f}"
        which = f" (in {reading.count:,} samples, too few to call a {mode} missing{perfect})"
    return Finding(f"{reading.value:.0f} of {reading.parts['of']:.0f} modes{which}", "modes" if missing else None)


class _Histogram(SampleMetric):
    beside = (HELD_OUT, NOISE)

    def _counts(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> tuple[Tensor, Tensor]:
        """Class counts `(K,)` of the images and of the training images."""
        features, reference = (inputs.features(some, extractor) for some in (images, inputs.reference))
        num_classes = features.num_classes
        if not num_classes:
            raise NotApplicable(f"{extractor.name} knows no classes")
        counts, reference_counts = (some.classes.bincount(minlength=num_classes) for some in (features, reference))
        return counts, reference_counts


class ModesCovered(_Histogram):
    """Number of classes that the samples reach.

    Args:
        space: gives the classifier.
        min_share: a class is reached if its share among the samples is at least so many times its share among the
            training images. (One misread sample does not make a mode.)
    """

    unit = "classes"
    better = HIGHER

    def __init__(self, space: Space, min_share: float) -> None:
        super().__init__(space)
        if not 0 < min_share < 1:
            raise UserError(f"metric.modes.min_share={min_share} must be between 0 and 1")
        self._min_share = min_share

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        counts, reference = self._counts(images, inputs, extractor)
        is_mode = reference > 0
        share, reference_share = (c.double() / c.sum() for c in (counts, reference))
        is_reached = is_mode & (share >= self._min_share * reference_share)
        # by chance: so few draws, or fewer, of a class that has its share of the training images
        chance = poisson_cdf(counts, reference_share * counts.sum())
        is_missing = is_mode & ~is_reached & (chance < RARE / len(counts))
        parts = {"of": float(is_mode.sum())} | missing_parts(is_missing, share, inputs.spec.class_names)
        return Reading(float(is_reached.sum()), int(counts.sum()), parts=parts)

    def protocol(self) -> dict[str, Any]:
        return {"min_share": self._min_share}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        return covered_finding(reading, "class")


class ClassKL(_Histogram):
    """KL divergence of the samples' class histogram from that of the training images, in nats.

    Args:
        space: gives the classifier.
        alarm_above: a divergence above it, above three times that of held-out images, and too large to be the luck of the
            draw (2 N KL is about chi-square with K - 1 degrees of freedom), raises the alarm.
    """

    unit = "nats"

    def __init__(self, space: Space, alarm_above: float) -> None:
        super().__init__(space)
        require_at_least("metric.class_kl.alarm_above", alarm_above, 0)
        self._alarm_above = alarm_above

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        counts, reference = self._counts(images, inputs, extractor)
        num_samples, num_classes = int(counts.sum()), int((reference > 0).sum())
        by_luck = chi_square_quantile(max(1, num_classes - 1)) / (2 * num_samples)
        return Reading(float(histogram_kl(counts, reference)), num_samples, parts={"at_most_by_luck": by_luck})

    def protocol(self) -> dict[str, Any]:
        return {"histogram": "classes read, half a count added to the reference"}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        beside = f" (null {null.value:.2g})" if null else ""
        least = max(self._alarm_above, 3 * null.value if null else 0, reading.parts["at_most_by_luck"])
        is_off = reading.value > least
        return Finding(f"class histogram off by {reading.value:.2g} nats{beside}", "modes" if is_off else None)


@cache
def chi_square_quantile(degrees_of_freedom: float) -> float:
    """What a chi-square variable exceeds with the chance `RARE`."""
    from scipy.stats import chi2  # slow to import

    return float(chi2.isf(RARE, degrees_of_freedom))
