"""Diffusion: what networks predict, noise levels, and the loss, against formulas of the papers."""

import math

import pytest
import torch
from torch import Tensor

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import CanDecode
from src.core.rng import SampleNoise
from src.objectives.diffusion import (
    EDM,
    Cosine,
    Epsilon,
    Linear,
    LogNormal,
    V,
    clean_of_epsilon,
    clean_of_v,
    epsilon_of_clean,
    v_of_clean,
)
from src.objectives.matching import matching_loss
from src.samplers.diffusion import DDIM
from src.samplers.ode import Adaptive, Heun
from tests.examples import vector_spec
from tests.stepwise import diffusion

EDM_NOISE = LogNormal(mean=-1.2, std=1.2, sigma_max=80.0, sigma_min=0.002, rho=7.0)
PREDICTIONS = [EDM(0.5), EDM(2.0), Epsilon(), V()]
NOISES = [EDM_NOISE, Linear(), Cosine()]
SIGMA = torch.tensor([0.01, 0.3, 1.0, 20.0], dtype=torch.float64)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros((), dtype=torch.float64))


# --- predictions -----------------------------------------------------------------------------------------------------


def test_epsilon_v_and_clean_are_of_one_draw():
    x0, z = normal(4, 3), normal(4, 3, seed=1)
    x = x0 + SIGMA * z
    alpha = 1 / (1 + SIGMA.square()).sqrt()
    beta = SIGMA * alpha
    torch.testing.assert_close(epsilon_of_clean(x, SIGMA, x0), z)
    torch.testing.assert_close(v_of_clean(x, SIGMA, x0), alpha * z - beta * x0)
    torch.testing.assert_close(clean_of_epsilon(x, SIGMA, z), x0)
    torch.testing.assert_close(clean_of_v(x, SIGMA, alpha * z - beta * x0), x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_network_that_hits_its_target_denoises(prediction):
    x0 = normal(4, 3)
    x = x0 + SIGMA * normal(4, 3, seed=1)
    c = prediction.coefficients(SIGMA)
    torch.testing.assert_close(c.skip * x + c.out * prediction.target(x, SIGMA, x0), x0)


def test_targets_of_epsilon_and_v_prediction_are_epsilon_and_v():
    x0 = normal(4, 3)
    x = x0 + SIGMA * normal(4, 3, seed=1)
    torch.testing.assert_close(Epsilon().target(x, SIGMA, x0), epsilon_of_clean(x, SIGMA, x0))
    torch.testing.assert_close(V().target(x, SIGMA, x0), v_of_clean(x, SIGMA, x0))


def test_coefficients_of_edm_are_those_of_its_table_1():
    sigma_data, c = 0.5, EDM(0.5).coefficients(SIGMA)
    root = (SIGMA.square() + sigma_data**2).sqrt()
    torch.testing.assert_close(c.skip, sigma_data**2 / (SIGMA.square() + sigma_data**2))
    torch.testing.assert_close(c.out, SIGMA * sigma_data / root)
    torch.testing.assert_close(c.scale, 1 / root)
    torch.testing.assert_close(c.noise, SIGMA.log() / 4)


def test_loss_is_edms_weighted_denoising_error():
    sigma_data, prediction = 0.5, EDM(0.5)
    x0, answer = sigma_data * normal(4, 3), normal(4, 3, seed=2)
    x = x0 + SIGMA * normal(4, 3, seed=1)
    c = prediction.coefficients(SIGMA)
    weight = ((SIGMA.square() + sigma_data**2) / (SIGMA * sigma_data).square())[:, 0]
    denoised = c.skip * x + c.out * answer
    expected = weight * (denoised - x0).square().mean(1)
    torch.testing.assert_close(matching_loss(answer, prediction.target(x, SIGMA, x0)).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_network_sees_inputs_of_variance_1_and_is_asked_for_answers_of_variance_1(prediction):
    x0 = prediction.sigma_data * normal(20_000, 1)
    for sigma in SIGMA:
        x = x0 + sigma * normal(20_000, 1, seed=1)
        assert float((prediction.coefficients(sigma).scale * x).var()) == pytest.approx(1, abs=0.05)
        assert float(prediction.target(x, sigma, x0).var()) == pytest.approx(1, abs=0.05)


# --- noise levels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
def test_levels_fall_and_draws_grow(noise):
    levels = [noise.level(k / 20) for k in range(21)]
    assert all(a > b > 0 for a, b in zip(levels[:-1], levels[1:], strict=True))
    assert math.isfinite(levels[0])
    drawn = noise.draw(torch.linspace(1e-6, 1 - 1e-6, 100))
    assert (drawn.diff() > 0).all()
    assert drawn.isfinite().all()
    assert drawn.dtype == torch.float32


def test_log_normal_levels_are_those_of_karras():
    u = SampleNoise(0).uniform((20_000,), torch.zeros(()))
    log_sigma = EDM_NOISE.draw(u).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=3 * 1.2 / math.sqrt(20_000))
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.03)
    num = 18  # equation 5
    for i in (0, 5, num - 1):
        expected = (80 ** (1 / 7) + i / (num - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert EDM_NOISE.level(i / (num - 1)) == pytest.approx(expected)


def test_linear_schedule_is_ddpms_within_its_step():
    """abar of the 1,000 betas from 1e-4 to 0.02, of which this is the continuous limit."""
    log_abar = torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumsum(0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(Linear().log_alpha_square(t), log_abar, rtol=0.02, atol=1e-4)


def test_cosine_schedule_is_that_of_its_paper():
    t = torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)

    def f(t: Tensor) -> Tensor:
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()

    torch.testing.assert_close(Cosine().log_alpha_square(t).exp(), f(t) / f(torch.zeros_like(t)))


@pytest.mark.parametrize("noise", [Linear(), Cosine()])
def test_share_of_signal_and_noise_add_up(noise):
    t = torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64)
    abar, sigma = noise.log_alpha_square(t).exp(), noise.at(t)
    torch.testing.assert_close(sigma, ((1 - abar) / abar).sqrt())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: EDM(0.0), r"prediction\.sigma_data=0"),
        (lambda: LogNormal(0, 1, sigma_max=1, sigma_min=2, rho=7), r"noise\.sigma_min=2 must be above 0"),
        (lambda: Linear(beta_min=0, beta_max=1), r"noise\.beta_min=0 must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda prediction: prediction.in_words)
def test_loss_of_a_network_of_zeros_is_1_on_standardized_gaussian_data(prediction):
    model = diffusion(vector_spec(4), prediction=prediction, noise=Linear())
    torch.nn.init.zeros_(model.network.head.weight)
    torch.nn.init.zeros_(model.network.head.bias)
    x = 7 + 3 * normal(4000, 4).float()
    model.prepare(lambda: [Batch(x)], generator=SampleNoise(0))
    losses = model.loss(Batch(x), generator=SampleNoise(1))["loss"].detach()
    assert float(losses.mean()) == pytest.approx(1, abs=3 * float(losses.std()) / math.sqrt(4000) + 1e-3)


def test_network_of_zeros_with_edm_is_the_exact_model_of_gaussian_data():
    """D = c_skip x is the best denoiser of N(mu, s^2): so samples and likelihood are those of the Gaussian."""
    model = diffusion(vector_spec(2), sampler=Heun(40), likelihood_solver=Adaptive(1e-6, 1e-6))
    torch.nn.init.zeros_(model.network.head.weight)
    torch.nn.init.zeros_(model.network.head.bias)
    model.shift.copy_(torch.tensor([3.0, -1.0]))
    model.scale.copy_(torch.tensor([4.0, 2.0]))  # times 0.5
    true = torch.distributions.Normal(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 1.0]))
    x = model.sample(20_000, generator=SampleNoise(0))
    torch.testing.assert_close(x.mean(0), true.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(x.std(0), true.stddev, rtol=0.02, atol=0)
    torch.testing.assert_close(model.log_prob(x[:50]), true.log_prob(x[:50]).sum(1), rtol=1e-3, atol=1e-3)


def test_samples_with_fresh_noise_are_no_function_of_z_and_depend_on_no_batch():
    model = diffusion(vector_spec(3), sampler=DDIM(5, 1.0))
    assert not isinstance(model, CanDecode)
    assert isinstance(diffusion(vector_spec(3), sampler=DDIM(5, 0.0)), CanDecode)
    together = model.sample(6, generator=SampleNoise(0))
    apart = [model.sample(2, generator=SampleNoise(0, i)) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-5, atol=1e-5)


def test_objective_says_what_is_predicted_and_at_which_levels():
    spec = vector_spec(2)
    models = [diffusion(spec, prediction=p, noise=n) for p in (EDM(), V(), Epsilon()) for n in (Linear(), Cosine())]
    assert len({model.objective for model in models}) == len(models)
