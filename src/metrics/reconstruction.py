"""How well a model rebuilds test examples from its own code."""

import torch

from src.core.protocols import CanReconstruct
from src.metrics.metric import Inputs, Measurement, Metric, require

__all__ = ["ReconstructionError"]


class ReconstructionError(Metric):
    """Mean squared error of one value of a test example, in squared data units (images span 2 units)."""

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanReconstruct)
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in inputs.test_batches():
                rebuilt = inputs.model.reconstruct(batch.x, batch.condition)
                total += float((rebuilt - batch.x).double().square().sum())
                count += len(batch)
        value = total / (count * inputs.spec.num_dims)
        card = {"split": "test", "num_examples": count, "values": inputs.spec.values.kind}
        return Measurement(value, "data units^2", card)
