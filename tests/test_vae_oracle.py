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
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from src.core.batch import Batch
from src.core.rng import Noise, SampleNoise, StreamNoise
from src.models.vae import VAE, ConditionalGaussianPrior, StandardNormalPrior
from src.objectives.likelihoods import Gaussian, GaussianLearnedScale
from src.objectives.variational import reparameterize
from tests.examples import vector_spec

pytestmark = pytest.mark.usefixtures("float64", "same_weights")

DATA_DIM, LATENT_DIM, NUM_CLASSES, SIGMA = 5, 2, 3, 0.7


class LinearEncoder(nn.Module):
    """q(z | x, c) = N(A x + a_c, diag(exp(l_c))): a row of `a` and `l` for each class, one row without classes."""

    def __init__(self, in_shape: tuple[int], out_shape: tuple[int, int], condition_dim: int) -> None:
        super().__init__()
        rows = max(1, condition_dim)
        self.A = nn.Parameter(0.1 * torch.randn(rows, out_shape[1], *in_shape))
        self.a = nn.Parameter(torch.zeros(rows, out_shape[1]))
        self.log_var = nn.Parameter(torch.zeros(rows, out_shape[1]))

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        row = torch.zeros(len(x), dtype=torch.int64) if condition is None else condition.argmax(1)
        mu = (self.A[row] @ x[:, :, None]).squeeze(2) + self.a[row]
        return torch.stack([mu, self.log_var[row]], dim=1)


class LinearDecoder(nn.Module):
    """The mean W z + b of x, whatever the class."""

    def __init__(self, in_shape: tuple[int], out_shape: tuple[int], condition_dim: int) -> None:
        super().__init__()
        self.W = nn.Parameter(0.1 * torch.randn(*out_shape, *in_shape))
        self.b = nn.Parameter(torch.zeros(out_shape))

    def forward(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return z @ self.W.T + self.b


class CubatureNoise(Noise):
    """In place of N(0, I) its 2D cubature points +-sqrt(D) e_i: their average is exact for polynomials of degree three.

    So is the average of log p(x | z) over them, and with it the ELBO: no Monte Carlo error is left.
    """

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        n, dim = shape
        directions = torch.cat([torch.eye(dim), -torch.eye(dim)]).to(like)
        return math.sqrt(dim) * directions.repeat(n // (2 * dim), 1)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        raise NotImplementedError


def exact_elbo(vae: VAE, x: Tensor, condition: Tensor | None = None) -> Tensor:
    """E_q [log p(x | z)] - KL, `(B,)`, by the model's own `log_prob_bound`."""
    times = 2 * LATENT_DIM
    repeated = None if condition is None else condition.repeat_interleave(times)
    with torch.no_grad():
        bounds = vae.log_prob_bound(x.repeat_interleave(times, 0), repeated, generator=CubatureNoise())
    return bounds.unflatten(0, (-1, times)).mean(1)


def orthogonal_columns() -> Tensor:
    return torch.linalg.qr(torch.randn(DATA_DIM, LATENT_DIM))[0] * torch.tensor([2.0, 0.8])


@torch.no_grad()
def linear_vae(conditional: bool = False, sample_pixels: bool = False) -> VAE:
    """A VAE with random W, b and prior, whose q is the exact posterior."""
    vae = VAE(
        spec=vector_spec(DATA_DIM, NUM_CLASSES),
        encoder=LinearEncoder,
        decoder=LinearDecoder,
        likelihood=partial(Gaussian, scale=SIGMA),
        prior=ConditionalGaussianPrior if conditional else StandardNormalPrior,
        latent_dim=LATENT_DIM,
        conditional=conditional,
        sample_pixels=sample_pixels,
    )
    vae.decoder.W.copy_(orthogonal_columns())
    vae.decoder.b.normal_()
    if conditional:
        vae.prior.mu.normal_()
        vae.prior.log_var.normal_()
    m, log_s = prior_rows(vae)
    W, b = vae.decoder.W, vae.decoder.b
    precision = (-log_s).exp() + W.square().sum(0) / SIGMA**2
    vae.encoder.A.copy_(W.T / SIGMA**2 / precision[:, :, None])
    vae.encoder.a.copy_((m * (-log_s).exp() - W.T @ b / SIGMA**2) / precision)
    vae.encoder.log_var.copy_(-precision.log())
    return vae


def prior_rows(vae: VAE) -> tuple[Tensor, Tensor]:
    """Mean and log variance of p(z | c), a row for each class, one row without classes."""
    if vae.is_conditional:
        return vae.prior.mu, vae.prior.log_var
    return torch.zeros(1, LATENT_DIM), torch.zeros(1, LATENT_DIM)


@torch.no_grad()
def marginal(vae: VAE, row: int = 0) -> MultivariateNormal:
    """p(x | c), exactly."""
    m, log_s = (rows[row] for rows in prior_rows(vae))
    W = vae.decoder.W
    covariance = W * log_s.exp() @ W.T + SIGMA**2 * torch.eye(DATA_DIM)
    return MultivariateNormal(W @ m + vae.decoder.b, covariance)


@torch.no_grad()
def exact_posterior(vae: VAE, x: Tensor) -> MultivariateNormal:
    """p(z | x) of the unconditional model, for a batch of x."""
    W, b = vae.decoder.W, vae.decoder.b
    precision = torch.eye(LATENT_DIM) + W.T @ W / SIGMA**2
    mean = torch.linalg.solve(precision, W.T @ (x - b).T / SIGMA**2).T
    return MultivariateNormal(mean, precision_matrix=precision.expand(len(x), -1, -1))


@torch.no_grad()
def spoil_posterior(vae: VAE) -> None:
    """Make q another Gaussian: shifted, and half as wide again."""
    vae.encoder.a.add_(0.3)
    vae.encoder.log_var.add_(2 * math.log(1.5))


def test_elbo_of_the_exact_posterior_is_the_exact_log_likelihood():
    vae = linear_vae()
    x = 2 * torch.randn(20, DATA_DIM)
    torch.testing.assert_close(exact_elbo(vae, x), marginal(vae).log_prob(x), rtol=0, atol=1e-10)


def test_gap_of_any_other_posterior_is_its_divergence_from_the_exact_one():
    vae = linear_vae()
    spoil_posterior(vae)
    with torch.no_grad():
        vae.decoder.W.normal_()  # columns no longer orthogonal: no diagonal q can be exact
    x = 2 * torch.randn(20, DATA_DIM)
    with torch.no_grad():
        mu, log_var = vae.posterior(x)
    q = MultivariateNormal(mu, torch.diag_embed(log_var.exp()))
    gap = marginal(vae).log_prob(x) - exact_elbo(vae, x)
    assert (gap > 0).all()
    torch.testing.assert_close(gap, kl_divergence(q, exact_posterior(vae, x)), rtol=0, atol=1e-10)


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


def test_importance_weighted_bounds_climb_from_the_elbo_to_the_log_likelihood():
    vae = linear_vae()
    spoil_posterior(vae)
    x = marginal(vae).sample((50,))
    log_w = log_weights(vae, x, num_draws=10_000)
    ladder = {k: torch.logsumexp(log_w.unflatten(0, (-1, k)), 1) - math.log(k) for k in (1, 5, 50)}
    bounds = {k: float(estimates.mean()) for k, estimates in ladder.items()}
    error = {k: 4 * float(estimates.mean(1).std()) / math.sqrt(len(estimates)) for k, estimates in ladder.items()}
    elbo, exact = float(exact_elbo(vae, x).mean()), float(marginal(vae).log_prob(x).mean())
    assert bounds[1] == pytest.approx(elbo, abs=error[1])
    assert elbo + error[5] < bounds[5]
    assert bounds[5] + error[50] < bounds[50] < exact + error[50]
    assert exact - bounds[50] < 0.1 * (exact - elbo)


def test_importance_weights_of_the_exact_posterior_are_all_the_likelihood():
    vae = linear_vae()
    x = 2 * torch.randn(6, DATA_DIM)
    log_w = log_weights(vae, x, num_draws=30)
    torch.testing.assert_close(log_w, marginal(vae).log_prob(x).expand(30, 6), rtol=0, atol=1e-10)


def test_conditional_elbo_of_the_exact_posterior_is_the_exact_conditional_likelihood():
    vae = linear_vae(conditional=True)
    x, condition = 2 * torch.randn(30, DATA_DIM), torch.arange(30) % NUM_CLASSES
    expected = torch.stack([marginal(vae, int(c)).log_prob(x_i) for x_i, c in zip(x, condition, strict=True)])
    torch.testing.assert_close(exact_elbo(vae, x, condition), expected, rtol=0, atol=1e-10)


def test_bound_falls_when_the_classes_are_mixed_up():
    vae = linear_vae(conditional=True)
    condition = torch.arange(300) % NUM_CLASSES
    x = torch.cat([marginal(vae, int(c)).sample((1,)) for c in condition])
    assert exact_elbo(vae, x, condition.roll(1)).mean() < exact_elbo(vae, x, condition).mean() - 1


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
