"""A mixture of Gaussians by expectation maximization, exact, in the data's own dimensions or on their principal axes.

    p(x) = sum_k w_k N(x; mu_k, Sigma_k)

With `num_pca` = q the mixture is of z, the coordinates on the first q principal axes, and what is left of x is isotropic
Gaussian noise in the D - q other dimensions. The rotation changes no volume, so this is a density of the whole of x,

    p(x) = p(z) N(x's distance from its projection; 0, s^2 I),

and its likelihood stands beside that of any other model of x; with q = D it is the mixture of x itself.

Told the class c, it is one mixture for each class: p(x | c), with weights w_{k|c} that add up to 1 in every class, and
responsibilities among the components of an example's own class. Axes, floor and prior are those of all examples.

Integer levels are dequantized with uniform noise, in training as well; then p(x) is a probability, of which L_k with k
draws of the noise is a lower bound (`objectives.dequantization`), in nats of the levels.

References:
    Dempster, Laird, Rubin 1977, "Maximum likelihood from incomplete data via the EM algorithm", JRSS B 39.
    Tipping, Bishop 1999, "Probabilistic principal component analysis", JRSS B 61: the noise beside the axes.
    Neal, Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and other variants": an M step from a
        part of the examples.
    Cappe, Moulines 2009, "On-line expectation-maximization algorithm for latent data models", JRSS B 71, arXiv:0712.4273.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError, require_at_least, require_number
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.objectives.dequantization import bin_width, bound_of_draws, dequantize, quantize
from src.objectives.gaussian_mixture import (
    COVARIANCES,
    Gaussians,
    add_statistics,
    coefficients,
    draw,
    from_clusters,
    from_statistics,
    kmeans_plus_plus,
    lloyd,
    log_joint,
    revive,
    statistics_of,
)

__all__ = ["GaussianMixture"]

_START_POINTS, _START_VALUES = 20_000, 2**24  # that k-means looks at: examples, and their values
_START_ITERATIONS = 25  # of k-means
_MAX_VALUES = 2**28  # float64 numbers in one tensor of the model: 2 GiB


class GaussianMixture(nn.Module):
    """A mixture of Gaussians of images or vectors.

    All its numbers are float64, and densities are computed and returned in it.

    Args:
        spec: the data.
        num_components: K; of a conditional model in each class.
        covariance: "full", "diagonal" or "spherical".
        reg_covar: the least variance of a component in any direction, as a share of the mean variance of the data's values;
            no component can collapse onto a point. Of integer levels at least the variance of the dequantization noise.
        prior_strength: with the mean covariance of the first clusters the covariances of all components are averaged; it
            counts as so many times D + 1 examples. 0: maximum likelihood, of components that may have too few examples.
        num_pca: q, the principal axes that the mixture is on; None for a mixture of x as it is.
        minibatch: an M step after every batch, not only after every epoch.
        step_decay: of these the k-th, from 0, moves the statistics by (k + 2)^-step_decay of the way; in (0.5, 1].
        num_dequantizations: draws of the noise for one reported bound; training takes one.
        conditional: a mixture for each class. Those of class c are number c K to (c + 1) K - 1.
    """

    centre: Tensor  # the mean of the data
    axes: Tensor  # the first principal axes, in columns
    rest_variance: Tensor  # beside them
    floor: Tensor  # of all variances
    prior: Tensor  # the mean covariance
    num_examples: Tensor  # that it was prepared with
    statistics: Tensor
    num_maximizations: Tensor
    class_shares: Tensor  # of the training examples, `(C,)`; of a conditional model

    def __init__(
        self,
        spec: DataSpec,
        num_components: int,
        covariance: str = "full",
        reg_covar: float = 1e-6,
        prior_strength: float = 0.1,
        num_pca: int | None = None,
        minibatch: bool = False,
        step_decay: float = 0.7,
        num_dequantizations: int = 8,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        require_number("model.num_components", num_components, 1)
        require_number("model.reg_covar", reg_covar, 1e-12)
        require_number("model.prior_strength", prior_strength, 0)
        require_at_least("model.num_pca", num_pca, 1)
        require_number("model.num_dequantizations", num_dequantizations, 1)
        if covariance not in COVARIANCES:
            raise UserError(f"model.covariance={covariance} does not exist; allowed: {', '.join(COVARIANCES)}")
        if not 0.5 < step_decay <= 1:
            raise UserError(f"model.step_decay={step_decay} must be more than 0.5 and at most 1")
        if num_pca is not None and num_pca > spec.num_dims:
            raise UserError(f"model.num_pca={num_pca} must be at most {spec.num_dims}, the values of one example, or null")
        if conditional:
            spec.require_classes()
        self.is_conditional = conditional
        self._num_classes = spec.num_classes if conditional else 1
        self._num_components = num_components  # in each class
        self._spec = spec
        self._covariance = COVARIANCES[covariance]
        self._reg_covar = reg_covar
        self._num_pca = num_pca
        self._step_decay = step_decay
        self._num_dequantizations = num_dequantizations
        self.maximizes_every_batch = minibatch
        dim = self._dim = spec.num_dims if num_pca is None else num_pca
        self._prior_count = prior_strength * (dim + 1)
        num_sums = 1 + dim + self._covariance.num_features(dim)
        num_all = self._num_classes * num_components
        self._require_memory(num_all * max(num_sums, math.prod(self._covariance.shape(dim))), num_pca)

        self.log_weights = _constant(torch.full((num_all,), -math.log(num_components)))
        self.means = _constant(nn.init.normal_(torch.empty(num_all, dim)))
        self.factors = _constant(self._unit_factors(num_all, dim))
        self.register_buffer("centre", torch.zeros(spec.num_dims, dtype=torch.float64))
        self.register_buffer("floor", torch.tensor(reg_covar, dtype=torch.float64))
        self.register_buffer("prior", torch.zeros(self._covariance.shape(dim), dtype=torch.float64))
        self.register_buffer("num_examples", torch.zeros((), dtype=torch.int64))
        self.register_buffer("statistics", torch.zeros(num_all, num_sums, dtype=torch.float64))
        self.register_buffer("num_maximizations", torch.zeros((), dtype=torch.int64))
        if conditional:
            self.register_buffer("class_shares", torch.full((self._num_classes,), 1 / self._num_classes).double())
        if num_pca is not None:
            self.register_buffer("axes", torch.eye(spec.num_dims, num_pca, dtype=torch.float64))
            self.register_buffer("rest_variance", torch.ones((), dtype=torch.float64))
        self._coefficients: tuple[Any, Tensor] | None = None

    @property
    def is_discrete(self) -> bool:
        """Whether the data are integer levels."""
        return self._spec.values.levels is not None

    @property
    def gaussians(self) -> Gaussians:
        """The components, relative to the mean of the data, and on the principal axes if there are any.

        Of a conditional model those of all classes, whose weights add up to 1 in each of them.
        """
        return Gaussians(self.log_weights, self.means, self.factors)

    @property
    def objective(self) -> str:
        of = "x given its class" if self.is_conditional else "x"
        bounded = ", bounded by one draw of uniform dequantization noise" if self.is_discrete else ""
        return f"-log p of {of} in nats{bounded}"

    def settings(self) -> dict[str, Any]:
        if not self.is_discrete:
            return {}
        draws = f"log-mean-exp over {self._num_dequantizations} draws"
        return {"dequantization": "uniform", "bound": draws}

    @torch.no_grad()
    def prepare(self, examples: Callable[[], Iterable[Batch]], *, generator: Noise) -> None:
        """Centre, variances and principal axes of the training data, then k-means++ and k-means on some of them."""
        total, classes = torch.zeros_like(self.centre), []
        for batch in examples():
            total += batch.x.flatten(1).double().sum(0)
            classes.append(self._classes(batch))
        labels = torch.cat(classes)
        count = len(labels)
        class_sizes = labels.bincount(minlength=self._num_classes).tolist()
        self._require_examples(class_sizes)
        if self.is_conditional:
            self.class_shares.copy_(torch.tensor(class_sizes, dtype=torch.float64) / count)
        self.centre.copy_(total / count)
        self.num_examples.fill_(count)
        size = min(count, _START_POINTS, max(len(self.means), _START_VALUES // self._spec.num_dims))
        is_chosen = torch.zeros(count, dtype=torch.bool, device=total.device)
        order = generator.uniform((count,), like=self.means).argsort()
        for k, size_of_class in enumerate(class_sizes):
            share = max(self._num_components, size * size_of_class // count)
            is_chosen[order[labels[order] == k][:share]] = True

        squares = torch.zeros_like(total) if self._num_pca is None else torch.outer(total, torch.zeros_like(total))
        chosen, start = [], 0
        for batch in examples():
            x = self._to_values(batch.x, generator)[0] - self.centre
            squares += x.square().sum(0) if self._num_pca is None else x.T @ x
            chosen.append(x[is_chosen[start : start + len(x)]])
            start += len(x)
        variance = squares / count
        mean_variance = float((variance if self._num_pca is None else variance.diagonal()).mean())
        floor = self._reg_covar * mean_variance if mean_variance > 0 else self._reg_covar
        self.floor.fill_(max(floor, bin_width(self._spec) ** 2 / 12) if self.is_discrete else floor)  # of the noise alone
        if self._num_pca is not None:
            self._set_axes(variance)
        z, _ = self._on_axes(torch.cat(chosen))
        clusters = labels[is_chosen] * self._num_components
        for k in range(self._num_classes):
            is_own = labels[is_chosen] == k
            seeds = kmeans_plus_plus(z[is_own], self._num_components, generator)
            clusters[is_own] += lloyd(z[is_own], seeds, _START_ITERATIONS)
        gaussians, prior = from_clusters(z, clusters, len(self.means), self._covariance, float(self.floor))
        self._set(self._by_class(gaussians))
        self.prior.copy_(prior)
        self.statistics.zero_()
        self.num_maximizations.zero_()

    def accumulate(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """The E step. Adds to `statistics`, and gives -log p(x) under the components as they are."""
        with torch.no_grad():
            values, log_volume = self._to_values(batch.x, generator or fresh_noise())
            z, log_rest = self._on_axes(values - self.centre)
            present = self._present_coefficients()

            def add(z: Tensor, own: slice) -> Tensor:
                return add_statistics(z, present[own], self._covariance, self.statistics[own])

            log_prob = self._of_own_class(add, z, batch.condition)
            return {"loss": -(log_prob + log_rest + log_volume)}

    @torch.no_grad()
    def maximize(self, share: float = 1.0) -> dict[str, float]:
        """The M step, from the statistics of a share of the examples and, for the others, from what the components say.

        A component with less than the responsibility for one training example is lost, and given half of the heaviest one,
        of its class if there are any. A class without examples in the statistics stays as it is, to the bit.
        """
        if self.maximizes_every_batch:
            share = (int(self.num_maximizations) + 2) ** -self._step_decay
        assert self.num_examples > 0, "it is not prepared"
        statistics = self.statistics * (self.num_examples / self.statistics[:, 0].sum())
        is_seen = self._of_classes(statistics[:, 0]) > 0
        if share < 1:
            statistics.lerp_(self._present_statistics(), 1 - share)
        if not is_seen.all():  # something to compute with; the result is not used
            statistics = torch.where(is_seen[:, None], statistics, self._present_statistics())
        prior = self.prior if self._prior_count else None
        prior_count = self._prior_count * share  # of the rest of the way the components' covariances contain it
        gaussians, is_low = from_statistics(statistics, self._dim, self._covariance, float(self.floor), prior, prior_count)
        counts = statistics[:, 0]
        if self.is_conditional:  # a batch has more or less of a class than its share
            sizes = (self.class_shares * self.num_examples).round().repeat_interleave(self._num_components)
            counts = counts / self._of_classes(counts) * sizes
        is_lost, is_low = (counts < 1) & is_seen, is_low & is_seen
        self._set(self._by_class(gaussians, is_lost), is_seen)
        self.statistics.zero_()
        self.num_maximizations += 1
        return {"components_at_floor": float(is_low.sum()), "components_lost": float(is_lost.sum())}

    def negative_log_likelihood(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        return {"loss": -self._log_weight(batch.x, batch.condition, generator or fresh_noise())}

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """The exact log density of real values, in nats and in data units, float64."""
        if self.is_discrete:
            raise NotApplicable("a mixture of Gaussians has of integer levels a lower bound of log p(x), by dequantization")
        return self._log_weight(x, condition, None)

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """L_k of the log probability of integer levels, with k = `num_dequantizations` draws of the noise, float64."""
        terms = self.log_prob_bound_terms(x, condition, generator=generator)
        return terms["one_draw"] + terms["several_draws"]

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """The bound by one draw, and what k draws add to it."""
        if not self.is_discrete:
            raise NotApplicable("a mixture of Gaussians of real values has an exact log density, no bound")
        noise = generator or fresh_noise()
        return bound_of_draws(lambda: self._log_weight(x, condition, noise), self._num_dequantizations)

    @torch.no_grad()
    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """Draws of p(x), or p(x | c): integer levels are rounded to, values in a range clamped to it."""
        noise = generator or fresh_noise()
        is_own = None
        if self.is_conditional:
            is_own = self._spec.one_hot(condition).bool().repeat_interleave(self._num_components, 1)
        x = draw(n, self.gaussians, self._covariance, noise, is_own)
        if self._num_pca is not None:
            rest = self.rest_variance.sqrt() * noise.normal((n, self._spec.num_dims), like=x)
            x = x @ self.axes.T + rest - (rest @ self.axes) @ self.axes.T  # no noise on the axes
        x = (x + self.centre).to(torch.get_default_dtype()).unflatten(1, self._spec.shape)
        if self.is_discrete:
            return quantize(x, self._spec)
        values = self._spec.values
        return x.clamp(values.low, values.high) if values.is_bounded else x

    def _log_weight(self, x: Tensor, condition: Tensor | None, noise: Noise | None) -> Tensor:
        """log p(y) + log volume at one draw of the noise, or log p(x) of real values, `(B,)` in nats."""
        values, log_volume = self._to_values(x, noise)
        z, log_rest = self._on_axes(values - self.centre)

        def log_prob(z: Tensor, own: slice) -> Tensor:
            return log_joint(z, _some(self.gaussians, own), self._covariance).logsumexp(1)

        return self._of_own_class(log_prob, z, condition) + log_rest + log_volume

    def _classes(self, batch: Batch) -> Tensor:
        """The class of each example `(B,)`; one class of all if the model is not told any."""
        if not self.is_conditional:
            return torch.zeros(len(batch), dtype=torch.int64, device=batch.x.device)
        assert batch.condition is not None, "a conditional model needs class labels"
        return batch.condition

    def _components(self, k: int) -> slice:
        """Those of class k."""
        return slice(k * self._num_components, (k + 1) * self._num_components)

    def _of_own_class(self, of: Callable[[Tensor, slice], Tensor], z: Tensor, condition: Tensor | None) -> Tensor:
        """`of(z, components)`, `(B,)` float64, of examples with the components of their own class."""
        if not self.is_conditional:
            return of(z, slice(None))
        assert condition is not None, "a conditional model needs class labels"
        found = z.new_empty(len(z), dtype=torch.float64)
        for k in condition.unique().tolist():
            is_own = condition == k
            found[is_own] = of(z[is_own], self._components(k))
        return found

    def _of_classes(self, counts: Tensor) -> Tensor:
        """For each component `(C K,)` the sum over those of its class."""
        return counts.unflatten(0, (self._num_classes, -1)).sum(1).repeat_interleave(self._num_components)

    def _by_class(self, gaussians: Gaussians, is_lost: Tensor | None = None) -> Gaussians:
        """Components with weights that add up to 1 in each class, and none lost."""
        parts = []
        for k in range(self._num_classes):
            own = self._components(k)
            part = _some(gaussians, own)
            if self.is_conditional:
                part = Gaussians(part.log_weights.log_softmax(0), part.means, part.factors)
            if is_lost is not None and is_lost[own].any():
                is_heaviest = torch.arange(self._num_components, device=is_lost.device) == part.log_weights.argmax()
                part = revive(part, self._covariance, is_lost[own] & ~is_heaviest)
            parts.append(part)
        log_weights, means, factors = zip(*((part.log_weights, part.means, part.factors) for part in parts), strict=True)
        return Gaussians(torch.cat(log_weights), torch.cat(means), torch.cat(factors))

    def _present_statistics(self) -> Tensor:
        """What the components as they are say of all training examples."""
        gaussians = self.gaussians
        if self.is_conditional:
            log_shares = self.class_shares.log().repeat_interleave(self._num_components)
            gaussians = Gaussians(gaussians.log_weights + log_shares, gaussians.means, gaussians.factors)
        return self.num_examples * statistics_of(gaussians, self._covariance)

    def _require_examples(self, class_sizes: list[int]) -> None:
        for k, size in enumerate(class_sizes):
            of_class = f" of class {self._spec.class_names[k]}" if self.is_conditional else ""
            if self.is_conditional and size == 0:
                raise UserError(
                    f"there are no training examples{of_class}; model.conditional=true needs some of every class of "
                    f"data={self._spec.name} (or model.conditional=false)"
                )
            if size < self._num_components:
                raise UserError(
                    f"model.num_components={self._num_components} must be at most {size}, the number of training "
                    f"examples{of_class}"
                )

    def _to_values(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, float]:
        """x as `(B, D)` float64 values that have a density, and what that adds to log p(x)."""
        if not self.is_discrete:
            return x.flatten(1).double(), 0.0
        assert noise is not None
        values, log_volume = dequantize(x, self._spec, noise)
        return values.flatten(1).double(), log_volume

    def _on_axes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z `(B, q)` of centred x `(B, D)`, and the log density of what is left of it, `(B,)` in nats."""
        if self._num_pca is None:
            return x, x.new_zeros(len(x))
        z = x @ self.axes
        num_rest = x.shape[1] - self._num_pca
        squared = (x.square().sum(1) - z.square().sum(1)).clamp(min=0) if num_rest else x.new_zeros(len(x))
        return z, -0.5 * (squared / self.rest_variance + num_rest * torch.log(2 * math.pi * self.rest_variance))

    def _set_axes(self, covariance: Tensor) -> None:
        """The eigenvectors of the largest variances; the others' variance is their mean, the maximum likelihood."""
        variances, vectors = torch.linalg.eigh(covariance)
        self.axes.copy_(vectors[:, -self._dim :].flip(1))
        rest = variances[: -self._dim]
        self.rest_variance.copy_(torch.maximum(rest.mean(), self.floor) if len(rest) else torch.ones_like(self.floor))

    def _set(self, gaussians: Gaussians, which: Tensor | slice = slice(None)) -> None:
        """Become these components, or some of them, `(C K,)` bool."""
        self.log_weights[which] = gaussians.log_weights[which]
        self.means[which] = gaussians.means[which]
        self.factors[which] = gaussians.factors[which]

    def _present_coefficients(self) -> Tensor:
        """Of the components as they are, computed once for all batches between two M steps."""
        state = (self.means.device, *(parameter._version for parameter in self.parameters()))
        if self._coefficients is None or self._coefficients[0] != state:
            self._coefficients = state, coefficients(self.gaussians, self._covariance)
        return self._coefficients[1]

    def _unit_factors(self, num_components: int, dim: int) -> Tensor:
        shape = self._covariance.shape(dim)
        unit = torch.eye(dim) if len(shape) == 2 else torch.ones(shape)
        return unit.expand(num_components, *shape)

    def _require_memory(self, largest: int, num_pca: int | None) -> None:
        if max(largest, 0 if num_pca is None else self._spec.num_dims**2) > _MAX_VALUES:
            raise UserError(
                f"has covariances too large for memory ({largest:,} numbers); choose model.covariance=diagonal, fewer "
                "components with model.num_components= or, below 16,000 values to an example, axes with model.num_pca="
            )


def _some(gaussians: Gaussians, which: slice) -> Gaussians:
    return Gaussians(gaussians.log_weights[which], gaussians.means[which], gaussians.factors[which])


def _constant(value: Tensor) -> nn.Parameter:
    """What is learned, but by no gradient."""
    return nn.Parameter(value.double().clone(), requires_grad=False)
