"""The contract between metrics and evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.spec import DataSpec
from src.metrics.features import Extractor, ImageSet

__all__ = ["Inputs", "Measurement", "Metric", "SampleMetric", "measure_anchors", "require"]


@dataclass(frozen=True)
class Measurement:
    """One value and what it means.

    Args:
        value: the number.
        unit: its unit, e.g. "nats" or "1".
        card: the protocol: two values are comparable only if their cards agree.
        interval: lower and upper end of a 95 % interval, if one is known.
        anchors: the same quantity of reference rows, by name: held-out real data, noise, the untrained model.
    """

    value: float
    unit: str
    card: dict[str, Any]
    interval: tuple[float, float] | None = None
    anchors: dict[str, float] = field(default_factory=dict)


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
        reference: the training images.
        anchors: image sets measured beside the samples, by name.
        classifier: gives the domain classifier, or raises `NotApplicable`.
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

    def need_generated(self) -> ImageSet:
        if isinstance(self.generated, NotApplicable):
            raise self.generated
        return self.generated


class Metric(ABC):
    """A quantity of a trained model."""

    @abstractmethod
    def measure(self, inputs: Inputs) -> Measurement:
        """The value with its card; raises `NotApplicable` with the reason if there is none."""


class SampleMetric(Metric):
    """A quantity of a set of images, so that real images and noise can be measured beside the samples."""

    unit = "1"

    @abstractmethod
    def extractor(self, inputs: Inputs) -> Extractor:
        """The features it is measured on; raises `NotApplicable` if they cannot be had."""

    @abstractmethod
    def of(self, images: ImageSet, reference: ImageSet, extractor: Extractor) -> float:
        """The quantity of `images`, against the `reference` if it compares."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What else the value depends on, for its card."""

    def measure(self, inputs: Inputs) -> Measurement:
        generated = inputs.need_generated()
        extractor = self.extractor(inputs)

        def counted(images: ImageSet) -> tuple[float, int]:
            return self.of(images, inputs.reference, extractor), images.features(extractor).count

        value, num_samples = counted(generated)
        anchors, about_anchors = measure_anchors(inputs, counted)
        card = {
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "num_samples": num_samples,
            "num_reference": inputs.reference.features(extractor).count,
            "reference_split": "train",
            **about_anchors,
            **self.protocol(),
        }
        return Measurement(value, self.unit, card, anchors=anchors)


def measure_anchors(
    inputs: Inputs, counted: Callable[[ImageSet], tuple[float, int]]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The values of the reference rows, and what a card says of them: how many images each had, or why it has no value.

    Args:
        counted: the quantity of a set of images, and their number.
    """
    values: dict[str, float] = {}
    about: dict[str, Any] = {}
    for name, images in inputs.anchors.items():
        try:
            values[name], about[name] = counted(images)
        except NotApplicable as reason:
            about[name] = str(reason)
    return values, {"anchors": about}


def require(inputs: Inputs, capability: type) -> None:
    """Raise `NotApplicable` unless the model has a capability."""
    if not isinstance(inputs.model, capability):
        raise NotApplicable(f"{inputs.model_name} has no {capability.__name__}")
