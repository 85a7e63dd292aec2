"""Mode collapse on data whose modes are known: modes covered, samples of high quality, evenness among the modes.

The definitions are PacGAN's, from its code. Of a mixture (`pacgan/extensions.py`, MetricLogger) the modes are the
components: a sample is of high quality if it lies within three sigma, in Euclidean distance, of its nearest mean; it then
counts for that component. Samples between the modes count for none, neither in the modes covered nor in the histogram whose
divergence is taken. The divergence of the histogram of all samples by their nearest mean, of high quality or not, stands
beside as the part `of_all_samples`.

Of stacks of images (`stacked_MNIST_experiments/VEEGAN_experiment/evaluate.py`) the modes are the combinations of classes,
taken to be equally likely: every sample counts for the one that the classifier reads in it, however unsure.

Others measure otherwise: within three sigma in each coordinate (a box, ceiling 99.46 %), on a ring of radius 2, with
another classifier, or with the logarithm to the base ten. A number of samples belongs to every value: real stacks of MNIST
have 0.024 nats in 26,000 samples, and 0.056 in 10,000.

References:
    Srivastava et al. 2017 (VEEGAN), arXiv:1705.07761; Lin et al. 2018 (PacGAN), arXiv:1712.04086, sections 4.1 and 4.2.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.mixture import IsotropicMixture
from src.core.stack import Stack
from src.metrics.features import Extractor, Features, ImageSet
from src.metrics.intervals import wilson_interval
from src.metrics.metric import HIGHER, Finding, Inputs, Reading, SampleMetric, Space
from src.metrics.modes import RARE, chi_square_quantile, covered_finding, missing_parts

__all__ = ["ComponentsCovered", "HighQuality", "ReverseKL", "kl_by_luck", "kl_floor", "kl_to_weights", "quality_ceiling"]

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


def kl_by_luck(weights: Tensor, num_samples: int) -> float:
    """What the divergence of N draws from the weights `(K,)` themselves exceeds with the chance `RARE`, in nats.

    2 N KL is about chi-square with K - 1 degrees of freedom if every mode is drawn often. If modes are drawn a few times
    each, its mean and its variance are others; so it is taken as a multiple of a chi-square variable that has them. They
    are those of the sum of x ln(x / N w) over Poisson counts x whose sum is N, which takes away one degree of freedom.
    """
    num_modes = len(weights)
    if num_modes == 1:
        return 0.0
    mean, times = (num_samples * weights.double()).unique(return_counts=True)
    most = float(mean.max())
    x = torch.arange(int(most + 12 * math.sqrt(most) + 20), dtype=torch.float64)
    p = (torch.special.xlogy(x, mean[:, None]) - mean[:, None] - torch.lgamma(x + 1)).exp()
    term = torch.special.xlogy(x, x / mean[:, None])
    expected = (p * term).sum(1)
    square, product = (p * term.square()).sum(1) - expected.square(), (p * term * (x - mean[:, None])).sum(1)
    free = (num_modes - 1) / num_modes
    average = free * float((times * expected).sum())
    variance = free * float((times * square).sum() - (times * product).sum().square() / num_samples)
    return variance / (2 * average) * chi_square_quantile(2 * average**2 / variance) / num_samples


class KnownModes(ABC):
    """The modes of data where they are known, and how samples are counted for them.

    Args:
        weights: `(K,)` float64, how likely each mode is.
        ceiling: the largest share of samples that can count for a mode, on average.
        about: what it depends on, for a card.
    """

    def __init__(self, weights: Tensor, ceiling: float, about: dict[str, Any]) -> None:
        self.weights = weights
        self.ceiling = ceiling
        self.about = {**about, "num_components": len(weights)}

    @abstractmethod
    def extractor(self) -> Extractor:
        """What samples are seen through; raises `NotApplicable` if it cannot be had."""

    @abstractmethod
    def counts(self, features: Features) -> tuple[Tensor, Tensor]:
        """Samples that count for each mode, and all samples by the mode they are nearest to, each `(K,)` int64."""


def known_modes(inputs: Inputs) -> KnownModes:
    """The modes of the data at hand; raises `NotApplicable` if they are not known."""
    if isinstance(inputs.density, IsotropicMixture):
        return _Components(inputs.density)
    if inputs.stack is not None:
        return _StackedClasses(inputs.stack, inputs)
    raise NotApplicable(f"it is of a known isotropic mixture or of stacked images; data={inputs.spec.name} is neither")


class _Components(KnownModes):
    """The components of a mixture, by the distance to their means."""

    def __init__(self, mixture: IsotropicMixture) -> None:
        about = {"reference": "the mixture itself", "sigma": mixture.sigma, "high_quality": _MEANING}
        super().__init__(mixture.weights, quality_ceiling(mixture.means.shape[1]), about)
        self._mixture = mixture

    def extractor(self) -> Extractor:
        return _DistanceExtractor(self._mixture)

    def counts(self, features: Features) -> tuple[Tensor, Tensor]:
        is_good = features.logits.amax(1) > -_NUM_SIGMA
        nearest, num_modes = features.classes, len(self.weights)
        return nearest[is_good].bincount(minlength=num_modes), nearest.bincount(minlength=num_modes)


class _StackedClasses(KnownModes):
    """The combinations of the classes of stacked images, as the domain classifier reads them."""

    def __init__(self, stack: Stack, inputs: Inputs) -> None:
        num_modes = stack.num_joint_classes
        weights = torch.full((num_modes,), 1 / num_modes, dtype=torch.float64)
        about = {"reference": "all modes equally likely", "modes": f"classes read in {stack.num_images} channels"}
        super().__init__(weights, 1.0, about)
        self._inputs = inputs

    def extractor(self) -> Extractor:
        return self._inputs.classifier()

    def counts(self, features: Features) -> tuple[Tensor, Tensor]:
        if features.num_classes != len(self.weights):
            raise NotApplicable(f"the classifier knows {features.num_classes} classes, not the {len(self.weights)} modes")
        counts = features.classes.bincount(minlength=len(self.weights))
        return counts, counts


class _WhereModesAreKnown(Space):
    def extractor(self, inputs: Inputs) -> Extractor:
        return known_modes(inputs).extractor()


class _DistanceExtractor(Extractor):
    """The distances to the means, as logits: minus as many sigmas, so that the likeliest class is the nearest component."""

    is_worth_keeping = False

    def __init__(self, mixture: IsotropicMixture) -> None:
        self.name = f"distances to {mixture.num_components} means"
        parts = (mixture.means, mixture.weights, torch.tensor(mixture.sigma, dtype=torch.float64))
        self.sha256 = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        self._mixture = mixture

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.cpu()
        return x, -self._mixture.distances(x).float()


class _OfKnownModes(SampleMetric):
    def __init__(self) -> None:
        super().__init__(_WhereModesAreKnown())

    def extractor(self, inputs: Inputs) -> Extractor:
        return self._space.extractor(inputs)  # of images or of vectors

    def protocol(self) -> dict[str, Any]:
        return {}

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        return known_modes(inputs).about | self.protocol()

    def _counts(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> tuple[Tensor, Tensor]:
        return known_modes(inputs).counts(inputs.features(images, extractor))


class ComponentsCovered(_OfKnownModes):
    """Number of modes with at least one sample: of high quality, in a mixture; read as it, in stacked images.

    It raises an alarm if a mode has none though a perfect sampler would have reached it in as many draws. How many modes
    that one reaches on average stands in the parts as `expected`.
    """

    unit = "modes"
    better = HIGHER

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        good, everyone = self._counts(images, inputs, extractor)
        modes = known_modes(inputs)
        num_samples, num_modes = int(everyone.sum()), len(modes.weights)
        chance = (1 - modes.ceiling * modes.weights) ** num_samples  # of a perfect sampler to have none
        is_missing = (good == 0) & (chance < RARE / num_modes)
        names = inputs.spec.class_names or [str(k) for k in range(num_modes)]
        parts = {"of": float(num_modes), "expected": float((1 - chance).sum())}
        parts |= missing_parts(is_missing, modes.weights, names)
        return Reading(float((good > 0).sum()), num_samples, parts=parts)

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        return covered_finding(reading, "mode")


class HighQuality(_OfKnownModes):
    """Share of the samples of a mixture that are of high quality, for a perfect sampler no more than `quality_ceiling`.

    Args:
        alarm_below: a share below it, and not for want of samples (its 95 % interval ends below it), raises the alarm.
    """

    better = HIGHER

    def __init__(self, alarm_below: float) -> None:
        super().__init__()
        if not 0 <= alarm_below <= 1:
            raise UserError(f"metric.high_quality.alarm_below={alarm_below} must be between 0 and 1")
        self._alarm_below = alarm_below

    def extractor(self, inputs: Inputs) -> Extractor:
        modes = known_modes(inputs)
        if not isinstance(inputs.density, IsotropicMixture):
            raise NotApplicable(
                f"it is of distances to the means of a mixture; the modes of data={inputs.spec.name} are classes"
            )
        return modes.extractor()

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        good, everyone = self._counts(images, inputs, extractor)
        num_good, num_samples = int(good.sum()), int(everyone.sum())
        ceiling = {"ceiling": known_modes(inputs).ceiling}
        return Reading(num_good / num_samples, num_samples, wilson_interval(num_good, num_samples), ceiling)

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        return super().conditions(inputs, reading) | {"ceiling": reading.parts["ceiling"]}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        words = f"{reading.value:.2%} of high quality (ceiling {reading.parts['ceiling']:.2%})"
        is_low = reading.interval is not None and reading.interval[1] < self._alarm_below
        return Finding(words, "underfit" if is_low else None)


class ReverseKL(_OfKnownModes):
    """KL divergence of the histogram of the samples that count for a mode from the true weights, in nats.

    Args:
        alarm_above: a divergence more than so far above the floor, and too large to be the luck of the draw (`kl_by_luck`),
            raises the alarm.
    """

    unit = "nats"

    def __init__(self, alarm_above: float) -> None:
        super().__init__()
        require_at_least("metric.reverse_kl.alarm_above", alarm_above, 0)
        self._alarm_above = alarm_above

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        good, everyone = self._counts(images, inputs, extractor)
        weights = known_modes(inputs).weights
        num_good = int(good.sum())
        if not num_good:
            raise NotApplicable(f"none of {int(everyone.sum()):,} samples is {_MEANING}")
        largest = -math.log(float(weights.min()))  # of any histogram; the floor is of no use where it would be above
        parts = {
            "counted": float(num_good),
            "floor": min(kl_floor(len(weights), num_good), largest),
            "largest": largest,
            "at_most_by_luck": kl_by_luck(weights, num_good),
            "of_all_samples": float(kl_to_weights(everyone, weights)),
        }
        return Reading(float(kl_to_weights(good, weights)), int(everyone.sum()), parts=parts)

    def protocol(self) -> dict[str, Any]:
        return {"histogram": "samples by the mode they count for", "logarithm": "natural"}

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        return super().conditions(inputs, reading) | {"largest": reading.parts["largest"]}  # the floor is each model's own

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        floor, largest = reading.parts["floor"], reading.parts["largest"]
        words = f"histogram of modes off by {reading.value:.2g} nats (floor {floor:.2g}, at most {largest:.2g})"
        is_off = reading.value > max(floor + self._alarm_above, reading.parts["at_most_by_luck"])
        return Finding(words, "modes" if is_off else None)
