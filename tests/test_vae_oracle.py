"""The VAE where everything is known: a linear decoder with Gaussian noise, that is probabilistic principal components.

    z ~ N(m_c, S_c),  x = W z + b + sigma e   =>   x | c ~ N(W m_c + b, W S_c W^T + sigma^2 I)

W has orthogonal columns, so the exact posterior is diagonal and the VAE's own q can equal it. Without classes m = 0, S = I.

References:
    Tipping, Bishop 1999, "Probabilistic principal component analysis", J. R. Statist. Soc. B 61.
    Lucas, Tucker, Grosse, Norouzi 2019, "Don't blame the ELBO!", arXiv:1911.02469: the linear VAE reaches it.
"""

import math
from functools import partial

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import Independent, Normal

from src.core.batch import Batch
from src.core.rng import SampleNoise, StreamNoise
from src.evaluation.variational_oracles import (
    CHECKS,
    DATA_DIM,
    LATENT_DIM,
    NUM_CLASSES,
    LinearDecoder,
    LinearEncoder,
    exact_elbo,
    linear_vae,
    marginal,
    spoil_posterior,
)
from src.models.vae import VAE, StandardNormalPrior
from src.objectives.likelihoods import GaussianLearnedScale
from src.objectives.variational import reparameterize
from tests.examples import vector_spec

pytestmark = pytest.mark.usefixtures("float64", "same_weights")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_quantity_of_the_variational_family_has_its_known_value(check):
    before = torch.get_rng_state()
    found = list(check())
    assert found
    assert [oracle for oracle in found if not oracle.holds] == []
    assert torch.equal(before, torch.get_rng_state())


def test_bound_with_one_draw_is_unbiased_for_the_elbo():
    vae = linear_vae()
    spoil_posterior(vae)
    x = 2 * torch.randn(4, DATA_DIM)
    with torch.no_grad():
        draws = vae.log_prob_bound(x.repeat(5000, 1), generator=SampleNoise(0)).unflatten(0, (-1, 4))
    assert ((draws.mean(0) - exact_elbo(vae, x)).abs() < 4 * draws.std(0) / math.sqrt(5000)).all()


@torch.no_grad()
def log_weights(vae: VAE, x: Tensor, num_draws: int) -> Tensor:
    """log p(x, z) / q(z | x) at draws z ~ q, `(num_draws, B)`, from the model's parts."""
    many = x.repeat(num_draws, 1)
    mu, log_var = vae.posterior(many)
    z = reparameterize(mu, log_var, SampleNoise(0))
    q, p = (Independent(Normal(m, (v / 2).exp()), 1) for m, v in [(mu, log_var), vae.prior(len(many), None, like=mu)])
    log_w = vae.likelihood.log_prob(many, vae.decoder(z, None)) + p.log_prob(z) - q.log_prob(z)
    return log_w.unflatten(0, (num_draws, len(x)))


def test_importance_weights_are_those_of_the_models_parts_however_many_are_drawn_at_a_time():
    vae, x = linear_vae(), 2 * torch.randn(3, DATA_DIM)
    spoil_posterior(vae)
    with torch.no_grad():
        found = vae.importance_log_weights(x, num_samples=120, generator=SampleNoise(0))
        alone = [vae.importance_log_weights(x[i : i + 1], num_samples=120, generator=SampleNoise(0, i)) for i in range(3)]
        first = vae.importance_log_weights(x, num_samples=50, generator=SampleNoise(0))
    assert found.shape == (3, 120)
    torch.testing.assert_close(torch.cat(alone), found)
    torch.testing.assert_close(found[:, :50], first)
    expected = log_weights(vae, x, num_draws=20_000)
    gap = (found.mean(1) - expected.mean(0)).abs()
    assert (gap < 4.5 * expected.std(0) / math.sqrt(120)).all()


def test_kl_is_zero_where_posterior_and_prior_are_tied():
    vae = linear_vae(conditional=True)
    with torch.no_grad():
        vae.encoder.A.zero_()
        vae.encoder.a.copy_(vae.prior.mu)
        vae.encoder.log_var.copy_(vae.prior.log_var)
    batch = Batch(torch.randn(30, DATA_DIM), torch.arange(30) % NUM_CLASSES)
    terms = vae.loss(batch, generator=SampleNoise(0))
    assert torch.equal(terms["kl"], torch.zeros(30))
    torch.testing.assert_close(terms["loss"], terms["reconstruction"])


@pytest.mark.parametrize("conditional", [False, True])
def test_samples_with_drawn_pixels_have_the_exact_mean_and_covariance(conditional):
    vae = linear_vae(conditional, sample_pixels=True)
    n, row = 20_000, 1 if conditional else 0
    with torch.no_grad():
        x = vae.sample(n, torch.full((n,), row) if conditional else None, generator=SampleNoise(0))
    exact = marginal(vae, row)
    whitened = torch.linalg.solve_triangular(exact.scale_tril, (x - exact.mean).T, upper=False).T
    assert whitened.mean(0).abs().max() < 4.5 / math.sqrt(n)
    assert (whitened.T.cov() - torch.eye(DATA_DIM)).abs().max() < 4.5 * math.sqrt(2 / n)


def test_trained_linear_vae_reaches_the_maximum_likelihood_of_principal_components():
    x = marginal(linear_vae()).sample((400,))
    vae = VAE(
        spec=vector_spec(DATA_DIM),
        encoder=LinearEncoder,
        decoder=LinearDecoder,
        likelihood=partial(GaussianLearnedScale, initial_scale=1.0),
        prior=StandardNormalPrior,
        latent_dim=LATENT_DIM,
    )
    maximum = PCA(LATENT_DIM).fit(x).score(x)
    num_steps = 400
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    noise = StreamNoise(0)
    for step in range(num_steps):
        if step % 100 == 0:
            assert float(exact_elbo(vae, x).mean()) < maximum
        optimizer.zero_grad()
        vae.loss(Batch(x), generator=noise)["loss"].mean().backward()
        optimizer.step()
        schedule.step()
    assert maximum - 0.005 < float(exact_elbo(vae, x).mean()) < maximum + 1e-4
