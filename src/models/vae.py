"""The variational autoencoder, plain, with any likelihood, and conditional.

    log p(x | c) >= ELBO = E_q(z|x,c) [log p(x | z, c)] - KL(q(z | x, c) || p(z | c))

A beta-VAE is `VAE(beta=4)`; a conditional VAE is one with `conditional=True` and a conditional prior: a YAML, no class.
Draws from q, weighed by p(x, z | c) / q(z | x, c), give tighter bounds and at last the likelihood itself.

References:
    Kingma, Welling 2014, "Auto-encoding variational Bayes", arXiv:1312.6114.
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519.
    Higgins et al. 2017, "beta-VAE", ICLR.
    Sohn, Lee, Yan 2015, "Learning structured output representation using deep conditional generative models", NeurIPS:
        the conditional prior.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.objectives.kl_weights import Constant, KLWeight
from src.objectives.likelihoods import Likelihood
from src.objectives.variational import gaussian_kl_per_dim, gaussian_log_prob, reparameterize

__all__ = [
    "VAE",
    "ConditionalGaussianPrior",
    "Prior",
    "StandardNormalPrior",
    "draws_in_parts",
    "draws_of",
    "log_density",
    "of_each_draw",
]

_DRAWS_AT_A_TIME = 50  # of z for each example, where many are drawn
_VALUES_AT_A_TIME = 2**21  # decoded in one call, where many are: as many as fit into a processor's cache


class Prior(nn.Module, ABC):
    """p(z | c) = N(mu(c), diag(exp(log_var(c)))).

    Args:
        latent_dim: dimensions D of z.
        num_classes: number of classes; 0 without labels.
    """

    is_conditional: ClassVar[bool]

    def __init__(self, latent_dim: int, num_classes: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self, n: int, condition: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log variance for n examples with their conditions `(n,)`, each `(n, D)`, on the device of `like`."""


class StandardNormalPrior(Prior):
    """p(z) = N(0, I), whatever the condition."""

    is_conditional = False

    def forward(self, n: int, condition: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        zeros = like.new_zeros(n, self.latent_dim)
        return zeros, zeros


class ConditionalGaussianPrior(Prior):
    """p(z | c) with a mean and a diagonal covariance learned for every class; starts at N(0, I)."""

    is_conditional = True

    def __init__(self, latent_dim: int, num_classes: int) -> None:
        super().__init__(latent_dim, num_classes)
        self.mu = nn.Parameter(torch.zeros(num_classes, latent_dim))
        self.log_var = nn.Parameter(torch.zeros(num_classes, latent_dim))

    def forward(self, n: int, condition: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        assert condition is not None
        return self.mu[condition], self.log_var[condition]


class VAE(nn.Module):
    """A variational autoencoder with a diagonal Gaussian posterior.

    Args:
        spec: the data.
        encoder: network from data to (mu, log variance), called as `encoder(in_shape=, out_shape=, condition_dim=)`.
        decoder: network from z to the parameters of the likelihood, called likewise.
        likelihood: p(x | z), called as `likelihood(spec=)`.
        prior: p(z | c), called as `prior(latent_dim=, num_classes=)`.
        latent_dim: dimensions of z.
        beta: weight of the KL in the training loss; reported bounds never contain it.
        conditional: give the class to encoder and decoder.
        sample_pixels: samples are draws of p(x | z), not its mean.
        kl_weight: what takes the place of the KL in the loss while the model is trained; None for the KL itself. In
            evaluation mode, so for held-out examples, it is always the KL.
    """

    def __init__(
        self,
        spec: DataSpec,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        likelihood: Callable[..., Likelihood],
        prior: Callable[..., Prior],
        latent_dim: int,
        beta: float = 1.0,
        conditional: bool = False,
        sample_pixels: bool = False,
        kl_weight: KLWeight | None = None,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector", "audio")
        require_at_least("model.latent_dim", latent_dim, 1)
        require_at_least("model.beta", beta, 0)
        if conditional:
            spec.require_classes()
        self.is_conditional = conditional
        self._spec = spec
        self._beta = beta
        self._kl_weight = kl_weight or Constant()
        self._examples_seen = 0
        self._sample_pixels = sample_pixels
        self.likelihood = likelihood(spec=spec)
        self.prior = prior(latent_dim=latent_dim, num_classes=spec.num_classes)
        if self.prior.is_conditional and not conditional:
            raise UserError(
                "a conditional prior needs a conditional VAE (set model.conditional=true, or prior=standard_normal)"
            )
        if not self.prior.is_conditional and not sample_pixels:
            self.latent_dim = latent_dim  # CanDecode: its samples are `decode(z)` of z ~ N(0, I)
        condition_dim = spec.num_classes if conditional else 0
        self.encoder = encoder(in_shape=spec.shape, out_shape=(2, latent_dim), condition_dim=condition_dim)
        parameters_shape = (spec.shape[0] * self.likelihood.num_parameters, *spec.shape[1:])
        self.decoder = decoder(in_shape=(latent_dim,), out_shape=parameters_shape, condition_dim=condition_dim)

    @property
    def objective(self) -> str:
        of = "of x given its class" if self.is_conditional else "of x"
        return f"{self._beta:g} KL - log p(x | z) by {self.likelihood.in_words}, {of}"

    def follow(self, examples_seen: int) -> None:
        self._examples_seen = examples_seen

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        reconstruction, kl_per_dim = self._bound_terms(batch.x, batch.condition, generator or fresh_noise())
        kl = kl_per_dim.sum(1)
        minimised_kl = self._kl_weight(kl_per_dim, self._examples_seen) if self.training else kl
        terms = {"loss": self._beta * minimised_kl - reconstruction, "reconstruction": -reconstruction, "kl": kl}
        if self.likelihood.is_normalised:
            terms["elbo"] = reconstruction - kl
        return terms

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """The ELBO, estimated with one z per example."""
        terms = self.log_prob_bound_terms(x, condition, generator=generator)
        return terms["reconstruction"] + terms["minus_kl"]

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """E_q [log p(x | z, c)], estimated with one z per example, and -KL(q || p)."""
        self.require_likelihood()
        reconstruction, kl_per_dim = self._bound_terms(x, condition, generator or fresh_noise())
        return {"reconstruction": reconstruction, "minus_kl": -kl_per_dim.sum(1)}

    def require_likelihood(self) -> None:
        """Raise `NotApplicable` if p(x | z) is no likelihood, so that there is none of x."""
        if not self.likelihood.is_normalised:
            raise NotApplicable(f"{type(self.likelihood).__name__} is a training loss, not a likelihood")

    def importance_log_weights(
        self, x: Tensor, condition: Tensor | None = None, *, num_samples: int, generator: Noise | None = None
    ) -> Tensor:
        """log p(x, z_i | c) - log q(z_i | x, c) of k draws z_i ~ q, `(B, k)` in nats, some of them at a time."""
        self.require_likelihood()
        generator = generator or fresh_noise()
        q, p = self.posterior(x, condition), self.prior(len(x), condition, like=x)
        parts = [
            self._log_likelihoods(x, condition, z) + log_density(z, *p) - log_density(z, *q)
            for z in draws_in_parts(*q, num_samples, generator)
        ]
        return torch.cat(parts, 1)

    def prior_log_likelihoods(
        self, x: Tensor, condition: Tensor | None = None, *, num_samples: int, generator: Noise | None = None
    ) -> Tensor:
        """log p(x | z_i, c) at k draws z_i ~ p(z | c), `(B, k)` in nats, some of them at a time."""
        self.require_likelihood()
        mu, log_var = self.prior(len(x), condition, like=x)
        parts = draws_in_parts(mu, log_var, num_samples, generator or fresh_noise())
        return torch.cat([self._log_likelihoods(x, condition, z) for z in parts], 1)

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x, c), each `(B, latent_dim)`."""
        mu, log_var = self.encoder(self.likelihood.natural(x), self._features(condition)).unbind(1)
        return mu, log_var

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.posterior(x, condition)[0]

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.likelihood.mean(self._likelihood_parameters(z, condition))

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x, condition), condition)

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """Draws z ~ p(z | c), then the mean of p(x | z, c), or a draw of it with `sample_pixels`."""
        generator = generator or fresh_noise()
        mu, log_var = self.prior(n, condition, like=next(self.parameters()))
        z = reparameterize(mu, log_var, generator)
        parameters = self._likelihood_parameters(z, condition)
        return self.likelihood.sample(parameters, generator) if self._sample_pixels else self.likelihood.mean(parameters)

    def _bound_terms(self, x: Tensor, condition: Tensor | None, generator: Noise) -> tuple[Tensor, Tensor]:
        """log p(x | z, c) at one z ~ q(z | x, c), `(B,)`, and KL(q || p) of every dimension, `(B, D)`, in nats."""
        mu, log_var = self.posterior(x, condition)
        z = reparameterize(mu, log_var, generator)
        kl_per_dim = gaussian_kl_per_dim(mu, log_var, *self.prior(len(x), condition, like=mu))
        return self.likelihood.log_prob(x, self._likelihood_parameters(z, condition)), kl_per_dim

    def _log_likelihoods(self, x: Tensor, condition: Tensor | None, z: Tensor) -> Tensor:
        """log p(x | z, c) of several z `(B, n, D)` for each example, `(B, n)`."""

        def of(row: Tensor, z: Tensor) -> Tensor:
            parameters = self._likelihood_parameters(z, None if condition is None else condition[row])
            return self.likelihood.log_prob(x[row], parameters)

        return of_each_draw(of, z, num_values=None if self.training else self._spec.num_dims)  # batch norm: all at once

    def _likelihood_parameters(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self.decoder(z, self._features(condition))

    def _features(self, condition: Tensor | None) -> Tensor | None:
        return self._spec.one_hot(condition) if self.is_conditional else None


def of_each_draw(of: Callable[[Tensor, Tensor], Tensor], z: Tensor, num_values: int | None) -> Tensor:
    """A quantity of several z `(B, n, D)` for each example, `(B, n)`, some of them at a time.

    Args:
        of: from the examples' places `(N,)` and their z `(N, D)` to `(N,)`.
        num_values: that one of them is decoded to; None for all at once.
    """
    batch_size, num_draws = z.shape[:2]
    rows = torch.arange(batch_size, device=z.device).repeat_interleave(num_draws)
    at_a_time = len(rows) if num_values is None else max(1, _VALUES_AT_A_TIME // num_values)
    pairs = zip(rows.split(at_a_time), z.flatten(0, 1).split(at_a_time), strict=True)
    return torch.cat([of(row, some) for row, some in pairs]).unflatten(0, (batch_size, num_draws))


def draws_in_parts(mu: Tensor, log_var: Tensor, num_draws: int, generator: Noise) -> Iterator[Tensor]:
    """n draws of each diagonal Gaussian `(B, D)`, `(B, some, D)` at a time."""
    for start in range(0, num_draws, _DRAWS_AT_A_TIME):
        yield draws_of(mu, log_var, min(_DRAWS_AT_A_TIME, num_draws - start), generator)


def draws_of(mu: Tensor, log_var: Tensor, num_draws: int, generator: Noise) -> Tensor:
    """n draws of each diagonal Gaussian `(B, D)`, `(B, n, D)`, differentiable."""
    mu, log_var = (parameter[:, None].expand(-1, num_draws, -1) for parameter in (mu, log_var))
    return reparameterize(mu, log_var, generator)


def log_density(z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """log N(z; mu, diag(exp(log_var))) of several z `(B, n, D)` for each Gaussian `(B, D)`, `(B, n)` in nats."""
    return gaussian_log_prob(z, mu[:, None], 0.5 * log_var[:, None]).sum(2)
