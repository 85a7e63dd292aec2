"""A conditional VAE that completes images: from some quadrants to the others, with a prior learned from what is known.

    p(y | x) = E_{p(z | x)} p(y | z, x)   with x the known quadrants, y the others

    log p(y | x) >= ELBO = E_{q(z | x, y)} [log p(y | z, x)] - KL(q(z | x, y) || p(z | x))

Beside it a baseline network is trained that says every pixel of y from x at once, without z. The prior sees its guess, from
which no gradient comes back. Three numbers are called the conditional log likelihood of such a model, and they are not one:
the ELBO, the mean over draws of the prior, and the mean over weighed draws of q; each is a metric of its own.

References:
    Sohn, Lee, Yan 2015, "Learning structured output representation using deep conditional generative models", NeurIPS.
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519: the weighed draws.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.models.vae import draws_in_parts, log_density, of_each_draw
from src.objectives.likelihoods import Likelihood
from src.objectives.variational import gaussian_kl, reparameterize

__all__ = ["CompletionVAE"]

_KNOWN = {1: "the lower left", 2: "the left half", 3: "all but the upper right"}


class CompletionVAE(nn.Module):
    """Completes images of which one, two or three quadrants are known.

    It draws nothing from nothing, so it is not `CanSample`; `complete` and `inpaint` draw completions.

    Args:
        spec: the data, images.
        encoder: q(z | x, y), called as `encoder(in_shape=, out_shape=)` with the pixels in a row, the known ones first.
        prior_network: p(z | x), likewise, of the known pixels and the baseline's guess of the others.
        decoder: p(y | z, x), called as `decoder(in_shape=, out_shape=, condition_dim=)`, with x as its condition.
        baseline: p(y | x) without z, called as `baseline(in_shape=, out_shape=)`.
        likelihood: of a pixel, called as `likelihood(spec=)`.
        latent_dim: dimensions of z.
        num_known: quadrants that are known: 1 the lower left, 2 the left half, 3 all but the upper right.
    """

    _known: Tensor
    _unknown: Tensor
    _mask: Tensor

    def __init__(
        self,
        spec: DataSpec,
        encoder: Callable[..., nn.Module],
        prior_network: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        baseline: Callable[..., nn.Module],
        likelihood: Callable[..., Likelihood],
        latent_dim: int,
        num_known: int,
    ) -> None:
        super().__init__()
        spec.require_modality("image")
        require_at_least("model.latent_dim", latent_dim, 1)
        if num_known not in _KNOWN:
            raise UserError(f"model.num_known={num_known} must be 1, 2 or 3 quadrants")
        self.is_conditional = False  # on classes
        self.known_in_words = _KNOWN[num_known]
        self.of_what = f"the other pixels given {self.known_in_words}"
        self._spec = spec
        self.likelihood = likelihood(spec=spec)
        mask = known_quadrants(spec.shape[1], spec.shape[2], num_known)
        known = mask.flatten()
        self.register_buffer("_mask", mask, persistent=False)
        self.register_buffer("_known", known.nonzero()[:, 0], persistent=False)
        self.register_buffer("_unknown", (~known).nonzero()[:, 0], persistent=False)
        channels, num_pixels = spec.shape[0], len(known)
        num_unknown = int((~known).sum())
        parameters_shape = (channels * self.likelihood.num_parameters, num_unknown)
        known_shape = (channels, num_pixels - num_unknown)
        self.encoder = encoder(in_shape=(channels, num_pixels), out_shape=(2, latent_dim))
        self.prior_network = prior_network(in_shape=(channels, num_pixels), out_shape=(2, latent_dim))
        self.decoder = decoder(
            in_shape=(latent_dim,), out_shape=parameters_shape, condition_dim=known_shape[0] * known_shape[1]
        )
        self.baseline = baseline(in_shape=known_shape, out_shape=parameters_shape)

    @property
    def known_mask(self) -> Tensor:
        """True where an image is known, `(C, H, W)`."""
        return self._mask.expand(self._spec.shape)

    @property
    def objective(self) -> str:
        return f"KL - log p(y | z, x) by {self.likelihood.in_words}, and the baseline's - log p(y | x), of {self.of_what}"

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        x, y = self._parts(batch.x)
        reconstruction, kl = self._bound_terms(x, y, generator or fresh_noise())
        baseline_nll = -self.likelihood.log_prob(y, self._baseline_parameters(x))
        terms = {
            "loss": kl - reconstruction + baseline_nll,
            "reconstruction": -reconstruction,
            "kl": kl,
            "baseline_nll": baseline_nll,
        }
        if self.likelihood.is_normalised:
            terms["elbo"] = reconstruction - kl
        return terms

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """The ELBO of log p(y | x), estimated with one z per example."""
        terms = self.log_prob_bound_terms(x, condition, generator=generator)
        return terms["reconstruction"] + terms["minus_kl"]

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        self._require_likelihood()
        reconstruction, kl = self._bound_terms(*self._parts(x), generator or fresh_noise())
        return {"reconstruction": reconstruction, "minus_kl": -kl}

    def importance_log_weights(
        self, x: Tensor, condition: Tensor | None = None, *, num_samples: int, generator: Noise | None = None
    ) -> Tensor:
        """log p(y, z_i | x) - log q(z_i | x, y) of k draws z_i ~ q, `(B, k)` in nats."""
        self._require_likelihood()
        known, y = self._parts(x)
        q, p = self._posterior(known, y), self._prior(known)
        parts = [
            self._log_likelihoods(known, y, z) + log_density(z, *p) - log_density(z, *q)
            for z in draws_in_parts(*q, num_samples, generator or fresh_noise())
        ]
        return torch.cat(parts, 1)

    def prior_log_likelihoods(
        self, x: Tensor, condition: Tensor | None = None, *, num_samples: int, generator: Noise | None = None
    ) -> Tensor:
        """log p(y | z_i, x) at k draws z_i ~ p(z | x), `(B, k)` in nats."""
        self._require_likelihood()
        known, y = self._parts(x)
        parts = draws_in_parts(*self._prior(known), num_samples, generator or fresh_noise())
        return torch.cat([self._log_likelihoods(known, y, z) for z in parts], 1)

    def baseline_log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """log p(y | x) of the baseline, exact, `(B,)` in nats."""
        self._require_likelihood()
        known, y = self._parts(x)
        return self.likelihood.log_prob(y, self._baseline_parameters(known))

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x with its known pixels, and the others by the mean of p(y | z, x) at the mean of q(z | x, y)."""
        known, y = self._parts(x)
        return self._joined(x, self._decode(self._posterior(known, y)[0], known))

    def complete(self, x: Tensor, *, generator: Noise | None = None) -> Tensor:
        """Examples with the known pixels of x, and the others by the mean of p(y | z, x) at z ~ p(z | x)."""
        known, _ = self._parts(x)
        return self._joined(x, self._decode(reparameterize(*self._prior(known), generator or fresh_noise()), known))

    def inpaint(
        self, x: Tensor, mask: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None
    ) -> Tensor:
        """`complete`, for the one mask that the model was made for."""
        if not torch.equal(mask, self._mask.expand_as(mask)):
            raise NotApplicable(f"it completes images of which {self.known_in_words} is known, and no others (known=null)")
        return self.complete(x, generator=generator)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The known pixels `(B, C, N)` of images, and the others, in data units."""
        flat = x.flatten(2)
        return flat[:, :, self._known], flat[:, :, self._unknown]

    def _joined(self, x: Tensor, y: Tensor) -> Tensor:
        """Images x with other pixels y `(B, C, N)` where they are not known."""
        return x.flatten(2).index_copy(2, self._unknown, y).unflatten(2, x.shape[2:])

    def _bound_terms(self, known: Tensor, y: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        """log p(y | z, x) at one z ~ q, and KL(q || p), both `(B,)` in nats."""
        q = self._posterior(known, y)
        z = reparameterize(*q, generator)
        return self.likelihood.log_prob(y, self._likelihood_parameters(z, known)), gaussian_kl(*q, *self._prior(known))

    def _posterior(self, known: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.encoder(self.likelihood.natural(torch.cat([known, y], 2))).unbind(1)
        return mu, log_var

    def _prior(self, known: Tensor) -> tuple[Tensor, Tensor]:
        guess = self.likelihood.mean(self._baseline_parameters(known)).detach()
        mu, log_var = self.prior_network(self.likelihood.natural(torch.cat([known, guess], 2))).unbind(1)
        return mu, log_var

    def _baseline_parameters(self, known: Tensor) -> Tensor:
        return self.baseline(self.likelihood.natural(known))

    def _likelihood_parameters(self, z: Tensor, known: Tensor) -> Tensor:
        return self.decoder(z, self.likelihood.natural(known).flatten(1))

    def _decode(self, z: Tensor, known: Tensor) -> Tensor:
        return self.likelihood.mean(self._likelihood_parameters(z, known))

    def _log_likelihoods(self, known: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """log p(y | z, x) of several z `(B, n, D)` for each example, `(B, n)`."""

        def of(row: Tensor, z: Tensor) -> Tensor:
            return self.likelihood.log_prob(y[row], self._likelihood_parameters(z, known[row]))

        return of_each_draw(of, z, num_values=None if self.training else self._spec.num_dims)

    def _require_likelihood(self) -> None:
        if not self.likelihood.is_normalised:
            raise NotApplicable(f"{type(self.likelihood).__name__} is a training loss, not a likelihood")


def known_quadrants(height: int, width: int, num_known: int) -> Tensor:
    """True where an image is known, `(height, width)`: the lower left, then the upper left, then the lower right."""
    known = torch.zeros(height, width, dtype=torch.bool)
    top, left = height // 2, width // 2
    known[top:, :left] = True
    known[:top, :left] = num_known >= 2
    known[top:, left:] = num_known >= 3
    return known
