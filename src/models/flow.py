"""Normalizing flows: a density by the change of variables, exact and sampled in one pass.

    z = f(x),    log p(x) = log N(z; 0, I) + log |det df/dx|

f is a fixed scaling to the real line (`Scaling`), set by the training data, and a network. On real values `log_prob` is
exact. Integer levels are dequantized within the model; then p(x) is a probability, of which L_k with k draws of the noise
is a lower bound (`objectives.dequantization`), in nats of the levels.

References:
    Rezende, Mohamed 2015, "Variational inference with normalizing flows", arXiv:1505.05770.
    Dinh, Sohl-Dickstein, Bengio 2017, "Density estimation using Real NVP", arXiv:1605.08803.
    Ho et al. 2019, "Flow++", arXiv:1902.00275: variational dequantization.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.shapes import sum_event
from src.core.spec import DataSpec
from src.networks.scaling import Scaling
from src.objectives.dequantization import Dequantization, bound_of_draws
from src.objectives.variational import gaussian_log_prob

__all__ = ["Flow"]


class Flow(nn.Module):
    """A normalizing flow of images or vectors.

    Args:
        spec: the data.
        network: an invertible network, called as `network(in_shape=, condition_dim=)`; its forward gives z in the shape of
            x and the log determinant, its `inverse` x.
        dequantization: noise for integer levels, called as `dequantization(spec=)`.
        num_dequantizations: draws of the noise for one reported bound; training takes one.
        conditional: give the class to the network.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        dequantization: Callable[..., Dequantization],
        num_dequantizations: int,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        require_at_least("model.num_dequantizations", num_dequantizations, 1)
        if conditional:
            spec.require_classes()
        self.is_conditional = conditional
        self.latent_dim = spec.num_dims
        self._spec = spec
        self._num_dequantizations = num_dequantizations
        self.dequantization = dequantization(spec=spec)
        self.scaling = Scaling(spec.shape, spec.values.is_bounded)
        self.network = network(in_shape=spec.shape, condition_dim=spec.num_classes if conditional else 0)

    @property
    def is_discrete(self) -> bool:
        """Whether the data are integer levels."""
        return self._spec.values.levels is not None

    @property
    def objective(self) -> str:
        of = "of x given its class" if self.is_conditional else "of x"
        if self.is_discrete:
            return f"-log p {of} in nats, bounded by one draw of {self.dequantization.in_words} dequantization noise"
        return f"-log p {of} in nats"

    def settings(self) -> dict[str, Any]:
        if not self.is_discrete:
            return {}
        draws = f"log-mean-exp over {self._num_dequantizations} draws"
        return {"dequantization": self.dequantization.in_words, "bound": draws}

    def prepare(self, examples: Callable[[], Iterable[Batch]], *, generator: Noise) -> None:
        """Set the scaling by the mean and standard deviation of all training examples."""

        def values() -> Iterator[Tensor]:
            for batch in examples():
                yield self._to_values(batch.x, generator)[0]

        self.scaling.fit(values())

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        log_p = self._log_weight(batch.x, batch.condition, generator or fresh_noise())
        if not self.is_discrete:
            return {"loss": -log_p}
        return {"loss": -log_p, "bits_per_dim": -log_p / (self._spec.num_dims * math.log(2))}

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """The exact log density of real values, in nats and in data units."""
        if self.is_discrete:
            raise NotApplicable("a flow of integer levels has a lower bound of log p(x), by dequantization")
        return self._log_weight(x, condition, None)

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """L_k of the log probability of integer levels, with k = `num_dequantizations` draws of the noise."""
        terms = self.log_prob_bound_terms(x, condition, generator=generator)
        return terms["one_draw"] + terms["several_draws"]

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """The bound by one draw, and what k draws add to it."""
        if not self.is_discrete:
            raise NotApplicable("a flow of real values has an exact log density, no bound")
        noise = generator or fresh_noise()
        return bound_of_draws(lambda: self._log_weight(x, condition, noise), self._num_dequantizations)

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        z = (generator or fresh_noise()).normal((n, self.latent_dim), like=self.scaling.mean)
        return self.decode(z, condition)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """z of x; for integer levels with the middle of the dequantization noise."""
        values, _ = self._to_values(x, None)
        return self._to_latent(values, condition)[0]

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """x of z; integer levels are rounded to, values in a range clamped to it."""
        y = self.network.inverse(z.unflatten(1, self._spec.shape), self._features(condition))
        values = self.scaling.inverse(y)
        if self.is_discrete:
            return self.dequantization.to_data(values)
        if not self._spec.values.is_bounded:
            return values
        return self._spec.values.low + (self._spec.values.high - self._spec.values.low) * values

    def _log_weight(self, x: Tensor, condition: Tensor | None, noise: Noise | None) -> Tensor:
        """log p(v) - log q(v | x) at one draw of the noise, or log p(x) of real values, `(B,)` in nats."""
        values, log_volume = self._to_values(x, noise)
        z, log_det = self._to_latent(values, condition)
        return sum_event(gaussian_log_prob(z, z.new_zeros(()), z.new_zeros(()))) + log_det + log_volume

    def _to_latent(self, values: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """z `(B, D)` and log |det dz/dv|, `(B,)`."""
        scaled, log_det = self.scaling(values)
        z, more = self.network(scaled, self._features(condition))
        return z.flatten(1), log_det + more

    def _to_values(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """x as the values that have a density, in [0, 1] if they are in a range, and what that adds to log p(x), `(B,)`."""
        if self.is_discrete:
            values, log_q = self.dequantization(x, noise)
            return values, -log_q
        if not self._spec.values.is_bounded:
            return x, x.new_zeros(len(x))
        width = self._spec.values.high - self._spec.values.low
        return self._spec.to_unit_interval(x), x.new_full((len(x),), -self._spec.num_dims * math.log(width))

    def _features(self, condition: Tensor | None) -> Tensor | None:
        return self._spec.one_hot(condition) if self.is_conditional else None
