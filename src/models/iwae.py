"""The importance-weighted autoencoder: a VAE trained on a tighter bound than the ELBO.

    L_k = E_{z_1..z_k ~ q(z|x)} log 1/k sum_i w_i,   w_i = p(x, z_i) / q(z_i | x),   ELBO = L_1 <= L_k <= log p(x)

It is the training that differs; encoder, decoder, samples and the ELBO are those of a VAE. What is minimised is -L_k
itself, so the loss that is shown is a bound: no surrogate, whose value would look better than the model is.

References:
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519.
    Tucker, Lawson, Gu, Maddison 2018, "Doubly reparameterized gradient estimators for Monte Carlo objectives",
        arXiv:1810.04152.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.models.vae import VAE, Prior, draws_of, log_density
from src.objectives.likelihoods import Likelihood
from src.objectives.variational import gaussian_kl, importance_weighted_bound

__all__ = ["IWAE"]


class IWAE(VAE):
    """A VAE that minimises -L_k.

    `log_prob_bound` is the ELBO as with a VAE, so that it can stand in one column with that of others; L_k for any k is
    measured by metrics of `importance_log_weights`.

    Args:
        num_importance_samples: k, draws of z for each example in the loss.
        doubly_reparameterized: the encoder's gradient without the score of q, whose signal does not vanish among its noise
            as k grows (Tucker et al. 2018). Its expectation, and the value of the loss, are the same.
        The others: see `VAE`.
    """

    def __init__(
        self,
        spec: DataSpec,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        likelihood: Callable[..., Likelihood],
        prior: Callable[..., Prior],
        latent_dim: int,
        num_importance_samples: int,
        doubly_reparameterized: bool = False,
        conditional: bool = False,
        sample_pixels: bool = False,
    ) -> None:
        require_at_least("model.num_importance_samples", num_importance_samples, 1)
        super().__init__(
            spec, encoder, decoder, likelihood, prior, latent_dim, conditional=conditional, sample_pixels=sample_pixels
        )
        self._num_draws = num_importance_samples
        self._doubly_reparameterized = doubly_reparameterized

    @property
    def objective(self) -> str:
        of = "of x given its class" if self.is_conditional else "of x"
        return f"-L_{self._num_draws}, importance weighted, with p(x | z) by {self.likelihood.in_words}, {of}"

    def settings(self) -> dict[str, Any]:
        return {"trained_on": f"L_{self._num_draws}", "bound_is": "L_1 (ELBO)"}

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        x, condition = batch.x, batch.condition
        q, p = self.posterior(x, condition), self.prior(len(x), condition, like=x)
        z = draws_of(*q, self._num_draws, generator or fresh_noise())
        log_likelihoods = self._log_likelihoods(x, condition, z)
        # the score of q is what q's own parameters get besides the way through z
        scored_q = tuple(parameter.detach() for parameter in q) if self._doubly_reparameterized else q
        log_weights = log_likelihoods + log_density(z, *p) - log_density(z, *scored_q)
        if self._doubly_reparameterized and z.requires_grad:
            shares = log_weights.detach().softmax(1)[:, :, None]  # the bound gives z the first one, and here is the second
            z.register_hook(lambda gradient: shares * gradient)
        bound = importance_weighted_bound(log_weights)
        reconstruction, kl = log_likelihoods.mean(1), gaussian_kl(*q, *p)
        terms = {"loss": -bound, "reconstruction": -reconstruction, "kl": kl}
        if self.likelihood.is_normalised:
            terms |= {"bound": bound, "elbo": reconstruction - kl}
        return terms

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """E_q [log p(x | z, c)], estimated with k draws of z per example, and -KL(q || p): the ELBO."""
        self.require_likelihood()
        q = self.posterior(x, condition)
        z = draws_of(*q, self._num_draws, generator or fresh_noise())
        kl = gaussian_kl(*q, *self.prior(len(x), condition, like=x))
        return {"reconstruction": self._log_likelihoods(x, condition, z).mean(1), "minus_kl": -kl}
