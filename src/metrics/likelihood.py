"""Log likelihoods and bounds on the test set. A bound and an exact value are different metrics, never one column.

Beside those of whole examples stand yardsticks: densities that need no network, on the same test examples (`yardsticks`).

References:
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519: the bounds L_k.
    Sohn, Lee, Yan 2015, "Learning structured output representation using deep conditional generative models", NeurIPS:
        draws of the prior, and a baseline without latents.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from src.core.batch import Batch
from src.core.errors import NotApplicable, require_at_least
from src.core.protocols import (
    CanBound,
    CanScore,
    CanWeigh,
    CountsLikelihoodEvaluations,
    HasBaseline,
    HasPrior,
    HasSettings,
    ScoresPart,
    Terms,
    Trainable,
)
from src.core.rng import SampleNoise
from src.core.spec import DISCRETE
from src.metrics.intervals import mean_interval
from src.metrics.metric import HIGHER, LOWER, Inputs, Measurement, Metric, Reading, require
from src.metrics.yardsticks import LogProb, yardsticks

__all__ = [
    "BaselineLogLikelihood",
    "BitsPerDim",
    "Bound",
    "BoundBitsPerDim",
    "ForwardKL",
    "ImportanceWeightedBound",
    "LogLikelihood",
    "PriorMonteCarlo",
    "TestLoss",
    "conditions_of_exact",
    "terms_of_test",
]

Of = Callable[[Batch, SampleNoise], Terms]


class LogLikelihood(Metric):
    """Mean log likelihood of a test example, in nats; larger is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        _refuse_text(inputs)
        return _likelihood(inputs, _exact, 1.0, "nats", HIGHER, conditions_of_exact(inputs))


class BitsPerDim(Metric):
    """The log likelihood as bits per dimension of discrete data, -log p / (D ln 2); smaller is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        _refuse_text(inputs)
        scale, protocol = _bits_per_nat(inputs), conditions_of_exact(inputs)
        return _likelihood(inputs, _exact, scale, "bits/dim", LOWER, protocol)


class ForwardKL(Metric):
    """KL(data || model) in nats, of data whose density is known; smaller is better, and 0 is a perfect model.

        KL(p || q) = E_p [log p(x) - log q(x)] = H(p, q) - H(p)

    The mean is over the test points, the same ones for both densities, so that the luck of which points they are mostly
    cancels; an estimate may so be a little below 0. The parts are the means of both terms by themselves: `cross_entropy`
    H(p, q), which no model has below the data's entropy H(p), and `entropy_of_test_points`, the estimate of H(p) by them.
    """

    def measure(self, inputs: Inputs) -> Measurement:
        density = inputs.density
        if density is None:
            raise NotApplicable(f"it is of data whose density is known; that of data={inputs.spec.name} is not")
        require(inputs, CanScore)
        if getattr(inputs.model, "is_conditional", False):
            raise NotApplicable(f"{inputs.model_name} scores x given its class; the known density is of x")

        def of(batch: Batch, noise: SampleNoise) -> Terms:
            log_p = density.log_prob(batch.x.cpu())
            log_q = inputs.model.log_prob(batch.x, batch.condition, generator=noise).cpu().double()
            return {"value": log_p - log_q, "cross_entropy": -log_q, "entropy_of_test_points": -log_p}

        entropy = density.entropy
        about = {"data_entropy": entropy.nats, "data_entropy_by": entropy.how}
        if entropy.standard_error is not None:
            about["data_entropy_standard_error"] = entropy.standard_error
        return _mean(inputs, of, 1.0, "nats", LOWER, conditions_of_exact(inputs) | about, inputs.num_likelihood_examples)


class Bound(Metric):
    """Mean lower bound of the log likelihood of a test example (for a VAE the ELBO), in nats; larger is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        protocol = _of_what(inputs) | {"seed": inputs.seed}
        return _likelihood(inputs, _bound, 1.0, "nats", HIGHER, protocol)


class BoundBitsPerDim(Metric):
    """The bound as bits per dimension of discrete data, -bound / (D ln 2); smaller is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        protocol = _of_what(inputs) | {"seed": inputs.seed}
        scale = _bits_per_nat(inputs)
        return _likelihood(inputs, _bound, scale, "bits/dim", LOWER, protocol)


class ImportanceWeightedBound(Metric):
    """Mean lower bound L_k = E log mean_i w_i of a test example, in nats; larger is better.

    w_i = p(x, z_i) / q(z_i | x) with k draws of z for each example. L_k climbs with k from the ELBO to the log likelihood,
    so each k is a metric of its own. Its parts L_1, L_5, ... are the lower steps, on the same examples and draws.

    Args:
        num_samples: k.
        num_examples: so many test examples, evenly spread over the test split; None for all of them.
    """

    def __init__(self, num_samples: int, num_examples: int | None) -> None:
        self._num_samples, self._num_examples = _required(num_samples, num_examples)

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanWeigh)

        def of(batch: Batch, noise: SampleNoise) -> Terms:
            k = self._num_samples
            weights = inputs.model.importance_log_weights(batch.x, batch.condition, num_samples=k, generator=noise)
            weights = weights.double() - inputs.spec.log_scale
            lower = [steps for steps in _LADDER if steps < k and k % steps == 0]
            return {"value": _bound_of(weights, k), **{f"L_{steps}": _bound_of(weights, steps) for steps in lower}}

        protocol = _of_draws(inputs, self._num_samples, self._num_examples)
        found = _mean(inputs, of, 1.0, "nats", HIGHER, protocol, self._num_examples)
        return _beside_yardsticks(inputs, found, 1.0, self._num_examples)


class PriorMonteCarlo(Metric):
    """Mean of log mean_i p(x | z_i) over k draws z_i ~ p(z) for each test example, in nats; larger is better.

    It, too, is a lower bound of the log likelihood in expectation, and climbs with k; mostly more slowly than L_k, since
    few draws of the prior are near an example. Sohn et al. report it as the conditional log likelihood by Monte Carlo.

    Args:
        num_samples: k.
        num_examples: so many test examples, evenly spread over the test split; None for all of them.
    """

    def __init__(self, num_samples: int, num_examples: int | None) -> None:
        self._num_samples, self._num_examples = _required(num_samples, num_examples)

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, HasPrior)
        k = self._num_samples

        def of(batch: Batch, noise: SampleNoise) -> Terms:
            found = inputs.model.prior_log_likelihoods(batch.x, batch.condition, num_samples=k, generator=noise)
            return {"value": _bound_of(found.double() - inputs.spec.log_scale, k)}

        protocol = _of_draws(inputs, k, self._num_examples) | {"draws_of": "the prior"}
        found = _mean(inputs, of, 1.0, "nats", HIGHER, protocol, self._num_examples)
        return _beside_yardsticks(inputs, found, 1.0, self._num_examples)


class BaselineLogLikelihood(Metric):
    """Mean exact log likelihood of a test example by the model's baseline network, in nats; larger is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, HasBaseline)

        def of(batch: Batch, noise: SampleNoise) -> Terms:
            return {"value": inputs.model.baseline_log_prob(batch.x, batch.condition) - inputs.spec.log_scale}

        return _mean(inputs, of, 1.0, "nats", HIGHER, _of_what(inputs), inputs.num_likelihood_examples)


_LADDER = (1, 5, 50, 500, 5000)


def _refuse_text(inputs: Inputs) -> None:
    if inputs.spec.tokenizer is not None:
        raise NotApplicable("windows of a text share tokens; nats_per_token counts each of them once")


def _required(num_samples: int, num_examples: int | None) -> tuple[int, int | None]:
    require_at_least("metric.*.num_samples", num_samples, 1)
    require_at_least("metric.*.num_examples", num_examples, 1)
    return num_samples, num_examples


def _of_draws(inputs: Inputs, num_samples: int, num_examples: int | None) -> dict[str, Any]:
    examples = "all" if num_examples is None else "evenly spread over the split"
    return _of_what(inputs) | {"seed": inputs.seed, "draws": num_samples, "examples": examples}


def _bound_of(log_weights: Tensor, k: int) -> Tensor:
    """L_k of weights `(B, n k)`, the mean over n groups of k, `(B,)` in nats."""
    return (log_weights.unflatten(1, (-1, k)).logsumexp(2) - math.log(k)).mean(1)


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

    def of(batch: Batch, noise: SampleNoise) -> Terms:
        return {"value": inputs.model.log_prob(batch.x, batch.condition, generator=noise) - inputs.spec.log_scale}

    return of


def _bound(inputs: Inputs) -> Of:
    require(inputs, CanBound)

    def of(batch: Batch, noise: SampleNoise) -> Terms:
        terms = dict(inputs.model.log_prob_bound_terms(batch.x, batch.condition, generator=noise))
        if inputs.spec.own_units is not None:
            terms["own_units"] = torch.full_like(next(iter(terms.values())), -inputs.spec.log_scale)
        return {"value": torch.stack(list(terms.values())).sum(0), **terms}

    return of


def _of_what(inputs: Inputs) -> dict[str, Any]:
    """p(x) and p(x given its class) are likelihoods of different things: the label alone is worth up to ln K nats."""
    is_told_class = getattr(inputs.model, "is_conditional", False)
    of_whole = "x given its class" if is_told_class else "x"
    about = {"of": inputs.model.of_what if isinstance(inputs.model, ScoresPart) else of_whole}
    if inputs.spec.own_units is None:
        return about
    return about | {"units": f"the data's own: {inputs.spec.log_scale:.6g} nats less than of standardized values"}


def conditions_of_exact(inputs: Inputs) -> dict[str, Any]:
    """With the seed if the value may be an estimate: that of a model whose settings are on the card."""
    return _of_what(inputs) | ({"seed": inputs.seed} if isinstance(inputs.model, HasSettings) else {})


def _bits_per_nat(inputs: Inputs) -> float:
    """The factor from nats of an example to bits of one of its values; the sign turns a likelihood into a code length."""
    if isinstance(inputs.model, ScoresPart):
        raise NotApplicable(f"bits per dimension are of whole examples; {inputs.model_name} scores {inputs.model.of_what}")
    if inputs.spec.values.kind != DISCRETE:
        kind = inputs.spec.values.describe()
        raise NotApplicable(f"bits per dimension are of discrete values; data={inputs.spec.name} gives {kind}")
    return -1 / (inputs.spec.num_dims * math.log(2))


def _likelihood(
    inputs: Inputs, of: Callable[[Inputs], Of], scale: float, unit: str, better: str, protocol: dict[str, Any]
) -> Measurement:
    """`_mean` of the model's own likelihood, for as many examples as the evaluation has it computed, once for all units."""
    num_examples = inputs.num_likelihood_examples
    found = _mean(inputs, of(inputs), scale, unit, better, protocol, num_examples, kept_as=of.__name__)
    return _beside_yardsticks(inputs, found, scale, num_examples)


def _beside_yardsticks(inputs: Inputs, found: Measurement, scale: float, num_examples: int | None) -> Measurement:
    """With the mean log probabilities of the same test examples by densities that need no network.

    They are of x by itself; a model that is told a part of it, or its class, has none beside it.
    """
    if isinstance(inputs.model, ScoresPart) or getattr(inputs.model, "is_conditional", False):
        return found
    key = f"yardsticks {num_examples}"
    if key not in inputs.kept:
        inputs.kept[key] = _yardsticks(inputs, num_examples)
    anchors = {
        name: row if isinstance(row, NotApplicable) else Reading(scale * row[0], row[1])
        for name, row in inputs.kept[key].items()
    }
    return replace(found, anchors=anchors)


def _yardsticks(inputs: Inputs, num_examples: int | None) -> dict[str, tuple[float, int] | NotApplicable]:
    """Mean log probability of a test example in nats and of how many, by name; or why there is none."""
    rows: dict[str, tuple[float, int] | NotApplicable] = {}
    for name, log_prob in yardsticks(inputs.spec, inputs.reference, inputs.store).items():

        def of(batch: Batch, noise: SampleNoise, log_prob: LogProb = log_prob) -> Terms:
            return {"value": log_prob(batch.x) - inputs.spec.log_scale}

        try:
            values = terms_of_test(inputs, of, num_examples)["value"]
        except NotApplicable as reason:
            rows[name] = reason
        else:
            rows[name] = float(values.mean()), len(values)
    return rows


def _mean(
    inputs: Inputs,
    of: Of,
    scale: float,
    unit: str,
    better: str,
    protocol: dict[str, Any],
    num_examples: int | None = None,
    kept_as: str | None = None,
) -> Measurement:
    """Mean of a per-example quantity over the test split, with its 95 % interval and the means of its parts.

    Args:
        of: terms `(B,)` of a batch: "value", and what it is made of.
        scale: factor of all of them.
        protocol: what else the value depends on, for its card.
        num_examples: so many of the test examples, evenly spread; None for all.
        kept_as: a name for metrics of one quantity in several units, for which it is computed once.
    """
    kept = inputs.kept.get(kept_as) if kept_as else None
    if kept is None:
        before = _evaluations(inputs)
        found = terms_of_test(inputs, of, num_examples)
        kept = found, _evaluations(inputs) - before
    if kept_as:
        inputs.kept[kept_as] = kept
    found, num_evaluations = kept
    terms = {name: scale * values for name, values in found.items()}
    values = terms.pop("value")
    num_bad = int((~values.isfinite()).sum())
    if num_bad:
        raise NotApplicable(f"{num_bad} of {len(values)} test examples have no finite value")
    card = {"split": "test", "num_examples": len(values), "values": inputs.spec.values.kind, **protocol}
    if num_evaluations:
        card["evaluations_per_example"] = num_evaluations / len(values)
    means = {name: float(part.mean()) for name, part in terms.items()}
    parts = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return Measurement(float(values.mean()), unit, card, better, mean_interval(values), parts)


def _evaluations(inputs: Inputs) -> int:
    """Of the model's network, so far, in likelihoods; 0 of a model that does not count them."""
    if isinstance(inputs.model, CountsLikelihoodEvaluations):
        return int(inputs.model.num_likelihood_evaluations)
    return 0


@torch.no_grad()
def terms_of_test(inputs: Inputs, of: Of, num_examples: int | None) -> Terms:
    """What `of` gives for test examples, `(N,)` float64 each."""
    collected: dict[str, list[Tensor]] = {}
    start = 0
    for batch in inputs.test_batches() if num_examples is None else _spread(inputs, num_examples):
        for name, values in of(batch, SampleNoise(inputs.seed, start)).items():
            collected.setdefault(name, []).append(values.cpu().double())
        start += len(batch)
    return {name: torch.cat(values) for name, values in collected.items()}


def _spread(inputs: Inputs, num_examples: int) -> Iterator[Batch]:
    """So many test examples, the first and then at even distances, since a folder of images is sorted by class."""
    total = sum(len(batch) for batch in inputs.test_batches())
    count = min(num_examples, total)
    chosen = torch.arange(count) * total // count
    start = 0
    for batch in inputs.test_batches():
        own = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        start += len(batch)
        if len(own):
            own = own.to(batch.x.device)
            yield Batch(batch.x[own], None if batch.condition is None else batch.condition[own])
