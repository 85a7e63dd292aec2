"""How often a classifier is right."""

import torch

from src.core.errors import NotApplicable
from src.core.protocols import CanClassify
from src.metrics.intervals import wilson_interval
from src.metrics.metric import HIGHER, Inputs, Measurement, Metric, require

__all__ = ["Accuracy"]


class Accuracy(Metric):
    """Share of the test examples that the classifier puts into their class."""

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanClassify)
        right = count = 0
        with torch.no_grad():
            for batch in inputs.test_batches():
                if batch.condition is None:
                    raise NotApplicable(f"data={inputs.spec.name} has no labels")
                right += int((inputs.model.classify(batch.x).argmax(1) == batch.condition).sum())
                count += len(batch)
        card = {"split": "test", "num_examples": count}
        return Measurement(right / count, "1", card, HIGHER, wilson_interval(right, count))
