"""The contract between metrics and evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.density import Density
from src.core.errors import NotApplicable
from src.core.rng import derive_seed
from src.core.spec import DataSpec
from src.core.stack import Stack
from src.metrics.features import Extractor, Features, ImageSet
from src.metrics.store import Store
from src.metrics.text import Text

__all__ = [
    "GRIFFIN_LIM",
    "HELD_OUT",
    "HIGHER",
    "LOWER",
    "MU_LAW",
    "NOISE",
    "QUANTISATION",
    "STANDARDIZED",
    "UNTRAINED",
    "ZERO",
    "Curve",
    "Finding",
    "Inputs",
    "Measurement",
    "Metric",
    "Reading",
    "SampleMetric",
    "Space",
    "require",
]

LOWER, HIGHER, ZERO = "lower", "higher", "zero"  # which values of a metric are better: ZERO is "near zero"
HELD_OUT, NOISE, UNTRAINED = "held_out", "noise", "untrained"  # the reference rows
MU_LAW, GRIFFIN_LIM = "mu_law", "griffin_lim"  # of sound: held-out clips after a round trip through a representation
QUANTISATION = "clamped and rounded to 0 .. 255"
_AS_HEARD = "waveforms of 16 bits"
STANDARDIZED = "each column less its mean, over its standard deviation, both of the training rows"  # units of a table


@dataclass(frozen=True)
class Finding:
    """What a value means, in words.

    Args:
        words: a few words, as "8 of 10 modes".
        alarm: what is wrong, in one word, or None: "modes", "support", "copying" or "underfit".
    """

    words: str
    alarm: str | None


@dataclass(frozen=True)
class Reading:
    """A quantity of one set of images.

    Args:
        value: the number.
        count: how many images it was measured on.
        interval: lower and upper end of a 95 % interval, if one is known.
        parts: what the value is made of, by name.
    """

    value: float
    count: int
    interval: tuple[float, float] | None = None
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A quantity at several places, of the model and of reference rows, for a picture.

    Args:
        places: in their order, in words.
        of: what the places are.
        rows: a value at each place, by name of the row; "" is the model.
    """

    places: tuple[str, ...]
    of: str
    rows: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Measurement:
    """One value and what it means.

    Args:
        value: the number.
        unit: its unit, e.g. "nats" or "1".
        card: the protocol: two values are comparable only if their cards agree.
        better: `LOWER`, `HIGHER`, `ZERO`, or None where none is better.
        interval: lower and upper end of a 95 % interval, if one is known.
        parts: what the value is made of, by name.
        anchors: the same quantity of reference rows, by name, or the reason why it has no value.
        finding: what the value means, if it is more than a number.
        curve: what there is to be drawn of it, if anything.
    """

    value: float
    unit: str
    card: dict[str, Any]
    better: str | None = None
    interval: tuple[float, float] | None = None
    parts: dict[str, float] = field(default_factory=dict)
    anchors: dict[str, Reading | NotApplicable] = field(default_factory=dict)
    finding: Finding | None = None
    curve: Curve | None = None


@dataclass(frozen=True)
class Inputs:
    """Everything a metric may ask for.

    Args:
        model: in evaluation mode, with the weights that are measured.
        model_name: its name in messages, as in `model=NAME`.
        device: where the model lies.
        spec: the data.
        test_batches: the test split in data units on the model's device, from the start at every call.
        seed: seed of everything drawn.
        generated: the model's samples, or the reason why there are none.
        reference: the training examples.
        anchors: sets of examples measured beside the samples, by name.
        classifier: gives the domain classifier, or raises `NotApplicable`.
        store: what was computed before.
        unseen: further real images that were held out, for metrics that already judge by the held-out ones; None if there
            are none.
        density: what the data were drawn from, if it is known.
        stack: how the data are made of smaller images, if they are.
        num_likelihood_examples: so many test examples, evenly spread, have their likelihood computed; None for all.
        kept: what one metric has computed for another.
        text: what the data are windows of, if they are text.
        clips: of sound, the test examples as they were recorded, `(N, T)` int16, in the order of `test_batches`.
    """

    model: nn.Module
    model_name: str
    device: torch.device
    spec: DataSpec
    test_batches: Callable[[], Iterable[Batch]]
    seed: int
    generated: ImageSet | NotApplicable
    reference: ImageSet
    anchors: dict[str, ImageSet]
    classifier: Callable[[], Extractor]
    store: Store
    unseen: ImageSet | None = None
    density: Density | None = None
    stack: Stack | None = None
    num_likelihood_examples: int | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    text: Text | None = None
    clips: np.ndarray | None = None

    def need_generated(self) -> ImageSet:
        if isinstance(self.generated, NotApplicable):
            raise self.generated
        return self.generated

    def need_images(self) -> None:
        if self.spec.sound is not None:
            raise NotApplicable(f"it is of images; data={self.spec.name} gives sound")
        if self.spec.modality != "image":
            raise NotApplicable(f"it is of images; data={self.spec.name} gives {self.spec.modality}")

    def need_text(self) -> Text:
        if self.text is None:
            kind = "tokens that are no text" if self.spec.modality == "tokens" else self.spec.modality
            raise NotApplicable(f"it is of text; data={self.spec.name} gives {kind}")
        return self.text

    @property
    def quantisation(self) -> str:
        """What becomes of examples before they are measured, for cards."""
        if self.spec.sound is not None:
            return _AS_HEARD
        return QUANTISATION if self.spec.modality == "image" else "none"

    @property
    def values_as_judged(self) -> dict[str, Any]:
        """What cards of samples and of reconstructions say of the data's values, if that is not what a model sees of them.

        Sounds are compared as they are heard, so that models of waveforms, of mu-law and of log-mels stand in one table.
        """
        return {} if self.spec.sound is None else {"data_values": _AS_HEARD}

    def need_held_out(self) -> ImageSet:
        if HELD_OUT not in self.anchors:
            raise NotApplicable("there are no held-out images to compare with")
        return self.anchors[HELD_OUT]

    def features(self, images: ImageSet, extractor: Extractor) -> Features:
        """What an extractor says of all images, computed once."""
        return replace(self.store.features(images, extractor), stack=extractor.stack)

    def reference_part(self, extractor: Extractor, count: int) -> Tensor:
        """Features `(count, D)` of a random part of the training images, always the same; all of them if they are fewer."""
        features = self.features(self.reference, extractor).features
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(derive_seed(0, 3)))
        return features[order[:count]]


class Metric(ABC):
    """A quantity of a trained model."""

    @abstractmethod
    def measure(self, inputs: Inputs) -> Measurement:
        """The value with its card; raises `NotApplicable` with the reason if there is none."""


class Space(ABC):
    """Where image sets are measured: gives an extractor for the data at hand."""

    in_words = "features"  # as in "near in features"
    takes_sound = False  # as clips of 16-bit integers, whatever models see of them

    @abstractmethod
    def extractor(self, inputs: Inputs) -> Extractor:
        """The extractor; raises `NotApplicable` if it cannot be had."""


class SampleMetric(Metric):
    """A quantity of a set of examples, so that real ones and noise can be measured beside the samples.

    Of images, unless its `extractor` says otherwise.

    Args:
        space: where it is measured.
    """

    unit = "1"
    better: str | None = LOWER
    beside: tuple[str, ...] = (HELD_OUT, NOISE, UNTRAINED, MU_LAW, GRIFFIN_LIM)  # the reference rows it is measured on
    judges_by_held_out = False  # True: its held-out row is of further held-out images, since these are its yardstick

    def __init__(self, space: Space) -> None:
        self._space = space

    def extractor(self, inputs: Inputs) -> Extractor:
        """The features it is measured on; raises `NotApplicable` if they cannot be had."""
        if inputs.spec.sound is None or not self._space.takes_sound:
            inputs.need_images()
        return self._space.extractor(inputs)

    @abstractmethod
    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        """The quantity of a set of images."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What else the value depends on, for its card."""

    def conditions(self, inputs: Inputs, reading: Reading) -> dict[str, Any]:
        """What the samples were compared with, and the protocol."""
        return {"num_reference": inputs.reference.count, "reference_split": "train", **self.protocol()}

    def finding(self, reading: Reading, null: Reading | None) -> Finding | None:
        """What the samples' value means beside that of held-out real images."""
        return None

    def measure(self, inputs: Inputs) -> Measurement:
        generated = inputs.need_generated()
        extractor = self.extractor(inputs)
        reading = self.of(generated, inputs, extractor)
        anchors: dict[str, Reading | NotApplicable] = {}
        rows = dict(inputs.anchors)
        if self.judges_by_held_out:
            rows.pop(HELD_OUT, None)
            rows |= {} if inputs.unseen is None else {HELD_OUT: inputs.unseen}
        for name in self.beside:
            if name in rows:
                try:
                    anchors[name] = self.of(rows[name], inputs, extractor)
                except NotApplicable as reason:
                    anchors[name] = reason
        null = anchors.get(HELD_OUT)
        card = {
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            **inputs.values_as_judged,
            "quantisation": inputs.quantisation,
            "seed": inputs.seed,
            "num_samples": reading.count,
            **self.conditions(inputs, reading),
        }
        if extractor.accuracy is not None:
            card["extractor_accuracy"] = extractor.accuracy
        return Measurement(
            reading.value,
            self.unit,
            card,
            self.better,
            reading.interval,
            reading.parts,
            anchors,
            self.finding(reading, null if isinstance(null, Reading) else None),
        )


def require(inputs: Inputs, capability: type) -> None:
    """Raise `NotApplicable` unless the model has a capability."""
    if not isinstance(inputs.model, capability):
        raise NotApplicable(f"{inputs.model_name} has no {capability.__name__}")
