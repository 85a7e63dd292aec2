"""Importance-weighted bounds as a training objective and as metrics, and what takes the place of the KL in training."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError
from src.core.protocols import CanWeigh, FollowsTraining
from src.core.rng import Noise, SampleNoise
from src.evaluation.variational_oracles import DATA_DIM, LATENT_DIM, linear_vae, spoil_posterior
from src.metrics.likelihood import ImportanceWeightedBound
from src.models.iwae import IWAE
from src.models.vae import VAE
from src.objectives.kl_weights import Constant, FreeBits, WarmUp
from src.objectives.variational import importance_weighted_bound
from src.training.gradient import GradientTraining
from src.training.schedules import Constant as ConstantSchedule
from tests.measuring import SHAPE, make_inputs, make_metric

X = 2 * SampleNoise(0).normal((40, DATA_DIM), torch.zeros((), dtype=torch.float64))


def linear_iwae(k: int, **keys: object) -> IWAE:
    iwae = linear_vae(make=partial(IWAE, num_importance_samples=k), **keys)
    spoil_posterior(iwae)
    return iwae


# --- the model -------------------------------------------------------------------------------------------------------


def test_loss_is_minus_the_bound_of_its_own_weights():
    iwae = linear_iwae(7)
    terms = iwae.loss(Batch(X), generator=SampleNoise(0))
    weights = iwae.importance_log_weights(X, num_samples=7, generator=SampleNoise(0))
    torch.testing.assert_close(terms["loss"], -importance_weighted_bound(weights))
    torch.testing.assert_close(terms["bound"], -terms["loss"])
    assert terms["bound"].mean() > terms["elbo"].mean() + 0.1  # the ELBO stands beside it


def test_elbo_beside_it_is_that_of_a_vae():
    vae, iwae = linear_vae(), linear_iwae(10_000)
    spoil_posterior(vae)
    with torch.no_grad():
        one = torch.stack([vae.log_prob_bound(X[:5], generator=SampleNoise(i)) for i in range(400)])
        many = iwae.log_prob_bound(X[:5], generator=SampleNoise(0))
    assert ((one.mean(0) - many).abs() < 4.5 * one.std(0) * math.sqrt(1 / 400 + 1 / 10_000)).all()


def test_held_out_loss_needs_no_graph():
    iwae = linear_iwae(3, doubly_reparameterized=True)
    with torch.no_grad():
        assert iwae.loss(Batch(X), generator=SampleNoise(0))["loss"].isfinite().all()


def test_objective_names_its_number_of_draws():
    assert linear_iwae(3).objective != linear_iwae(4).objective
    assert linear_iwae(3).settings()["bound_is"] == "L_1 (ELBO)"


def test_no_draws_are_refused():
    with pytest.raises(UserError, match=r"model\.num_importance_samples=0 must be at least 1"):
        linear_iwae(0)


# --- the metric ------------------------------------------------------------------------------------------------------


class FirstPixelWeights(nn.Module):
    """Weights that are the first pixel of the example plus its noise."""

    def importance_log_weights(
        self, x: Tensor, condition: Tensor | None = None, *, num_samples: int, generator: Noise | None = None
    ) -> Tensor:
        return x[:, :1, 0, 0] + generator.normal((len(x), num_samples), like=x)


IMAGES = SampleNoise(1).normal((25, *SHAPE), torch.zeros((), dtype=torch.float64))


def test_metric_is_the_mean_over_examples_with_the_lower_bounds_of_the_same_draws():
    assert isinstance(FirstPixelWeights(), CanWeigh)
    inputs = make_inputs(FirstPixelWeights(), x=IMAGES)
    measured = ImportanceWeightedBound(num_samples=10, num_examples=None).measure(inputs)
    weights = IMAGES[:, :1, 0, 0] + SampleNoise(0).normal((25, 10), IMAGES)
    expected = weights.exp().mean(1).log()
    assert measured.value == pytest.approx(float(expected.mean()))
    assert measured.interval is not None
    assert measured.parts["L_1"] == pytest.approx(float(weights.mean()))
    assert measured.parts["L_5"] == pytest.approx(float(weights.exp().unflatten(1, (2, 5)).mean(2).log().mean()))
    assert measured.parts["L_1"] < measured.parts["L_5"] < measured.value
    assert {"draws": 10, "num_examples": 25, "examples": "all", "seed": 0, "of": "x"}.items() <= measured.card.items()


@pytest.mark.parametrize("batch_size", [4, 25])
def test_metric_takes_so_many_examples_from_all_of_the_split(batch_size):
    inputs = make_inputs(FirstPixelWeights(), x=IMAGES, batch_size=batch_size)
    measured = ImportanceWeightedBound(num_samples=1, num_examples=10).measure(inputs)
    chosen = IMAGES[[0, 2, 5, 7, 10, 12, 15, 17, 20, 22], 0, 0, 0]
    assert measured.value == pytest.approx(float((chosen + SampleNoise(0).normal((10, 1), IMAGES)[:, 0]).mean()))
    assert measured.card["num_examples"] == 10


def test_metric_needs_weights_of_a_likelihood():
    with pytest.raises(NotApplicable, match="fake has no CanWeigh"):
        make_metric("iw_bound_5").measure(make_inputs(nn.Identity()))


@pytest.mark.parametrize("k", [5, 50, 5000])
def test_each_number_of_draws_is_a_metric_of_its_own(k):
    metric = make_metric(f"iw_bound_{k}", num_examples=2)
    assert metric.measure(make_inputs(FirstPixelWeights(), x=IMAGES)).card["draws"] == k


# --- what takes the place of the KL ----------------------------------------------------------------------------------

KL = torch.tensor([[0.3, 0.0, 2.0], [0.1, 0.02, 1.0]])


def test_warm_up_rises_to_the_kl_in_a_straight_line():
    warm_up = WarmUp(examples=1000.0, start=0.2)
    for seen, factor in ((0, 0.2), (500, 0.6), (1000, 1.0), (5000, 1.0)):
        torch.testing.assert_close(warm_up(KL, seen), factor * KL.sum(1))
    torch.testing.assert_close(Constant()(KL, 0), KL.sum(1))


def test_free_bits_count_no_dimension_below_their_floor_and_leave_it_alone():
    kl = KL.clone().requires_grad_()
    minimised = FreeBits(nats=0.1)(kl, 0)
    torch.testing.assert_close(minimised.mean(), torch.tensor(0.2 + 0.1 + 1.5))  # sum_d max(0.1, mean_d)
    minimised.mean().backward()
    torch.testing.assert_close(kl.grad, torch.tensor([[0.5, 0.0, 0.5]]).expand(2, 3))
    torch.testing.assert_close(FreeBits(nats=0.0)(KL, 0), KL.sum(1))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: WarmUp(examples=0.0, start=0.0), "kl_weight.examples=0.0"),
        (lambda: WarmUp(examples=10.0, start=1.0), "kl_weight.start=1.0"),
        (lambda: FreeBits(nats=-1.0), "kl_weight.nats=-1.0"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(make, key):
    with pytest.raises(UserError, match=key):
        make()


@pytest.mark.parametrize("kl_weight", [WarmUp(examples=100.0, start=0.0), FreeBits(nats=5.0)])
def test_elbo_and_held_out_loss_do_not_know_of_it(kl_weight):
    plain, weighed = linear_vae(beta=2.0), linear_vae(beta=2.0, kl_weight=kl_weight)
    in_training, expected = (vae.loss(Batch(X), generator=SampleNoise(0)) for vae in (weighed, plain))
    assert not torch.allclose(in_training["loss"], expected["loss"])
    held_out = weighed.eval().loss(Batch(X), generator=SampleNoise(0))
    for term in expected:
        torch.testing.assert_close(held_out[term], expected[term])
        assert term == "loss" or torch.equal(in_training[term], expected[term])
    assert weighed.objective == plain.objective


def test_driver_tells_the_model_how_far_it_is():
    vae = linear_vae(kl_weight=WarmUp(examples=100.0, start=0.0))
    assert isinstance(vae, FollowsTraining)
    losses = []

    class Driver(GradientTraining):
        """One that is nowhere inside a trainer."""

        def _reduce(self, terms, prefix=""):
            losses.append(terms["loss"].detach())
            return terms["loss"].mean(), {}

        def _descend(self, optimizer, loss, place): ...

        def optimizers(self, use_pl_optimizer=True):
            return SimpleNamespace(optimizer=None)  # which a constant schedule leaves alone

        def _count_batch(self, batch, numbers):
            self.examples_seen += len(batch)

    driver = Driver(vae, torch.optim.Adam, ConstantSchedule(), 0, 1, None, None, 1)
    driver._noise = SampleNoise(0)
    batch = Batch(X)
    for _ in range(4):
        driver._noise = SampleNoise(0)
        driver.training_step(batch, 0)
    kl = linear_vae().loss(batch, generator=SampleNoise(0))["kl"].detach()
    torch.testing.assert_close(losses[1] - losses[0], 0.4 * kl)
    torch.testing.assert_close(losses[3] - losses[0], kl)  # 120 of 100 examples


def test_weights_are_finite_of_many_draws_at_small_cost():
    vae = linear_vae()
    assert isinstance(vae, VAE)
    with torch.no_grad():
        weights = vae.importance_log_weights(X[:2], num_samples=5000, generator=SampleNoise(0))
    assert weights.shape == (2, 5000)
    assert LATENT_DIM == 2
