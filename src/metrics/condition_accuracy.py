"""Is the class asked for the class drawn? By the domain classifier."""

from typing import Any

from src.core.errors import NotApplicable
from src.metrics.features import Extractor, ImageSet
from src.metrics.metric import Inputs, SampleMetric

__all__ = ["ConditionAccuracy"]


class ConditionAccuracy(SampleMetric):
    """Share of a conditional model's samples that the classifier puts into the class they were drawn as.

    The row of held-out real images is the classifier's own accuracy: the most that a model can be expected to reach.
    """

    def extractor(self, inputs: Inputs) -> Extractor:
        if not getattr(inputs.model, "is_conditional", False):
            raise NotApplicable(f"{inputs.model_name} draws no given class")
        return inputs.classifier()

    def of(self, images: ImageSet, reference: ImageSet, extractor: Extractor) -> float:
        features = images.features(extractor)
        assert features.labels is not None
        return float((features.logits.argmax(1) == features.labels).double().mean())

    def protocol(self) -> dict[str, Any]:
        return {}
