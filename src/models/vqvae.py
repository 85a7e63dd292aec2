"""The VQ-VAE: an autoencoder whose code is a grid of a few words, and a distribution over such grids to draw from.

Its encoder says z* = q(x), the nearest codes, without chance. With an autoregressive p(z) over the grids and a likelihood
p(x | z) that leaves the lower bound

    log p(x) >= log p(z*) + log p(x | z*)

which is the ELBO of a posterior that puts all its mass on z*. The prior is trained along, on the codes as they are: they
are integers, so none of its gradient reaches encoder or decoder, and none of theirs reaches it.

References:
    van den Oord, Vinyals, Kavukcuoglu 2017, "Neural discrete representation learning", arXiv:1711.00937.
    van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders", arXiv:1606.05328: the prior.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.objectives.likelihoods import Likelihood
from src.objectives.quantization import Codebook, squared_distance, straight_through
from src.samplers.autoregressive import ancestral_sample

__all__ = ["VQVAE"]

_STARTING_BATCHES = 20  # at most, whose vectors the codes start at


class VQVAE(nn.Module):
    """A vector-quantized autoencoder with a prior over its codes.

    Args:
        spec: the data.
        encoder: network from data to a grid of vectors, called as `encoder(in_shape=, code_dim=, condition_dim=)`; its
            attribute `grid` is the height and width.
        decoder: network from the grid to the parameters of the likelihood, called as `decoder(out_shape=, code_dim=,
            condition_dim=)`.
        likelihood: p(x | z), called as `likelihood(spec=)`.
        code_prior: p(z), network from codes to their logits, called as `code_prior(num_codes=, condition_dim=)`.
        num_codes: vectors in the codebook.
        code_dim: their dimension.
        commitment: weight of the squared distance from the encoder's vectors to their codes.
        decay: of the codebook's moving averages, see `Codebook`.
        revive_below: share of the mean use below which a code moves elsewhere, see `Codebook`.
        conditional: give the class to encoder, decoder and prior.
        sample_pixels: samples are draws of p(x | z), not its mean.
    """

    encoder: Any  # with its `grid`
    decoder: Any

    def __init__(
        self,
        spec: DataSpec,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        likelihood: Callable[..., Likelihood],
        code_prior: Callable[..., nn.Module],
        num_codes: int,
        code_dim: int,
        commitment: float,
        decay: float,
        revive_below: float,
        conditional: bool,
        sample_pixels: bool,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        require_at_least("model.num_codes", num_codes, 2)
        require_at_least("model.code_dim", code_dim, 1)
        require_at_least("model.commitment", commitment, 0)
        if conditional:
            spec.require_classes()
        self.is_conditional = conditional
        self.num_codes = num_codes
        self.num_evaluations = 0  # of the prior and of the decoder, in sampling
        self._spec = spec
        self._commitment = commitment
        self._sample_pixels = sample_pixels
        self.likelihood = likelihood(spec=spec)
        condition_dim = spec.num_classes if conditional else 0
        self.encoder = encoder(in_shape=spec.shape, code_dim=code_dim, condition_dim=condition_dim)
        parameters_shape = (spec.shape[0] * self.likelihood.num_parameters, *spec.shape[1:])
        self.decoder = decoder(out_shape=parameters_shape, code_dim=code_dim, condition_dim=condition_dim)
        self._grid: tuple[int, int] = self.encoder.grid
        if self._grid != self.decoder.grid:
            raise UserError(
                f"has an encoder with a grid of {self._grid} codes and a decoder with one of {self.decoder.grid}; set "
                "encoder.* and decoder.* alike"
            )
        self.codebook = Codebook(num_codes, code_dim, decay, revive_below)
        self.code_prior = code_prior(num_codes=num_codes, condition_dim=condition_dim)

    @property
    def objective(self) -> str:
        of = "of x given its class" if self.is_conditional else "of x"
        return (
            f"- log p(z) - log p(x | z) by {self.likelihood.in_words} at the nearest codes z, {of}, and "
            f"{self._commitment:g} of the squared distance to them"
        )

    @torch.no_grad()
    def prepare(self, examples: Callable[[], Iterable[Batch]], *, generator: Noise) -> None:
        """Start the codes at random vectors of the encoder, so that none begins out of reach."""
        found: list[Tensor] = []
        for _, batch in zip(range(_STARTING_BATCHES), examples(), strict=False):
            found.append(self._vectors(batch.x, batch.condition).flatten(0, -2))
        vectors = torch.cat(found)
        place = generator.uniform((len(vectors),), like=vectors).argsort()
        self.codebook.start_at(vectors[place[torch.arange(self.num_codes, device=place.device) % len(place)]])

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """In training mode it moves the codebook, too, after its present codes were used."""
        x, condition = batch.x, batch.condition
        z = self._vectors(x, condition)
        codes = self.codebook.indices(z.detach())
        quantized = self.codebook.look_up(codes)
        reconstruction = self._log_likelihood(x, straight_through(z, quantized), condition)
        distance = squared_distance(z, quantized)
        log_prior = self._log_prior(codes, condition)
        loss = self._commitment * distance - reconstruction - log_prior
        terms = {"loss": loss, "reconstruction": -reconstruction, "code_nll": -log_prior, "distance": distance}
        if self.likelihood.is_normalised:
            terms["elbo"] = log_prior + reconstruction
        if self.training:
            num_revived = self.codebook.learn(z.detach(), codes, generator or fresh_noise())
            terms["revived_codes"] = torch.full_like(loss, num_revived)
        return terms

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """log p(z*) + log p(x | z*) at the nearest codes z*, without chance."""
        terms = self.log_prob_bound_terms(x, condition)
        return terms["reconstruction"] + terms["log_prior"]

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        if not self.likelihood.is_normalised:
            raise NotApplicable(f"{type(self.likelihood).__name__} is a training loss, not a likelihood")
        codes = self.quantize(x, condition)
        reconstruction = self._log_likelihood(x, self.codebook.look_up(codes), condition)
        return {"reconstruction": reconstruction, "log_prior": self._log_prior(codes, condition)}

    def quantize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.codebook.indices(self._vectors(x, condition))

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.likelihood.mean(self._decode(self.codebook.look_up(self.quantize(x, condition)), condition))

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """Draws codes place by place, then the mean of p(x | z), or a draw of it with `sample_pixels`."""
        generator = generator or fresh_noise()
        features = self._features(condition)

        def logits_of(codes: Tensor) -> Tensor:
            self.num_evaluations += n
            return self.code_prior(codes, features)

        codes = ancestral_sample(logits_of, n, self._grid, generator, like=self.codebook.vectors)
        self.num_evaluations += n
        parameters = self._decode(self.codebook.look_up(codes), condition)
        return self.likelihood.sample(parameters, generator) if self._sample_pixels else self.likelihood.mean(parameters)

    def _vectors(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """What is quantized, `(B, h, w, code_dim)`."""
        return self.encoder(self.likelihood.natural(x), self._features(condition)).movedim(1, 3)

    def _decode(self, vectors: Tensor, condition: Tensor | None) -> Tensor:
        """The parameters of the likelihood from vectors `(B, h, w, code_dim)`."""
        return self.decoder(vectors.movedim(3, 1), self._features(condition))

    def _log_likelihood(self, x: Tensor, vectors: Tensor, condition: Tensor | None) -> Tensor:
        return self.likelihood.log_prob(x, self._decode(vectors, condition))

    def _log_prior(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """log p(z) of codes `(B, h, w)`, summed over the grid, `(B,)` in nats."""
        logits = self.code_prior(codes, self._features(condition))
        return -F.cross_entropy(logits, codes, reduction="none").flatten(1).sum(1)

    def _features(self, condition: Tensor | None) -> Tensor | None:
        return self._spec.one_hot(condition) if self.is_conditional else None
