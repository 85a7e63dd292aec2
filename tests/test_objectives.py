"""Closed forms of variational inference, likelihoods and adversarial losses, against torch.distributions and scipy."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, distributions
from torch.nn import functional as F

from src.build import build
from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.core.spec import BINARY_DYNAMIC, BINARY_STATIC, CONTINUOUS, DISCRETE
from src.objectives.adversarial import AdversarialLoss, LeastSquares, Minimax, NonSaturating, Wasserstein
from src.objectives.likelihoods import (
    Bernoulli,
    BernoulliOnGrey,
    DiscretizedLogistic,
    Gaussian,
    GaussianLearnedScale,
    Likelihood,
    Spectral,
)
from src.objectives.variational import gaussian_kl, gaussian_log_prob, reparameterize
from tests.configs import load_option, options, target
from tests.examples import FixedNoise, image_spec, vector_spec, waveform_spec

pytestmark = pytest.mark.usefixtures("float64")

KINDS = [BINARY_STATIC, BINARY_DYNAMIC, DISCRETE, CONTINUOUS]
LIKELIHOODS = {name: target("likelihood", name) for name in options("likelihood") if name != "spectral"}  # of waveforms
ACCEPTED = [(name, kind) for name, kind in itertools.product(LIKELIHOODS, KINDS) if kind in LIKELIHOODS[name].accepts]
REFUSED = sorted({*itertools.product(LIKELIHOODS, KINDS)} - {*ACCEPTED})
OF_LEVELS = [(name, kind) for name, kind in ACCEPTED if kind != CONTINUOUS and LIKELIHOODS[name].is_normalised]
SHAPE = (2, 3, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros(()))


def make_likelihood(name: str, kind: str) -> Likelihood:
    return build(load_option("likelihood", name))(spec=image_spec(SHAPE, kind))


def some_data(likelihood: Likelihood, batch_size: int = 5) -> Tensor:
    """Random values of the kind that the likelihood is of."""
    unit = SampleNoise(1).uniform((batch_size, *SHAPE), torch.zeros(()))
    levels = likelihood.spec.values.levels
    return 2 * unit - 1 if levels is None else 2 * (unit * levels).floor() / (levels - 1) - 1


def some_parameters(likelihood: Likelihood, batch_size: int = 5) -> Tensor:
    channels = SHAPE[0] * likelihood.num_parameters
    return random(batch_size, channels, *SHAPE[1:])


def binary_entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


def test_kl_is_zero_for_equal_gaussians():
    mu, log_var = random(4, 3), random(4, 3, seed=1)
    assert torch.equal(gaussian_kl(mu, log_var, mu, log_var), torch.zeros(4))


def test_kl_agrees_with_torch_distributions_summed_over_dimensions():
    mu_q, log_var_q, mu_p, log_var_p = (random(4, 3, seed=seed) for seed in range(4))
    q, p = (distributions.Normal(mu, (log_var / 2).exp()) for mu, log_var in [(mu_q, log_var_q), (mu_p, log_var_p)])
    expected = distributions.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(gaussian_kl(mu_q, log_var_q, mu_p, log_var_p), expected, rtol=1e-12, atol=0)


def test_kl_is_positive_and_not_symmetric():
    mu_q, log_var_q, mu_p, log_var_p = (random(4, 3, seed=seed) for seed in range(4))
    forward = gaussian_kl(mu_q, log_var_q, mu_p, log_var_p)
    backward = gaussian_kl(mu_p, log_var_p, mu_q, log_var_q)
    assert (forward > 0).all()
    assert (backward > 0).all()
    assert not torch.isclose(forward, backward).any()


def test_kl_of_repeated_dimensions_adds_up():
    parts = [random(4, 3, seed=seed) for seed in range(4)]
    torch.testing.assert_close(gaussian_kl(*(part.repeat(1, 5) for part in parts)), 5 * gaussian_kl(*parts))


def test_gaussian_log_prob_agrees_with_torch_distributions():
    x, mu, log_scale = (random(4, 3, seed=seed) for seed in range(3))
    expected = distributions.Normal(mu, log_scale.exp()).log_prob(x)
    torch.testing.assert_close(gaussian_log_prob(x, mu, log_scale), expected, rtol=1e-12, atol=1e-12)


def test_reparameterized_draw_passes_gradients_to_mean_and_variance():
    mu, log_var, eps = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_(), random(4, 3, seed=2)
    z = reparameterize(mu, log_var, FixedNoise(eps))
    z.sum().backward()
    scale = (log_var / 2).exp().detach()
    torch.testing.assert_close(z, mu + scale * eps)
    torch.testing.assert_close(mu.grad, torch.ones(4, 3))
    torch.testing.assert_close(log_var.grad, 0.5 * scale * eps)


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_log_prob_is_one_finite_number_per_example(name, kind):
    likelihood = make_likelihood(name, kind)
    x, parameters = some_data(likelihood), some_parameters(likelihood)
    together = likelihood.log_prob(x, parameters)
    alone = torch.cat([likelihood.log_prob(x[i : i + 1], parameters[i : i + 1]) for i in range(len(x))])
    assert together.shape == (5,)
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_natural_scale_is_0_to_1_for_cross_entropies_and_data_units_otherwise(name, kind):
    likelihood = make_likelihood(name, kind)
    x = some_data(likelihood)
    natural = likelihood.natural(x)
    assert natural.shape == x.shape
    torch.testing.assert_close(natural, (x + 1) / 2 if "bernoulli" in name else x)


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_mean_and_sample_have_the_shape_of_the_data(name, kind):
    likelihood = make_likelihood(name, kind)
    parameters = some_parameters(likelihood)
    assert likelihood.mean(parameters).shape == (5, *SHAPE)
    assert likelihood.sample(parameters, SampleNoise(0)).shape == (5, *SHAPE)


def spectral(**settings) -> Spectral:
    return Spectral(**{"spec": waveform_spec(), "weight": 0.5, "n_ffts": [16, 32], "floor": 1e-12} | settings)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_spectral_loss_of_a_louder_waveform_is_its_distance_in_closed_form(factor):
    x = random(5, 1, 64)
    distance = abs(1 - factor) + abs(math.log(factor))  # spectral convergence, and that of the log magnitudes
    expected = torch.full((5,), -0.5 * 64 * distance)
    torch.testing.assert_close(spectral().log_prob(x, factor * x), expected)
    torch.testing.assert_close(spectral().log_prob(x, -factor * x), expected)  # of the other phase


def test_spectral_loss_is_of_each_waveform_alone_and_reaches_the_decoder():
    x, decoded = random(5, 1, 64), random(5, 1, 64, seed=1).requires_grad_()
    together = spectral().log_prob(x, decoded)
    torch.testing.assert_close(together[3], spectral().log_prob(x[3:4], decoded[3:4])[0])
    together.sum().backward()
    assert decoded.grad.isfinite().all()
    assert (decoded.grad != 0).all()


def test_a_decoder_of_the_spectral_loss_gives_the_waveform_itself():
    decoded = random(5, 1, 64)
    likelihood = spectral()
    assert torch.equal(likelihood.mean(decoded), decoded.clamp(-1, 1))
    assert torch.equal(likelihood.sample(decoded, SampleNoise(0)), likelihood.mean(decoded))
    assert likelihood.is_normalised is False


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"spec": image_spec((1, 8, 8), CONTINUOUS)}, "Spectral is a loss of waveforms; data=made_up gives image 1x8x8"),
        ({"n_ffts": []}, r"likelihood.n_ffts=\[\] must be one or more windows"),
        ({"n_ffts": [16, 2]}, r"likelihood.n_ffts=\[16, 2\] must be one or more windows of at least 4"),
        ({"weight": 0}, "likelihood.weight=0 must be a positive number"),
        ({"floor": -1.0}, "likelihood.floor=-1.0 must be a positive number"),
    ],
)
def test_spectral_loss_refuses_other_data_and_senseless_settings(settings, said):
    with pytest.raises(UserError, match=said):
        spectral(**settings)


@pytest.mark.parametrize(("name", "kind"), [case for case in ACCEPTED if case[0] != "discretized_logistic"])
def test_samples_average_to_the_mean(name, kind):
    likelihood = make_likelihood(name, kind)
    parameters = some_parameters(likelihood, batch_size=1).clamp(-0.9, 0.9)  # means are clamped to the range
    draws = likelihood.sample(parameters.expand(4000, -1, -1, -1), SampleNoise(0))
    error = 4.5 * draws.std(0) / math.sqrt(len(draws)) + 1e-12
    assert ((draws.mean(0) - likelihood.mean(parameters)[0]).abs() < error).all()


@pytest.mark.parametrize(("name", "kind"), OF_LEVELS)
def test_samples_of_discrete_likelihoods_are_values_of_the_data(name, kind):
    likelihood = make_likelihood(name, kind)
    x = likelihood.sample(some_parameters(likelihood), SampleNoise(0))
    torch.testing.assert_close(likelihood.spec.to_units(likelihood.spec.to_levels(x)).double(), x)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_likelihoods_refuse_other_data_and_name_both_options(name, kind):
    with pytest.raises(UserError, match=r"data=made_up gives .*likelihood=.*data\.values="):
        make_likelihood(name, kind)


def test_grey_cross_entropy_refuses_unbounded_values():
    with pytest.raises(UserError, match="data=made_up gives continuous values"):
        BernoulliOnGrey(vector_spec(4))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("make", [partial(Gaussian), partial(GaussianLearnedScale)], ids=["fixed", "learned"])
def test_gaussians_refuse_a_scale_that_is_not_positive(make, scale):
    with pytest.raises(UserError, match=rf"not {scale} \(set likelihood\."):
        make(image_spec(SHAPE, CONTINUOUS), scale)


@pytest.mark.parametrize("kind", [BINARY_STATIC, BINARY_DYNAMIC])
def test_bernoulli_agrees_with_torch_distributions(kind):
    likelihood = make_likelihood("bernoulli", kind)
    x, logits = some_data(likelihood), some_parameters(likelihood)
    expected = distributions.Bernoulli(logits=logits).log_prob((x + 1) / 2).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(x, logits), expected)


def test_binary_image_of_784_pixels_costs_543_nats_at_zero_logits():
    likelihood = Bernoulli(image_spec((1, 28, 28), BINARY_STATIC))
    x = random(3, 1, 28, 28).sign()
    log_prob = likelihood.log_prob(x, torch.zeros(3, 1, 28, 28))
    torch.testing.assert_close(log_prob, torch.full((3,), -784 * math.log(2)))
    assert float(-log_prob[0]) == pytest.approx(543.43, abs=0.005)


@pytest.mark.parametrize("kind", [DISCRETE, CONTINUOUS])
def test_grey_cross_entropy_is_no_likelihood_and_its_floor_is_the_entropy_of_the_pixels(kind):
    likelihood = make_likelihood("bernoulli_on_grey", kind)
    grey = SampleNoise(0).uniform((5, *SHAPE), torch.zeros(()))
    at_the_target = -likelihood.log_prob(2 * grey - 1, grey.logit())
    elsewhere = -likelihood.log_prob(2 * grey - 1, grey.logit() + random(5, *SHAPE))
    assert not likelihood.is_normalised
    torch.testing.assert_close(at_the_target, binary_entropy(grey).sum((1, 2, 3)))
    assert (elsewhere > at_the_target).all()


@pytest.mark.parametrize("make", [partial(Gaussian, scale=0.3), partial(GaussianLearnedScale, initial_scale=0.3)])
def test_gaussians_agree_with_torch_distributions(make):
    likelihood = make(image_spec(SHAPE, CONTINUOUS))
    x, mu = some_data(likelihood), some_parameters(likelihood)
    expected = distributions.Normal(mu, 0.3).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(x, mu), expected)


def test_only_the_learned_scale_is_trained():
    spec = image_spec(SHAPE, CONTINUOUS)
    assert not list(Gaussian(spec, 0.3).parameters())
    assert len(list(GaussianLearnedScale(spec, 0.3).parameters())) == 1


def all_levels(levels: int) -> tuple[DiscretizedLogistic, Tensor]:
    """A likelihood of one pixel, and every value it can have, `(levels, 1, 1, 1)`."""
    likelihood = DiscretizedLogistic(image_spec((1, 1, 1), DISCRETE, levels))
    return likelihood, torch.linspace(-1, 1, levels).reshape(-1, 1, 1, 1)


def logistic_parameters(mu: float, log_scale: float, n: int) -> Tensor:
    return torch.tensor([mu, log_scale]).reshape(1, 2, 1, 1).expand(n, -1, -1, -1)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("mu", [-3.0, -1.0, -0.999, 0.0, 0.31, 1.0, 50.0])
@pytest.mark.parametrize("log_scale", [-20.0, -7.0, -3.0, 0.0, 4.0])
def test_discretized_logistic_sums_to_one_over_all_levels(levels, mu, log_scale):
    likelihood, x = all_levels(levels)
    log_prob = likelihood.log_prob(x, logistic_parameters(mu, log_scale, levels))
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("levels", [17, 256])
def test_discretized_logistic_is_scipys_logistic_over_each_bin(levels):
    likelihood, x = all_levels(levels)
    log_prob = likelihood.log_prob(x, logistic_parameters(0.2, -1.5, levels))
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, levels)[:-1] + 1 / (levels - 1), [np.inf]])
    expected = np.diff(stats.logistic(0.2, math.exp(-1.5)).cdf(edges))
    np.testing.assert_allclose(log_prob.exp(), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mu", [-1e6, -1.0, 0.0, 1.0, 1e6])
@pytest.mark.parametrize("log_scale", [-1e3, -50.0, 0.0, 50.0, 1e3])
def test_discretized_logistic_is_finite_with_finite_gradients_at_extremes(dtype, mu, log_scale):
    likelihood, x = all_levels(256)
    parameters = logistic_parameters(mu, log_scale, 256).to(dtype).clone().requires_grad_()
    log_prob = likelihood.log_prob(x.to(dtype), parameters)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert parameters.grad.isfinite().all()


@pytest.mark.parametrize(("mu", "log_scale"), [(0.0, -3.0), (0.95, -2.0), (-1.0, -1.0)])
def test_samples_of_the_discretized_logistic_are_as_frequent_as_they_are_likely(mu, log_scale):
    likelihood, x = all_levels(17)
    num_draws = 20_000
    draws = likelihood.sample(logistic_parameters(mu, log_scale, num_draws), SampleNoise(0))
    seen = torch.bincount(likelihood.spec.to_levels(draws).flatten(), minlength=17)
    expected = num_draws * likelihood.log_prob(x, logistic_parameters(mu, log_scale, 17)).exp()
    often = expected > 5
    assert stats.chisquare(seen[often], expected[often], sum_check=False).pvalue > 1e-3
    assert seen[~often].sum() <= 5 * (~often).sum()


def test_mean_of_the_discretized_logistic_is_its_centre_inside_the_range():
    likelihood, _ = all_levels(256)
    centres = [float(likelihood.mean(logistic_parameters(mu, -3.0, 1))) for mu in (-7.0, 0.25, 7.0)]
    assert centres == [-1.0, 0.25, 1.0]


@pytest.mark.parametrize("mu", [-0.5, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, -1.0, -0.5, 1.0])
def test_uniform_levels_cost_at_least_8_bits_under_any_model(mu, log_scale):
    likelihood, x = all_levels(256)
    bits = -likelihood.log_prob(x, logistic_parameters(mu, log_scale, 256)).mean() / math.log(2)
    assert float(bits) >= 8


def test_uniform_levels_cost_exactly_one_bit_under_the_uniform_model_of_two():
    likelihood, x = all_levels(2)
    torch.testing.assert_close(likelihood.log_prob(x, logistic_parameters(0.0, 0.3, 2)), torch.full((2,), -math.log(2)))


adversarial_losses = pytest.mark.parametrize(
    "loss",
    [build(load_option("adversarial_loss", name)) for name in options("adversarial_loss")],
    ids=options("adversarial_loss"),
)


def sigmoid_log(logits: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(logits))


# name: (discriminator of real and generated logits, generator of the same), as they stand in the papers
FORMULAS = {
    "non_saturating": (lambda r, f: -sigmoid_log(r) - torch.log(1 - torch.sigmoid(f)), lambda r, f: -sigmoid_log(f)),
    "minimax": (
        lambda r, f: -sigmoid_log(r) - torch.log(1 - torch.sigmoid(f)),
        lambda r, f: torch.log(1 - torch.sigmoid(f)),
    ),
    "hinge": (lambda r, f: (1 - r).clamp(min=0) + (1 + f).clamp(min=0), lambda r, f: -f),
    "least_squares": (lambda r, f: ((r - 1) ** 2 + f**2) / 2, lambda r, f: (f - 1) ** 2 / 2),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    "relativistic": (lambda r, f: -sigmoid_log(r - f), lambda r, f: -sigmoid_log(f - r)),
}


@pytest.mark.parametrize("name", options("adversarial_loss"))
def test_adversarial_losses_are_their_formulas(name):
    loss = build(load_option("adversarial_loss", name))
    real, fake = random(50).double(), random(50, seed=1).double()
    discriminator, generator = FORMULAS[name]
    torch.testing.assert_close(loss.discriminator(real, fake), discriminator(real, fake), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.generator(fake, real), generator(real, fake), rtol=1e-12, atol=1e-12)


def test_the_drift_keeps_the_logits_of_real_examples_near_zero():
    real, fake = random(50), random(50, seed=1)
    extra = Wasserstein(0.25).discriminator(real, fake) - Wasserstein(0.0).discriminator(real, fake)
    torch.testing.assert_close(extra, 0.25 * real**2)


@pytest.mark.parametrize(("name", "at_zero"), [("non_saturating", 2), ("minimax", 2), ("relativistic", 1)])
def test_a_discriminator_that_cannot_tell_loses_bits(name, at_zero):
    loss, zeros = build(load_option("adversarial_loss", name)), torch.zeros(3)
    torch.testing.assert_close(loss.discriminator(zeros, zeros), torch.full((3,), at_zero * math.log(2)))
    torch.testing.assert_close(loss.generator(zeros, zeros).abs(), torch.full((3,), math.log(2)))


@adversarial_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adversarial_losses_are_finite_with_finite_gradients_at_extreme_logits(loss: AdversarialLoss, dtype):
    logits = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    generated = loss.generator(logits, -logits)
    values = torch.cat([loss.discriminator(logits, -logits), loss.discriminator(logits, logits), generated])
    values.sum().backward()
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()


def gradient_of_the_generator(loss: AdversarialLoss, logit: float) -> float:
    fake = torch.tensor([logit], requires_grad=True)
    loss.generator(fake, torch.zeros(1)).sum().backward()
    return float(fake.grad)


@adversarial_losses
def test_generator_wants_its_samples_to_look_real(loss: AdversarialLoss):
    logits = (-5.0, 0.0, 0.5) if isinstance(loss, LeastSquares) else (-5.0, 0.0, 5.0)  # its target is 1
    assert all(gradient_of_the_generator(loss, logit) < 0 for logit in logits)


def test_non_saturating_gradient_stays_where_the_minimax_gradient_vanishes():
    beaten = -20.0
    assert gradient_of_the_generator(NonSaturating(), beaten) == pytest.approx(-1, abs=1e-8)
    assert abs(gradient_of_the_generator(Minimax(), beaten)) < 1e-8


def test_minimax_is_a_zero_sum_game():
    real, fake = random(50), random(50, seed=1)
    torch.testing.assert_close(Minimax().generator(fake), -(Minimax().discriminator(real, fake) - F.softplus(-real)))
