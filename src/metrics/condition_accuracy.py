"""Is the class asked for the class drawn? By the domain classifier."""

from typing import Any

from src.core.errors import NotApplicable
from src.metrics.features import Extractor, ImageSet
from src.metrics.intervals import wilson_interval
from src.metrics.metric import HIGHER, Inputs, Reading, SampleMetric

__all__ = ["ConditionAccuracy"]


class ConditionAccuracy(SampleMetric):
    """Share of a conditional model's samples that the classifier puts into the class they were drawn as.

    The row of held-out real images is the classifier's own accuracy: the most that a model can be expected to reach.
    """

    better = HIGHER

    def extractor(self, inputs: Inputs) -> Extractor:
        if not getattr(inputs.model, "is_conditional", False):
            raise NotApplicable(f"{inputs.model_name} draws no given class")
        return super().extractor(inputs)

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        features = inputs.features(images, extractor)
        assert features.labels is not None
        right = int((features.classes == features.labels).sum())
        return Reading(right / features.count, features.count, wilson_interval(right, features.count))

    def protocol(self) -> dict[str, Any]:
        return {}
