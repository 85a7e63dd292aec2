"""Oracles of the variational family: linear-Gaussian VAEs, where everything is known, and a codebook that counts.

    z ~ N(m_c, S_c),  x = W z + b + sigma e   =>   x | c ~ N(W m_c + b, W S_c W^T + sigma^2 I)

W has orthogonal columns, so the exact posterior is diagonal and the VAE's own q can equal it. Without classes m = 0, S = I.

References:
    Tipping, Bishop 1999, "Probabilistic principal component analysis", J. R. Statist. Soc. B 61.
    Lucas, Tucker, Grosse, Norouzi 2019, "Don't blame the ELBO!", arXiv:1911.02469: the linear VAE reaches it.
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519, theorem 1: the ladder.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from src.core.batch import Batch
from src.core.rng import Noise, SampleNoise, StreamNoise
from src.core.spec import CONTINUOUS, DataSpec, Values
from src.evaluation.oracle import Oracle
from src.metrics.codebook import perplexity
from src.models.iwae import IWAE
from src.models.vae import VAE, ConditionalGaussianPrior, StandardNormalPrior
from src.objectives.likelihoods import Gaussian
from src.objectives.quantization import Codebook, straight_through
from src.objectives.variational import importance_weighted_bound

__all__ = [
    "CHECKS",
    "DATA_DIM",
    "LATENT_DIM",
    "NUM_CLASSES",
    "SIGMA",
    "CubatureNoise",
    "LinearDecoder",
    "LinearEncoder",
    "exact_elbo",
    "exact_posterior",
    "linear_vae",
    "marginal",
    "prior_rows",
    "spoil_posterior",
]

DATA_DIM, LATENT_DIM, NUM_CLASSES, SIGMA = 5, 2, 3, 0.7
_ERRORS = 4  # standard errors that a mean of random values may be off

Oracles = Iterator[Oracle]


# --- the linear VAE --------------------------------------------------------------------------------------------------


class LinearEncoder(nn.Module):
    """q(z | x, c) = N(A x + a_c, diag(exp(l_c))): a row of `a` and `l` for each class, one row without classes."""

    def __init__(self, in_shape: tuple[int], out_shape: tuple[int, int], condition_dim: int) -> None:
        super().__init__()
        rows = max(1, condition_dim)
        self.A = nn.Parameter(0.1 * _normal(rows, out_shape[1], *in_shape, seed=1))
        self.a = nn.Parameter(torch.zeros(rows, out_shape[1], dtype=torch.float64))
        self.log_var = nn.Parameter(torch.zeros(rows, out_shape[1], dtype=torch.float64))

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        row = torch.zeros(len(x), dtype=torch.int64) if condition is None else condition.argmax(1)
        mu = (self.A[row] @ x[:, :, None]).squeeze(2) + self.a[row]
        return torch.stack([mu, self.log_var[row]], dim=1)


class LinearDecoder(nn.Module):
    """The mean W z + b of x, whatever the class."""

    def __init__(self, in_shape: tuple[int], out_shape: tuple[int], condition_dim: int) -> None:
        super().__init__()
        self.W = nn.Parameter(0.1 * _normal(*out_shape, *in_shape, seed=2))
        self.b = nn.Parameter(torch.zeros(out_shape, dtype=torch.float64))

    def forward(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return z @ self.W.T + self.b


class CubatureNoise(Noise):
    """In place of N(0, I) its 2D cubature points +-sqrt(D) e_i: their average is exact for polynomials of degree three.

    So is the average of log p(x | z) over them, and with it the ELBO: no Monte Carlo error is left.
    """

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        n, dim = shape[0], shape[-1]
        directions = torch.cat([torch.eye(dim), -torch.eye(dim)]).to(like)
        return (math.sqrt(dim) * directions.repeat(n // (2 * dim), 1)).reshape(shape)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        raise NotImplementedError


def exact_elbo(vae: VAE, x: Tensor, condition: Tensor | None = None) -> Tensor:
    """E_q [log p(x | z)] - KL, `(B,)`, by the model's own `log_prob_bound`."""
    times = 2 * LATENT_DIM
    repeated = None if condition is None else condition.repeat_interleave(times)
    with torch.no_grad():
        bounds = vae.log_prob_bound(x.repeat_interleave(times, 0), repeated, generator=CubatureNoise())
    return bounds.unflatten(0, (-1, times)).mean(1)


@torch.no_grad()
def linear_vae(conditional: bool = False, sample_pixels: bool = False, make: Callable[..., VAE] = VAE, **keys: Any) -> VAE:
    """A VAE of float64 with orthogonal W, random b and prior, whose q is the exact posterior."""
    unbounded = Values(CONTINUOUS, low=-math.inf, high=math.inf, levels=None)
    vae = make(
        spec=DataSpec("linear", "vector", (DATA_DIM,), unbounded, tuple("abc")),
        encoder=LinearEncoder,
        decoder=LinearDecoder,
        likelihood=partial(Gaussian, scale=SIGMA),
        prior=ConditionalGaussianPrior if conditional else StandardNormalPrior,
        latent_dim=LATENT_DIM,
        conditional=conditional,
        sample_pixels=sample_pixels,
        **keys,
    ).double()
    vae.likelihood.log_scale.fill_(math.log(SIGMA))  # in all digits
    columns = torch.linalg.qr(_normal(DATA_DIM, LATENT_DIM, seed=3))[0]
    vae.decoder.W.copy_(columns * torch.tensor([2.0, 0.8]))
    vae.decoder.b.copy_(_normal(DATA_DIM, seed=4))
    if conditional:
        vae.prior.mu.copy_(_normal(NUM_CLASSES, LATENT_DIM, seed=5))
        vae.prior.log_var.copy_(_normal(NUM_CLASSES, LATENT_DIM, seed=6))
    m, log_s = prior_rows(vae)
    W, b = vae.decoder.W, vae.decoder.b  # noqa: N806 - as in the formulas
    precision = (-log_s).exp() + W.square().sum(0) / SIGMA**2
    vae.encoder.A.copy_(W.T / SIGMA**2 / precision[:, :, None])
    vae.encoder.a.copy_((m * (-log_s).exp() - W.T @ b / SIGMA**2) / precision)
    vae.encoder.log_var.copy_(-precision.log())
    return vae


def prior_rows(vae: VAE) -> tuple[Tensor, Tensor]:
    """Mean and log variance of p(z | c), a row for each class, one row without classes."""
    if isinstance(vae.prior, ConditionalGaussianPrior):
        return vae.prior.mu, vae.prior.log_var
    return torch.zeros(1, LATENT_DIM, dtype=torch.float64), torch.zeros(1, LATENT_DIM, dtype=torch.float64)


@torch.no_grad()
def marginal(vae: VAE, row: int = 0) -> MultivariateNormal:
    """p(x | c), exactly."""
    m, log_s = (rows[row] for rows in prior_rows(vae))
    W = vae.decoder.W  # noqa: N806
    covariance = W * log_s.exp() @ W.T + SIGMA**2 * torch.eye(DATA_DIM, dtype=torch.float64)
    return MultivariateNormal(W @ m + vae.decoder.b, covariance)


@torch.no_grad()
def exact_posterior(vae: VAE, x: Tensor) -> MultivariateNormal:
    """p(z | x) of the unconditional model, for a batch of x."""
    W, b = vae.decoder.W, vae.decoder.b  # noqa: N806
    precision = torch.eye(LATENT_DIM, dtype=torch.float64) + W.T @ W / SIGMA**2
    mean = torch.linalg.solve(precision, W.T @ (x - b).T / SIGMA**2).T
    return MultivariateNormal(mean, precision_matrix=precision.expand(len(x), -1, -1))


@torch.no_grad()
def spoil_posterior(vae: VAE) -> None:
    """Make q another Gaussian: shifted, and half as wide again."""
    vae.encoder.a.add_(0.3)
    vae.encoder.log_var.add_(2 * math.log(1.5))


def drawn(vae: VAE, n: int, row: int = 0, seed: int = 7) -> Tensor:
    """n draws of p(x | c)."""
    exact = marginal(vae, row)
    return exact.mean + _normal(n, DATA_DIM, seed=seed) @ exact.scale_tril.T


# --- bounds ----------------------------------------------------------------------------------------------------------


def elbo_of_a_linear_vae() -> Oracles:
    """With the exact posterior the ELBO is log p(x); with any other q it lies below by KL(q || p(z | x))."""
    vae, x = linear_vae(), 2 * _normal(20, DATA_DIM, seed=8)
    off = (exact_elbo(vae, x) - marginal(vae).log_prob(x)).abs().max()
    yield Oracle("ELBO of the exact posterior less log p", 0.0, float(off), 1e-10)
    spoil_posterior(vae)
    with torch.no_grad():
        vae.decoder.W.copy_(_normal(DATA_DIM, LATENT_DIM, seed=9))  # no diagonal q is exact now
        mu, log_var = vae.posterior(x)
    q = MultivariateNormal(mu, torch.diag_embed(log_var.exp()))
    gap = float((marginal(vae).log_prob(x) - exact_elbo(vae, x)).mean())
    yield Oracle("gap of another posterior, its KL", float(kl_divergence(q, exact_posterior(vae, x)).mean()), gap, 1e-10)


def importance_weights_of_a_linear_vae() -> Oracles:
    """Those of the exact posterior are all p(x); with any other q, L_k climbs from the ELBO to log p(x)."""
    vae, x = linear_vae(), 2 * _normal(20, DATA_DIM, seed=8)
    exact = marginal(vae).log_prob(x)
    with torch.no_grad():
        weights = vae.importance_log_weights(x, num_samples=30, generator=SampleNoise(0))
    yield Oracle("log weights of the exact posterior less log p", 0.0, float((weights - exact[:, None]).abs().max()), 1e-10)
    spoil_posterior(vae)
    x = drawn(vae, 50)
    with torch.no_grad():
        weights = vae.importance_log_weights(x, num_samples=10_000, generator=SampleNoise(0))
    ladder = {k: importance_weighted_bound(weights.reshape(-1, k)).reshape(len(x), -1).mean(0) for k in (1, 5, 50, 500)}
    bounds = {k: float(estimates.mean()) for k, estimates in ladder.items()}
    error = {k: _ERRORS * float(estimates.std()) / math.sqrt(len(estimates)) for k, estimates in ladder.items()}
    elbo, exact = float(exact_elbo(vae, x).mean()), float(marginal(vae).log_prob(x).mean())
    yield Oracle("L_1, the ELBO", elbo, bounds[1], error[1])
    climbs = all(bounds[low] + error[high] < bounds[high] for low, high in ((1, 5), (5, 50)))
    yield Oracle("ELBO < L_5 < L_50 < log p", "yes", _yes(climbs and bounds[50] < exact + error[50]))
    yield Oracle("L_500, nearly log p", exact, bounds[500], error[500] + 0.01 * (exact - elbo))


def gradient_of_an_iwae() -> Oracles:
    """At k = 1 it is that of the VAE; at any k that of the surrogate sum_i s_i log w_i with constant shares s_i of the
    weights, whose value is never below L_k: not to be shown as a bound."""
    x = drawn(linear_vae(), 6).repeat_interleave(2 * LATENT_DIM, 0)
    found = []
    for make in (VAE, partial(IWAE, num_importance_samples=1)):
        vae = linear_vae(make=make)
        spoil_posterior(vae)
        found.append(_gradient(vae, Batch(x), CubatureNoise()))
    yield Oracle("gradient of IWAE, k = 1, less VAE's", 0.0, float((found[0] - found[1]).abs().max()), 1e-10)

    iwae, x = linear_vae(make=partial(IWAE, num_importance_samples=5)), drawn(linear_vae(), 6)
    spoil_posterior(iwae)
    found = [_gradient(iwae, Batch(x), SampleNoise(1))]
    log_weights = iwae.importance_log_weights(x, num_samples=5, generator=SampleNoise(1))
    surrogate = (log_weights.softmax(1).detach() * log_weights).sum(1)
    iwae.zero_grad()
    (-surrogate.mean()).backward()
    found.append(_flat_gradient(iwae))
    yield Oracle("gradient of -L_5 less its surrogate's", 0.0, float((found[0] - found[1]).abs().max()), 1e-10)
    bound = importance_weighted_bound(log_weights)
    in_order = (surrogate >= bound).all() and (bound >= log_weights.mean(1)).all()
    yield Oracle("surrogate >= L_5 >= L_1 of the same draws", "yes", _yes(bool(in_order)))


def gradient_without_the_score() -> Oracles:
    """The doubly reparameterized gradient has the mean of the other one, here over 20,000 examples; its values are those
    of L_k."""
    x = drawn(linear_vae(), 1).repeat(20_000, 1)
    found, values = [], []
    for is_double in (False, True):
        iwae = linear_vae(make=partial(IWAE, num_importance_samples=5, doubly_reparameterized=is_double))
        spoil_posterior(iwae)
        parts = enumerate(x.split(200))
        found.append(torch.stack([_gradient(iwae, Batch(part), SampleNoise(1, 200 * i)) for i, part in parts]))
        values.append(float(iwae.loss(Batch(x[:50]), generator=SampleNoise(2))["loss"].detach().mean()))
    means = [per_part.mean(0) for per_part in found]
    error = torch.stack([per_part.var(0) / len(per_part) for per_part in found]).sum(0).sqrt()
    furthest = float(((means[0] - means[1]).abs() / error.clamp(min=1e-12)).max())
    yield Oracle("DReG's mean gradient less IWAE's, in errors", 0.0, furthest, _ERRORS)
    yield Oracle("DReG's loss, -L_5", values[0], values[1], 1e-12)
    noises = [float(per_part.var(0)[: _encoder_size(iwae)].sum()) for per_part in found]
    yield Oracle("DReG's encoder gradient has less variance", "yes", _yes(noises[1] < noises[0]))


def _gradient(vae: VAE, batch: Batch, noise: Noise) -> Tensor:
    vae.zero_grad()
    vae.loss(batch, generator=noise)["loss"].mean().backward()
    return _flat_gradient(vae)


def _flat_gradient(vae: VAE) -> Tensor:
    parameters = (*vae.encoder.parameters(), *vae.decoder.parameters())
    return torch.cat([_given(parameter.grad).flatten() for parameter in parameters])


def _encoder_size(vae: VAE) -> int:
    return sum(parameter.numel() for parameter in vae.encoder.parameters())


def _given(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


# --- the conditional VAE ---------------------------------------------------------------------------------------------


def conditional_vae() -> Oracles:
    """log p(x | c) is known of the linear one; where q and prior are tied the KL is zero; wrong classes lower the bound."""
    vae = linear_vae(conditional=True)
    condition = torch.arange(300) % NUM_CLASSES
    x = torch.cat([drawn(vae, 1, int(c), seed=10 + i) for i, c in enumerate(condition)])
    exact = torch.stack([marginal(vae, int(c)).log_prob(one) for one, c in zip(x, condition, strict=True)])
    bound = exact_elbo(vae, x, condition)
    yield Oracle("ELBO of x given c, less log p(x | c)", 0.0, float((bound - exact).abs().max()), 1e-10)
    mixed = exact_elbo(vae, x, condition.roll(1)).mean() < bound.mean() - 1
    yield Oracle("classes mixed up cost more than a nat", "yes", _yes(bool(mixed)))
    with torch.no_grad():
        vae.encoder.A.zero_()
        m, log_s = prior_rows(vae)
        vae.encoder.a.copy_(m)
        vae.encoder.log_var.copy_(log_s)
        terms = vae.loss(Batch(x, condition), generator=SampleNoise(0))
    yield Oracle("KL with q and prior tied", 0.0, float(terms["kl"].abs().max()))


# --- vector quantization ---------------------------------------------------------------------------------------------


def codebook_usage() -> Oracles:
    """Perplexity 1 where one code is used, K where K balanced clusters have one each."""
    num_codes = 8
    centres = 10 * _normal(num_codes, 3, seed=11)
    codebook = _codebook(centres)
    clusters = centres.repeat_interleave(25, 0) + 0.01 * _normal(25 * num_codes, 3, seed=12)
    for name, z, expected in (("one code", clusters[:25], 1.0), ("8 balanced clusters", clusters, 8.0)):
        counts = torch.bincount(codebook.indices(z), minlength=num_codes)
        yield Oracle(f"perplexity of {name}", expected, perplexity(counts), 1e-12)


def codebook_learning() -> Oracles:
    """At a fixed assignment the moving averages end at the centroids of k-means; the gradient passes straight through."""
    codebook = _codebook(_normal(4, 2, seed=14))
    z, indices = _normal(60, 2, seed=13), torch.arange(60) % 4
    for _ in range(400):
        codebook.learn(z, indices, StreamNoise(0))
    centroids = torch.stack([z[indices == k].mean(0) for k in range(4)])
    yield Oracle("codes less centroids of k-means", 0.0, float((codebook.vectors - centroids).abs().max()), 1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda some: straight_through(some, centroids[0]), z[0])
    off = float((jacobian - torch.eye(2, dtype=torch.float64)).abs().max())
    yield Oracle("d out / d z of straight-through, less I", 0.0, off)
    off = float((straight_through(z[0], centroids[0]) - centroids[0]).abs().max())
    yield Oracle("value of straight-through, less the code", 0.0, off, 1e-15)


def _codebook(vectors: Tensor) -> Codebook:
    """One of float64 that begins at these codes."""
    with torch.random.fork_rng():  # its first codes, replaced at once, come from the global generator
        codebook = Codebook(len(vectors), vectors.shape[1], decay=0.9, revive_below=0.0).double()
    codebook.start_at(vectors)
    return codebook


CHECKS: tuple[Callable[[], Oracles], ...] = (
    elbo_of_a_linear_vae,
    importance_weights_of_a_linear_vae,
    gradient_of_an_iwae,
    gradient_without_the_score,
    conditional_vae,
    codebook_usage,
    codebook_learning,
)


def _normal(*shape: int, seed: int) -> Tensor:
    """Independent N(0, 1) values of float64."""
    return SampleNoise(seed).normal((1, *shape), torch.zeros((), dtype=torch.float64))[0]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
