"""Log likelihoods and bounds on the test set. A bound and an exact value are different metrics, never one column."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.protocols import CanBound, CanScore, Trainable
from src.core.rng import SampleNoise
from src.core.spec import DISCRETE
from src.metrics.metric import Inputs, Measurement, Metric, require

__all__ = ["Bound", "BoundBitsPerDim", "LogLikelihood", "TestLoss"]


class LogLikelihood(Metric):
    """Mean exact log likelihood of a test example, in nats; larger is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanScore)
        return _mean(inputs, lambda batch, _: inputs.model.log_prob(batch.x, batch.condition), "nats")


class Bound(Metric):
    """Mean lower bound of the log likelihood of a test example (for a VAE the ELBO), in nats; larger is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanBound)
        return _mean(inputs, _bound(inputs), "nats")


class BoundBitsPerDim(Metric):
    """The bound as bits per dimension of discrete data, -bound / (D ln 2); smaller is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanBound)
        if inputs.spec.values.kind != DISCRETE:
            kind = inputs.spec.values.describe()
            raise NotApplicable(f"bits per dimension are of discrete values; data={inputs.spec.name} gives {kind}")
        scale = -1 / (inputs.spec.num_dims * math.log(2))
        bound = _bound(inputs)
        return _mean(inputs, lambda batch, noise: scale * bound(batch, noise), "bits/dim")


class TestLoss(Metric):
    """The training objective on the test set, as the model defines it: no likelihood unless it happens to be one."""

    __test__ = False  # pytest: this is no test case

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, Trainable)
        return _mean(inputs, lambda batch, noise: inputs.model.loss(batch, generator=noise)["loss"], "objective")


def _bound(inputs: Inputs) -> Callable[[Batch, SampleNoise], Tensor]:
    return lambda batch, noise: inputs.model.log_prob_bound(batch.x, batch.condition, generator=noise)


def _mean(inputs: Inputs, of: Callable[[Batch, SampleNoise], Tensor], unit: str) -> Measurement:
    """Mean of a per-example quantity over the test split, with its 95 % interval from the standard error."""
    values, start = [], 0
    with torch.no_grad():
        for batch in inputs.test_batches():
            values.append(of(batch, SampleNoise(inputs.seed, start)).cpu().double())
            start += len(batch)
    joined = torch.cat(values)
    num_bad = int((~joined.isfinite()).sum())
    if num_bad:
        raise NotApplicable(f"{num_bad} of {len(joined)} test examples have no finite value")
    mean = float(joined.mean())
    margin = 1.96 * float(joined.std()) / math.sqrt(len(joined)) if len(joined) > 1 else math.nan
    card = {"split": "test", "num_examples": len(joined), "values": inputs.spec.values.kind}
    interval = (mean - margin, mean + margin) if math.isfinite(margin) else None
    return Measurement(mean, unit, card, interval=interval)
