"""What flow matching and diffusion share: one network that is evaluated many times on the way from noise to an example.

Class conditions enter the network as one-hot vectors. A network that was trained with some classes left out, a vector of
zeros in their place, also knows the unconditional field, and a sample may follow

    v = v(x, t, none) + w (v(x, t, c) - v(x, t, none))

with a guidance w (Ho, Salimans 2022). At w = 1 that is v(x, t, c), the plain conditional model: then only it is evaluated.

Images of integer levels get uniform noise on the bin of each level, in training too, so that the density of the model
bounds the probability of the levels; samples are rounded to levels. Binary images get none: they have no density worth the
name.

References:
    Ho, Salimans 2022, "Classifier-free diffusion guidance", arXiv:2207.12598, equation 6, with its 1 + w called w here.
    Lugmayr et al. 2022, "RePaint: inpainting using denoising diffusion probabilistic models", arXiv:2201.09865: what is
        known is put back at every step, with the noise of that step. Here without their jumps back to more noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import CONTINUOUS, DISCRETE, DataSpec
from src.objectives.dequantization import bin_width, dequantize
from src.samplers.ode import DIVERGENCES, Solver

__all__ = ["Stepwise", "full_precision"]

_MAX_EXACT = 16  # dimensions up to which a divergence is exact by default: it costs one backward pass for each
_NUM_STRATA = 4  # times at which a held-out example is looked at, so that the mean loss is less noisy


class Stepwise(nn.Module, ABC):
    """Base of `FlowMatching` and `Diffusion`.

    Args:
        spec: the data.
        network: called as `network(in_shape=, out_shape=, condition_dim=)`; then as `network(x, t, condition)`.
        likelihood_solver: of the ODE that the likelihood is computed by.
        divergence: "exact", or "hutchinson" for an unbiased estimate; None for exact up to 16 dimensions.
        std: standard deviation that the data are brought to before all else, by their mean and their own, measured before
            the first step: of each channel of images, of each value of vectors. None to leave them as they are.
        conditional: give the class to the network.
        drop_condition: share of training examples whose class is left out; above 0 for guidance.
        guidance: weight w of the condition in samples; 1 for none.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        likelihood_solver: Solver,
        divergence: str | None,
        std: float | None,
        conditional: bool,
        drop_condition: float,
        guidance: float,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        if conditional:
            spec.require_classes()
        if not 0 <= drop_condition < 1:
            raise UserError(f"model.drop_condition={drop_condition} must be at least 0 and below 1")
        if drop_condition and not conditional:
            raise UserError(f"model.drop_condition={drop_condition} needs a condition to drop (set model.conditional=true)")
        if divergence is not None and divergence not in DIVERGENCES:
            allowed = ", ".join(DIVERGENCES)
            raise UserError(
                f"model.divergence={divergence} is not known; allowed: {allowed}, or null to choose by dimension"
            )
        self.is_conditional = conditional
        self.num_evaluations = 0
        self.num_likelihood_evaluations = 0
        self._spec = spec
        self._drop = drop_condition
        self._std = std
        self._guidance = 1.0
        self._set_guidance(guidance, "model.guidance")
        self._likelihood_solver = likelihood_solver
        self._divergence = divergence or ("exact" if spec.num_dims <= _MAX_EXACT else "hutchinson")
        self.network = network(
            in_shape=spec.shape, out_shape=spec.shape, condition_dim=spec.num_classes if conditional else 0
        )
        each = (spec.shape[0], *[1] * (len(spec.shape) - 1))
        self.register_buffer("shift", torch.zeros(each))
        self.register_buffer("scale", torch.ones(each))

    # --- what families fill in

    @abstractmethod
    def _start(self, n: int, generator: Noise) -> Tensor:
        """What samples begin with, `(n, *spec.shape)`."""

    @abstractmethod
    def _follow(
        self, start: Tensor, generator: Noise, features: tuple[Tensor, ...], known: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Examples in the model's units from what they begin with; `known` gives (mask, x) of values that are known."""

    @abstractmethod
    def _log_density(self, x: Tensor, features: tuple[Tensor, ...], generator: Noise) -> Tensor:
        """log p(x) of x `(B, *spec.shape)` in the model's units, `(B,)` in nats."""

    @abstractmethod
    def _losses(self, x: Tensor, condition: Tensor | None, u: Tensor, generator: Noise) -> Tensor:
        """The training loss `(B,)` of x in the model's units at the times that belong to u `(B,)` in (0, 1)."""

    @abstractmethod
    def _sampling(self) -> dict[str, Any]:
        """What samples depend on, in plain types."""

    @abstractmethod
    def _with_steps(self, steps: int) -> None:
        """Draw in so many steps from now on."""

    # --- capabilities

    def prepare(self, examples: Callable[[], Iterable[Batch]], *, generator: Noise) -> None:
        """Measure mean and standard deviation of the training data, unless they are left as they are."""
        if self._std is None:
            return
        moments = torch.zeros(3, *self.shift.shape, dtype=torch.float64)
        for batch in examples():
            x = batch.x.cpu().double()
            over = (0, *range(2, x.ndim))
            sums = torch.stack([torch.ones_like(x).sum(over), x.sum(over), x.square().sum(over)])
            moments += sums.reshape(moments.shape)
        count, total, squares = moments
        mean = total / count
        variance = squares / count - mean.square()
        is_spread = variance > 1e-12 * (squares / count)
        std = torch.where(is_spread, variance.clamp(min=1e-300).sqrt(), self._std)  # what never changes keeps its unit
        self.shift.copy_(mean)
        self.scale.copy_(std / self._std)

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """In training at one time for each example; in evaluation at four, one of each quarter, which has the same mean."""
        generator = generator or fresh_noise()
        x = self._to_model(self._with_bins(batch.x, generator))
        condition = batch.condition if self.is_conditional else None
        num_strata = 1 if self.training else _NUM_STRATA
        u = generator.uniform((len(x),), like=x)
        last = 1 - torch.finfo(u.dtype).eps / 2  # (k + u) / n may round to 1, where a time may be infinite
        losses = [self._losses(x, condition, ((k + u) / num_strata).clamp(max=last), generator) for k in range(num_strata)]
        return {"loss": torch.stack(losses).mean(0)}

    @torch.no_grad()
    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        generator = generator or fresh_noise()
        return self._drawn(self._start(n, generator), condition, generator)

    @torch.no_grad()
    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The sample that begins with the noise z `(B, latent_dim)`; a model has `latent_dim` where that is a function."""
        return self._drawn(self._start_of(z.unflatten(1, self._spec.shape)), condition, fresh_noise())

    @torch.no_grad()
    def inpaint(
        self, x: Tensor, mask: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None
    ) -> Tensor:
        """Samples that are x where `mask` is True, `(B, *spec.shape)`.

        The known values follow, with noise of their own, the path that leads to them; the others follow the field, which
        sees both. That is an approximation to p(unknown | known).
        """
        generator = generator or fresh_noise()
        mask = mask.expand_as(x)
        drawn = self._drawn(self._start(len(x), generator), condition, generator, (mask, self._to_model(x)))
        return torch.where(mask, x, drawn)

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """Without guidance, whatever samples have. Exact up to the solver's error, or an unbiased estimate of that."""
        if self._spec.values.kind != CONTINUOUS:
            raise NotApplicable(f"its density is no probability of {self._spec.values.describe()}; see the bound")
        return self._log_prob(x, condition, generator or fresh_noise())

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """log P(x) of levels x is at least E_u log p(x + u) + D log(width of a bin), estimated by one u for an example."""
        terms = self.log_prob_bound_terms(x, condition, generator=generator)
        return terms["density"] + terms["bins"]

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """log p(x + u) at one u, uniform on the bins, and the log volume of the bins."""
        values = self._spec.values
        if values.kind == CONTINUOUS:
            raise NotApplicable("it has the log likelihood of continuous values itself, not a bound")
        if values.kind != DISCRETE:
            raise NotApplicable(f"it has no likelihood of {values.describe()}, only of discrete or continuous ones")
        generator = generator or fresh_noise()
        dequantized, log_volume = dequantize(x, self._spec, generator)
        density = self._log_prob(dequantized, condition, generator)
        return {"density": density, "bins": torch.full_like(density, log_volume)}

    def settings(self) -> dict[str, Any]:
        likelihood = {**self._likelihood_solver.settings(), "divergence": self._divergence}
        if self._spec.values.kind == DISCRETE:
            likelihood["dequantization"] = "uniform, one draw"
        guidance = {"guidance": self._guidance} if self.is_conditional else {}
        return {**self._sampling(), **guidance, "likelihood": likelihood}

    def steer(self, *, steps: int | None = None, guidance: float | None = None) -> None:
        if guidance is not None:
            self._set_guidance(guidance, "guidance")
        if steps is not None:
            self._with_steps(steps)

    # --- shared by the families

    def _start_of(self, z: Tensor) -> Tensor:
        """What a sample begins with, from its z `(B, *spec.shape)` of N(0, I)."""
        return z

    def _answer(self, x: Tensor, t: Tensor, *features: Tensor) -> Tensor:
        """The network's answer in sampling, guided and counted, `(B, *spec.shape)`; all its inputs belong to `x`."""
        out = self._counted(x, t, *features)
        if self._guidance == 1:
            return out
        (one_hot,) = features
        plain = self._counted(x, t, torch.zeros_like(one_hot))
        return plain + self._guidance * (out - plain)

    def _counted(self, x: Tensor, t: Tensor, *features: Tensor) -> Tensor:
        self.num_evaluations += len(x)
        return self.network(x, t, *features)

    def _in_likelihood(self, x: Tensor, t: Tensor, *features: Tensor) -> Tensor:
        """The network's answer on the path of a likelihood, counted, `(B, *spec.shape)`; never guided."""
        self.num_likelihood_evaluations += len(x)
        return self.network(x, t, *features)

    def _in_training(self, x: Tensor, t: Tensor, condition: Tensor | None, generator: Noise) -> Tensor:
        """The network's answer to examples of which some have lost their condition."""
        if condition is None:
            return self.network(x, t)
        (features,) = self._features(condition, x)
        if self._drop:
            is_dropped = generator.uniform((len(x),), like=x) < self._drop
            features = torch.where(is_dropped[:, None], 0, features)
        return self.network(x, t, features)

    def _features(self, condition: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
        return (self._spec.one_hot(condition).to(like),) if self.is_conditional else ()

    def _in_words(self, what: str) -> str:
        """The objective, from what it is about: with the conditions and the data it depends on."""
        of = "of x given its class" if self.is_conditional else "of x"
        dropped = f", left out for {self._drop:g} of the examples" if self._drop else ""
        units = "" if self._std is None else f", standardized to {self._std:g}"
        bins = ", dequantized" if self._spec.values.kind == DISCRETE else ""
        return f"{what}, {of}{dropped}{bins}{units}"

    def _drawn(
        self, start: Tensor, condition: Tensor | None, generator: Noise, known: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        with full_precision(start):
            x = self._follow(start, generator, self._features(condition, start), known)
        return self._on_levels(x * self.scale + self.shift)

    def _log_prob(self, x: Tensor, condition: Tensor | None, generator: Noise) -> Tensor:
        with full_precision(x):
            x = x.float()
            log_density = self._log_density(self._to_model(x), self._features(condition, x), generator)
        num_each = self._spec.num_dims // self.scale.numel()
        return log_density - num_each * self.scale.log().sum()

    def _to_model(self, x: Tensor) -> Tensor:
        """From data units to the model's own."""
        return (x - self.shift) / self.scale

    def _with_bins(self, x: Tensor, generator: Noise) -> Tensor:
        return dequantize(x, self._spec, generator)[0] if self._spec.values.kind == DISCRETE else x

    def _on_levels(self, x: Tensor) -> Tensor:
        """Rounded to the data's levels if they have many, and in their range if they have one; nan stays nan."""
        values = self._spec.values
        if values.kind == DISCRETE:
            width = bin_width(self._spec)
            x = values.low + width * ((x - values.low) / width).round()
        return x.clamp(values.low, values.high) if values.is_bounded else x

    def _set_guidance(self, guidance: float, key: str) -> None:
        if guidance != 1 and not self._drop:
            raise UserError(
                f"{key}={guidance:g} needs a conditional model that was trained with some classes left out "
                "(model.conditional=true model.drop_condition=0.1); 1 is no guidance"
            )
        require_at_least(key, guidance, 0)
        self._guidance = float(guidance)


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """No mixed precision inside: many small steps add up to a path only if they are not rounded away."""
    with torch.autocast(x.device.type, enabled=False):
        yield
