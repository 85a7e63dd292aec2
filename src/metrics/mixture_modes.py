"""Mode collapse on data whose mixture is known: components covered, samples of high quality, evenness among components.

The definitions are PacGAN's, from its code (`pacgan/extensions.py`, MetricLogger): a sample is of high quality if it lies
within three sigma, in Euclidean distance, of its nearest mean; it then counts for that component. Samples between the modes
count for none, neither in the modes covered nor in the histogram whose divergence is taken. The divergence of the histogram
of all samples by their nearest mean, of high quality or not, stands beside as the part `of_all_samples`.

Others measure otherwise: within three sigma in each coordinate (a box, ceiling 99.46 %), or on a ring of radius 2.

References:
    Srivastava et al. 2017 (VEEGAN), arXiv:1705.07761; Lin et al. 2018 (PacGAN), arXiv:1712.04086, section 4.1.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.mixture import IsotropicMixture
from src.metrics.features import Extractor, ImageSet
from src.metrics.intervals import wilson_interval
from src.metrics.metric import HIGHER, Finding, Inputs, Reading, SampleMetric, Space
from src.metrics.modes import RARE, chi_square_quantile

__all__ = ["ComponentsCovered", "HighQuality", "ReverseKL", "kl_floor", "kl_to_weights", "quality_ceiling"]

_NUM_SIGMA = 3.0
_MEANING = f"within {_NUM_SIGMA:g} sigma (Euclidean) of the nearest mean"


def quality_ceiling(dim: int) -> float:
    """P(|z| < 3) of z ~ N(0, I) in D dimensions, which no sampler of the mixture exceeds; 1 - exp(-9/2) in two.

    |z|^2 is chi-square with D degrees of freedom. It is exact where components do not overlap.
    """
    half = torch.tensor([dim / 2, _NUM_SIGMA**2 / 2], dtype=torch.float64)
    return float(torch.special.gammainc(half[0], half[1]))


def kl_to_weights(counts: Tensor, weights: Tensor) -> Tensor:
    """KL(p || w) in nats, `()` float64, of a histogram `(K,)` from known positive weights `(K,)`."""
    p = counts.double() / counts.sum()
    return torch.special.xlogy(p, p / weights.double()).sum().clamp(min=0)


def kl_floor(num_components: int, num_samples: int) -> float:
    """(K - 1) / 2N nats: what N draws from the weights themselves have on average, to first order in 1/N."""
    return (num_components - 1) / (2 * num_samples)


class _Distances(Space):
    """The distances to the means, as logits: minus as many sigmas, so that the likeliest class is the nearest component."""

    def extractor(self, inputs: Inputs) -> Extractor:
        return _DistanceExtractor(inputs.need_mixture())


class _DistanceExtractor(Extractor):
    is_worth_keeping = False

    def __init__(self, mixture: IsotropicMixture) -> None:
        self.name = f"distances to {mixture.num_components} means"
        parts = (mixture.means, mixture.weights, torch.tensor(mixture.sigma, dtype=torch.float64))
        self.sha256 = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        self._mixture = mixture

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.cpu()
        return x, -self._mixture.distances(x).float()


class _OfMixture(SampleMetric):
    def __init__(self) -> None:
        super().__init__(_Distances())

    def extractor(self, inputs: Inputs) -> Extractor:
        return self._space.extractor(inputs)

    def protocol(self) -> dict[str, Any]:
        return {"high_quality": _MEANING}

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        mixture = inputs.need_mixture()
        about = {"num_components": mixture.num_components, "sigma": mixture.sigma}
        return {"reference": "the mixture itself", **about, **self.protocol()}

    def _counts(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> tuple[Tensor, Tensor]:
        """Samples of high quality, and all samples, by their nearest component, each `(K,)` int64."""
        features = inputs.features(images, extractor)
        is_good = features.logits.amax(1) > -_NUM_SIGMA
        num_components = features.logits.shape[1]
        good, everyone = (some.bincount(minlength=num_components) for some in (features.classes[is_good], features.classes))
        return good, everyone


class ComponentsCovered(_OfMixture):
    """Number of components with at least one sample of high quality.

    It raises an alarm if a component has none though a perfect sampler would have reached it in as many draws.
    """

    unit = "modes"
    better = HIGHER

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        good, everyone = self._counts(images, inputs, extractor)
        mixture = inputs.need_mixture()
        num_samples = int(everyone.sum())
        ceiling = quality_ceiling(inputs.spec.num_dims)
        chance = (1 - ceiling * mixture.weights) ** num_samples  # of a perfect sampler to have none
        is_missing = (good == 0) & (chance < RARE / mixture.num_components)
        parts = {"of": float(mixture.num_components)}
        names = inputs.spec.class_names
        parts |= {f"missing_{names[k] if names else k}": float(mixture.weights[k]) for k in is_missing.nonzero().flatten()}
        return Reading(float((good > 0).sum()), num_samples, parts=parts)

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        missing = [name.removeprefix("missing_") for name in reading.parts if name.startswith("missing_")]
        which = f" (missing: {', '.join(missing)})" if missing and reading.value else ""
        if not missing and reading.value < reading.parts["of"]:
            which = f" (in {reading.count:,} samples, too few to call a mode missing)"
        words = f"{reading.value:.0f} of {reading.parts['of']:.0f} modes{which}"
        return Finding(words, "modes" if missing else None)


class HighQuality(_OfMixture):
    """Share of the samples that are of high quality. Even a perfect sampler has no more than `quality_ceiling`.

    Args:
        alarm_below: a share below it, and not for want of samples (its 95 % interval ends below it), raises the alarm.
    """

    better = HIGHER

    def __init__(self, alarm_below: float) -> None:
        super().__init__()
        if not 0 <= alarm_below <= 1:
            raise UserError(f"metric.high_quality.alarm_below={alarm_below} must be between 0 and 1")
        self._alarm_below = alarm_below

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        good, everyone = self._counts(images, inputs, extractor)
        num_good, num_samples = int(good.sum()), int(everyone.sum())
        ceiling = {"ceiling": quality_ceiling(inputs.spec.num_dims)}
        return Reading(num_good / num_samples, num_samples, wilson_interval(num_good, num_samples), ceiling)

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        return super().conditions(inputs, reading) | {"ceiling": reading.parts["ceiling"]}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        words = f"{reading.value:.2%} of high quality (ceiling {reading.parts['ceiling']:.2%})"
        is_low = reading.interval is not None and reading.interval[1] < self._alarm_below
        return Finding(words, "underfit" if is_low else None)


class ReverseKL(_OfMixture):
    """KL divergence of the histogram of high-quality samples over the components from the true weights, in nats.

    Args:
        alarm_above: a divergence above it, and too large to be the luck of the draw (2 N KL is about chi-square with K - 1
            degrees of freedom), raises the alarm.
    """

    unit = "nats"

    def __init__(self, alarm_above: float) -> None:
        super().__init__()
        require_at_least("metric.reverse_kl.alarm_above", alarm_above, 0)
        self._alarm_above = alarm_above

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        good, everyone = self._counts(images, inputs, extractor)
        weights = inputs.need_mixture().weights
        num_good = int(good.sum())
        if not num_good:
            raise NotApplicable(f"none of {int(everyone.sum()):,} samples is {_MEANING}")
        largest = -math.log(float(weights.min()))  # of any histogram; the floor is of no use where it would be above
        parts = {
            "floor": min(kl_floor(len(weights), num_good), largest),
            "at_most_by_luck": chi_square_quantile(max(1, len(weights) - 1)) / (2 * num_good),
            "of_all_samples": float(kl_to_weights(everyone, weights)),
        }
        return Reading(float(kl_to_weights(good, weights)), num_good, parts=parts)

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {"histogram": "samples of high quality by their nearest mean"}

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        return super().conditions(inputs, reading) | {"floor": reading.parts["floor"]}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        words = f"histogram of modes off by {reading.value:.2g} nats (floor {reading.parts['floor']:.2g})"
        is_off = reading.value > max(self._alarm_above, reading.parts["at_most_by_luck"])
        return Finding(words, "modes" if is_off else None)
