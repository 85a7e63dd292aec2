"""Likelihoods, bounds, errors and accuracy on the test set, of models whose exact values are known."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.protocols import Terms
from src.core.rng import Noise, SampleNoise
from src.core.spec import CONTINUOUS, DISCRETE
from src.metrics.accuracy import Accuracy
from src.metrics.likelihood import BitsPerDim, Bound, BoundBitsPerDim, LogLikelihood, TestLoss
from src.metrics.metric import HIGHER, LOWER, Metric
from src.metrics.reconstruction import ReconstructionError
from src.models.vae import VAE, StandardNormalPrior
from src.networks.mlp import MLP
from src.objectives.likelihoods import BernoulliOnGrey
from tests.examples import image_spec
from tests.measuring import NUM_CLASSES, SHAPE, make_inputs


def random_images(n: int) -> Tensor:
    return SampleNoise(0).normal((n, *SHAPE), torch.zeros((), dtype=torch.float64))


class Scores(nn.Module):
    """Says that the log likelihood of an example is its first pixel."""

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return x[:, 0, 0, 0]


class NoisyBound(nn.Module):
    """A bound of its first pixel plus noise; its loss is the opposite, and has twice the bound as a term beside it."""

    objective = "minus the bound"

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return sum(self.log_prob_bound_terms(x, generator=generator).values())

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        return {"pixel": x[:, 0, 0, 0], "noise": generator.normal((len(x),), like=x)}

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        bound = self.log_prob_bound(batch.x, generator=generator)
        return {"loss": -bound, "double": 2 * bound}


class UniformBits(nn.Module):
    """The uniform distribution of 8-bit pixels."""

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return self.log_prob_bound_terms(x)["uniform"]

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        return {"uniform": x.new_full((len(x),), -x[0].numel() * math.log(256))}

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return self.log_prob_bound(x)


def test_log_likelihood_is_the_mean_over_the_test_set_with_its_interval():
    x = random_images(25)
    measured = LogLikelihood().measure(make_inputs(Scores(), x=x))
    expected = x[:, 0, 0, 0].numpy()
    margin = stats.norm.ppf(0.975) * stats.sem(expected)
    assert measured.value == pytest.approx(expected.mean())
    assert measured.interval == pytest.approx((expected.mean() - margin, expected.mean() + margin))
    assert measured.unit == "nats"
    assert {"split": "test", "num_examples": 25, "values": DISCRETE}.items() <= measured.card.items()


@pytest.mark.parametrize("metric", [Bound(), BoundBitsPerDim(), TestLoss()], ids=lambda m: type(m).__name__)
def test_bounds_depend_on_the_seed_but_not_on_the_batch_size(metric):
    x = random_images(25)
    measure = partial(make_inputs, NoisyBound(), x=x)
    first = metric.measure(measure(batch_size=4)).value
    assert metric.measure(measure(batch_size=25)).value == pytest.approx(first, rel=1e-12)
    assert metric.measure(measure(seed=1)).value != pytest.approx(first, rel=1e-6)


def test_bound_and_loss_are_what_the_model_says_at_the_seed():
    x = random_images(25)
    expected = float((x[:, 0, 0, 0] + SampleNoise(7).normal((25,), x)).mean())
    inputs = make_inputs(NoisyBound(), x=x, seed=7)
    bound, loss = Bound().measure(inputs), TestLoss().measure(inputs)
    assert (bound.value, loss.value) == pytest.approx((expected, -expected))
    assert loss.card["objective"] == "minus the bound"


def test_parts_are_the_means_of_what_a_value_is_made_of():
    x = random_images(25)
    pixel, noise = (float(some.mean()) for some in (x[:, 0, 0, 0], SampleNoise(7).normal((25,), x)))
    inputs = make_inputs(NoisyBound(), x=x, seed=7)
    assert Bound().measure(inputs).parts == pytest.approx({"pixel": pixel, "noise": noise})
    assert TestLoss().measure(inputs).parts == pytest.approx({"double": 2 * (pixel + noise)})
    bits = -1 / (x[0].numel() * math.log(2))
    assert BoundBitsPerDim().measure(inputs).parts == pytest.approx({"pixel": bits * pixel, "noise": bits * noise})


@pytest.mark.parametrize("metric", [BitsPerDim(), BoundBitsPerDim()], ids=lambda m: type(m).__name__)
def test_uniform_model_of_bytes_has_8_bits_per_dimension(metric):
    measured = metric.measure(make_inputs(UniformBits()))
    assert measured.value == pytest.approx(8, rel=1e-6)
    assert measured.unit == "bits/dim"


@pytest.mark.parametrize("metric", [BitsPerDim(), BoundBitsPerDim()], ids=lambda m: type(m).__name__)
def test_bits_per_dimension_are_of_discrete_values_only(metric):
    with pytest.raises(NotApplicable, match="data=made_up gives continuous values"):
        metric.measure(make_inputs(UniformBits(), values=CONTINUOUS))


@pytest.mark.parametrize(
    ("metric", "model", "better"),
    [
        (LogLikelihood(), UniformBits(), HIGHER),
        (BitsPerDim(), UniformBits(), LOWER),
        (Bound(), NoisyBound(), HIGHER),
        (BoundBitsPerDim(), NoisyBound(), LOWER),
        (TestLoss(), NoisyBound(), LOWER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Metric) else "",
)
def test_nats_of_likelihood_are_better_higher_and_bits_and_losses_lower(metric, model, better):
    assert metric.measure(make_inputs(model)).better == better


class ScoresGivenClasses(Scores):
    is_conditional = True


class BoundGivenClasses(NoisyBound):
    is_conditional = True


@pytest.mark.parametrize(
    ("metric", "model", "given_classes"),
    [(LogLikelihood(), Scores(), ScoresGivenClasses()), (BitsPerDim(), Scores(), ScoresGivenClasses()),
     (Bound(), NoisyBound(), BoundGivenClasses()), (BoundBitsPerDim(), NoisyBound(), BoundGivenClasses())],
    ids=lambda value: type(value).__name__ if isinstance(value, Metric) else "",
)  # fmt: skip
def test_card_says_what_the_likelihood_is_of(metric, model, given_classes):
    assert metric.measure(make_inputs(model)).card["of"] == "x"
    assert metric.measure(make_inputs(given_classes)).card["of"] == "x given its class"


class CountsItsWork(Scores):
    """Says that it takes seven evaluations for an example."""

    num_likelihood_evaluations = 100  # of before

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        self.num_likelihood_evaluations += 7 * len(x)
        return super().log_prob(x)


def test_card_says_how_many_evaluations_a_likelihood_takes():
    inputs = make_inputs(CountsItsWork(), x=random_images(25))
    for metric in (LogLikelihood(), BitsPerDim()):  # computed once for both
        assert metric.measure(inputs).card["evaluations_per_example"] == 7
    assert inputs.model.num_likelihood_evaluations == 100 + 7 * 25
    assert "evaluations_per_example" not in LogLikelihood().measure(make_inputs(Scores(), x=random_images(25))).card


def test_card_names_the_seed_where_it_matters_and_no_quantisation():
    inputs = make_inputs(NoisyBound(), x=random_images(25), seed=7)
    cards = [metric.measure(inputs).card for metric in (Bound(), BoundBitsPerDim(), TestLoss())]
    assert [card["seed"] for card in cards] == [7, 7, 7]
    exact = [metric.measure(make_inputs(Scores(), x=random_images(25))).card for metric in (LogLikelihood(), BitsPerDim())]
    assert not any("seed" in card for card in exact)
    assert not any("quantisation" in card for card in (*cards, *exact))


def test_exact_values_and_bounds_are_different_metrics():
    with pytest.raises(NotApplicable, match="fake has no CanBound"):
        Bound().measure(make_inputs(Scores()))
    with pytest.raises(NotApplicable, match="fake has no CanScore"):
        LogLikelihood().measure(make_inputs(NoisyBound()))


def test_bound_has_no_value_where_the_loss_is_no_likelihood():
    network = partial(MLP, hidden=[4], activation=nn.ReLU())
    spec = image_spec(SHAPE, DISCRETE)
    vae = VAE(spec, network, network, likelihood=BernoulliOnGrey, prior=StandardNormalPrior, latent_dim=2)
    with pytest.raises(NotApplicable, match="BernoulliOnGrey is a training loss"):
        Bound().measure(make_inputs(vae))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_likelihood_that_is_not_finite_somewhere_has_no_mean(bad):
    x = random_images(25)
    x[3, 0, 0, 0] = bad
    with pytest.raises(NotApplicable, match="1 of 25 test examples have no finite value"):
        LogLikelihood().measure(make_inputs(Scores(), x=x))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_part_that_is_not_finite_is_left_out_and_the_value_stays(bad):
    class OddPart(NoisyBound):
        def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
            return super().loss(batch, generator=generator) | {"odd": batch.x[:, 0, 0, 0] * bad}

    measured = TestLoss().measure(make_inputs(OddPart(), x=random_images(25)))
    assert math.isfinite(measured.value)
    assert list(measured.parts) == ["double"]


def test_interval_of_a_single_example_is_unknown():
    assert LogLikelihood().measure(make_inputs(Scores(), x=random_images(1))).interval is None


def test_reconstruction_error_is_the_mean_square_of_one_value():
    class OffByHalf(nn.Module):
        def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
            return x + 0.5

    measured = ReconstructionError().measure(make_inputs(OffByHalf(), x=random_images(25)))
    assert measured.value == pytest.approx(0.25)
    assert measured.card["num_examples"] == 25


class FirstPixelIsTheClass(nn.Module):
    def classify(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), NUM_CLASSES).float()


def test_accuracy_is_the_share_of_test_examples_that_are_put_into_their_class():
    x, labels = torch.zeros(25, *SHAPE), torch.arange(25) % NUM_CLASSES
    x[:, 0, 0, 0] = labels.where(torch.arange(25) >= 5, (labels + 1) % NUM_CLASSES)
    batches = [Batch(x[:16], labels[:16]), Batch(x[16:], labels[16:])]
    measured = Accuracy().measure(replace(make_inputs(FirstPixelIsTheClass()), test_batches=lambda: batches))
    assert measured.value == 20 / 25
    assert measured.card["num_examples"] == 25
    assert measured.better == HIGHER
    expected = stats.binomtest(20, 25).proportion_ci(0.95, method="wilson")
    assert measured.interval == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_accuracy_has_no_value_without_labels():
    with pytest.raises(NotApplicable, match="data=made_up has no labels"):
        Accuracy().measure(make_inputs(FirstPixelIsTheClass()))
