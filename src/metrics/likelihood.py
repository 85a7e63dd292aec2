"""Log likelihoods and bounds on the test set. A bound and an exact value are different metrics, never one column."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.protocols import CanBound, CanScore, HasSettings, Terms, Trainable
from src.core.rng import SampleNoise
from src.core.spec import DISCRETE
from src.metrics.intervals import mean_interval
from src.metrics.metric import HIGHER, LOWER, Inputs, Measurement, Metric, require

__all__ = ["BitsPerDim", "Bound", "BoundBitsPerDim", "LogLikelihood", "TestLoss"]

Of = Callable[[Batch, SampleNoise], Terms]


class LogLikelihood(Metric):
    """Mean log likelihood of a test example, in nats; larger is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        return _mean(inputs, _exact(inputs), 1.0, "nats", HIGHER, _of_exact(inputs))


class BitsPerDim(Metric):
    """The log likelihood as bits per dimension of discrete data, -log p / (D ln 2); smaller is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        return _mean(inputs, _exact(inputs), _bits_per_nat(inputs), "bits/dim", LOWER, _of_exact(inputs))


class Bound(Metric):
    """Mean lower bound of the log likelihood of a test example (for a VAE the ELBO), in nats; larger is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        return _mean(inputs, _bound(inputs), 1.0, "nats", HIGHER, _of_what(inputs) | {"seed": inputs.seed})


class BoundBitsPerDim(Metric):
    """The bound as bits per dimension of discrete data, -bound / (D ln 2); smaller is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        protocol = _of_what(inputs) | {"seed": inputs.seed}
        return _mean(inputs, _bound(inputs), _bits_per_nat(inputs), "bits/dim", LOWER, protocol)


class TestLoss(Metric):
    """The training objective on the test set, as the model defines it: no likelihood unless it happens to be one."""

    __test__ = False  # pytest: this is no test case

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, Trainable)

        def of(batch: Batch, noise: SampleNoise) -> Terms:
            terms = inputs.model.loss(batch, generator=noise)
            return {"value": terms.pop("loss"), **terms}

        return _mean(inputs, of, 1.0, "objective", LOWER, {"objective": inputs.model.objective, "seed": inputs.seed})


def _exact(inputs: Inputs) -> Of:
    require(inputs, CanScore)
    return lambda batch, noise: {"value": inputs.model.log_prob(batch.x, batch.condition, generator=noise)}


def _bound(inputs: Inputs) -> Of:
    require(inputs, CanBound)

    def of(batch: Batch, noise: SampleNoise) -> Terms:
        terms = dict(inputs.model.log_prob_bound_terms(batch.x, batch.condition, generator=noise))
        return {"value": torch.stack(list(terms.values())).sum(0), **terms}

    return of


def _of_what(inputs: Inputs) -> dict[str, Any]:
    """p(x) and p(x given its class) are likelihoods of different things: the label alone is worth up to ln K nats."""
    return {"of": "x given its class" if getattr(inputs.model, "is_conditional", False) else "x"}


def _of_exact(inputs: Inputs) -> dict[str, Any]:
    """With the seed if the value may be an estimate: that of a model whose settings are on the card."""
    return _of_what(inputs) | ({"seed": inputs.seed} if isinstance(inputs.model, HasSettings) else {})


def _bits_per_nat(inputs: Inputs) -> float:
    """The factor from nats of an example to bits of one of its values; the sign turns a likelihood into a code length."""
    if inputs.spec.values.kind != DISCRETE:
        kind = inputs.spec.values.describe()
        raise NotApplicable(f"bits per dimension are of discrete values; data={inputs.spec.name} gives {kind}")
    return -1 / (inputs.spec.num_dims * math.log(2))


def _mean(inputs: Inputs, of: Of, scale: float, unit: str, better: str, protocol: dict[str, Any]) -> Measurement:
    """Mean of a per-example quantity over the test split, with its 95 % interval and the means of its parts.

    Args:
        of: terms `(B,)` of a batch: "value", and what it is made of.
        scale: factor of all of them.
        protocol: what else the value depends on, for its card.
    """
    collected: dict[str, list[Tensor]] = {}
    start = 0
    with torch.no_grad():
        for batch in inputs.test_batches():
            for name, values in of(batch, SampleNoise(inputs.seed, start)).items():
                collected.setdefault(name, []).append(values.cpu().double())
            start += len(batch)
    terms = {name: scale * torch.cat(values) for name, values in collected.items()}
    values = terms.pop("value")
    num_bad = int((~values.isfinite()).sum())
    if num_bad:
        raise NotApplicable(f"{num_bad} of {len(values)} test examples have no finite value")
    card = {"split": "test", "num_examples": len(values), "values": inputs.spec.values.kind, **protocol}
    means = {name: float(part.mean()) for name, part in terms.items()}
    parts = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return Measurement(float(values.mean()), unit, card, better, mean_interval(values), parts)
