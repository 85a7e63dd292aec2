"""Undoing noise: from x = x0 + sigma z with much noise to an example with none.

All is in these coordinates, where the noise is added and nothing shrinks. A variance-preserving process y = a x0 + b z with
a^2 + b^2 = 1 is the same one: x = y / a and sigma = b / a, so its samplers are written here in fewer symbols:

    DDPM's posterior q(x_s | x_t, x0) has the mean x0 + (s / t)^2 (x_t - x0) and the variance s^2 (t^2 - s^2) / t^2
    DDIM's deterministic step is one step of Euler's method for dx/dsigma = (x - x0_hat(x, sigma)) / sigma

for noise levels s < t. A solver that chooses its steps by the error works in other coordinates, y = x / sqrt(1 + sigma^2)
over ln sigma: there both ends are of size 1, and nothing is divided by a small sigma, where the rounding errors of a
network would be as large as the errors that steps are chosen by.

A denoiser is called as `denoise(x, sigma, *context)` with x `(B, *E)`, sigma `(B,)` and what else
belongs to each example; it gives its estimate of E[x0 | x], `(B, *E)`.

References:
    Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models", arXiv:2006.11239: ancestral sampling.
    Song, Meng, Ermon 2021, "Denoising diffusion implicit models", arXiv:2010.02502: equations 12 and 16.
    Song et al. 2021, "Score-based generative modeling through stochastic differential equations", arXiv:2011.13456: the
        probability flow.
    Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", arXiv:2206.00364: the flow in
        these coordinates, and its last step by Euler's method.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from src.core.errors import UserError, require_at_least
from src.core.rng import Noise
from src.samplers.ode import Context, Field, Solver, Spacing, ode_log_prob

__all__ = [
    "DDIM",
    "Denoiser",
    "ProbabilityFlow",
    "UndoesNoise",
    "ddim",
    "flow_field",
    "flow_log_prob",
    "follow_flow",
    "scaled_flow_field",
]

Denoiser = Callable[..., Tensor]


def ddim(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], eta: float, generator: Noise | None = None, context: Context = ()
) -> Tensor:
    """x at the last of falling noise levels, which may be 0, from x `(B, *E)` at the first; one evaluation for each step.

        x_s = x0_hat + sqrt(s^2 - v^2) (x_t - x0_hat) / t + v z,    v = eta s sqrt(t^2 - s^2) / t

    Args:
        eta: fresh noise: none at 0, where x_s is a function of x_t; at 1 it is DDPM's ancestral sampling.
        generator: source of z, needed unless eta = 0.
    """
    for sigma, following in itertools.pairwise(sigmas):
        x0 = denoise(x, x.new_full((len(x),), sigma), *context)
        fresh = eta * following * math.sqrt(1 - (following / sigma) ** 2)
        x = x0 + (math.sqrt(following**2 - fresh**2) / sigma) * (x - x0)
        if fresh > 0:
            assert generator is not None
            x = x + fresh * generator.normal(tuple(x.shape), like=x)
    return x


def flow_field(denoise: Denoiser) -> Field:
    """dx/dsigma = (x - x0_hat(x, sigma)) / sigma, whose paths have at each sigma the density of x0 + sigma z."""

    def field(x: Tensor, sigma: Tensor, *context: Tensor) -> Tensor:
        return (x - denoise(x, sigma, *context)) / sigma.reshape(-1, *[1] * (x.ndim - 1))

    return field


def scaled_flow_field(denoise: Denoiser) -> Field:
    """The same paths as y = x / r over s = ln sigma, with r = sqrt(1 + sigma^2): dy/ds = y / r^2 - x0_hat(x, sigma) / r."""

    def field(y: Tensor, s: Tensor, *context: Tensor) -> Tensor:
        sigma = s.exp()
        root = (1 + sigma.square()).sqrt().reshape(-1, *[1] * (y.ndim - 1))
        return y / root.square() - denoise(root * y, sigma, *context) / root

    return field


def follow_flow(
    solver: Solver,
    denoise: Denoiser,
    x: Tensor,
    start: float,
    end: float,
    context: Context = (),
    levels: Spacing | None = None,
) -> Tensor:
    """x `(B, *E)` at the noise level `end` > 0, from x at the level `start` > 0, along the probability flow.

    Args:
        levels: the level at u from 0 to 1, for solvers with a number of steps; None for equal steps.
    """
    if not solver.chooses_steps:
        return solver.integrate(flow_field(denoise), x, start, end, context, levels)
    y = solver.integrate(scaled_flow_field(denoise), x / _root(start), math.log(start), math.log(end), context)
    return _root(end) * y


def flow_log_prob(
    solver: Solver,
    denoise: Denoiser,
    x: Tensor,
    start: float,
    end: float,
    end_log_prob: Callable[[Tensor], Tensor],
    *,
    divergence: str,
    generator: Noise | None = None,
    context: Context = (),
    levels: Spacing | None = None,
) -> Tensor:
    """log p(x) `(B,)` in nats of x `(B, *E)` at the noise level `start` > 0, from the density at the level `end`.

    Args:
        end_log_prob: log p at `end`, `(B, *E)` to `(B,)`.
        divergence, generator, context: as of `ode_log_prob`.
        levels: as of `follow_flow`.
    """
    of_flow = partial(ode_log_prob, divergence=divergence, generator=generator, context=context)
    if not solver.chooses_steps:
        return of_flow(flow_field(denoise), x, start, end, end_log_prob, solver, spacing=levels)
    first, last = _root(start), _root(end)
    num_dims = x[0].numel() if len(x) else 0

    def scaled_log_prob(y: Tensor) -> Tensor:
        return end_log_prob(last * y) + num_dims * math.log(last)

    log_start, log_end = math.log(start), math.log(end)
    log_prob = of_flow(scaled_flow_field(denoise), x / first, log_start, log_end, scaled_log_prob, solver)
    return log_prob - num_dims * math.log(first)


def _root(sigma: float) -> float:
    return math.hypot(1.0, sigma)


class UndoesNoise(ABC):
    """A way from noise to an example, with its number of steps."""

    is_deterministic: bool  # the example is a function of the noise that it begins with

    @abstractmethod
    def undo(self, denoise: Denoiser, x: Tensor, levels: Spacing, generator: Noise, context: Context = ()) -> Tensor:
        """An example without noise, `(B, *E)`.

        Args:
            x: with the noise of the highest level.
            levels: the noise level at u from 0, the highest, to 1, the lowest before none.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the result depends on, in plain types."""

    @abstractmethod
    def with_steps(self, steps: int) -> "UndoesNoise":
        """The same with another number of steps; `UserError` if it has none."""


@dataclass(frozen=True)
class DDIM(UndoesNoise):
    """DDIM, and DDPM's ancestral sampling at eta = 1.

    Args:
        steps: of one evaluation each, the last one to no noise.
        eta: from 0, deterministic, to 1, ancestral.
    """

    steps: int
    eta: float

    def __post_init__(self) -> None:
        require_at_least("sampler.steps", self.steps, 1)
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampler.eta={self.eta} must be between 0 (deterministic) and 1 (ancestral)")

    @property
    def is_deterministic(self) -> bool:
        return self.eta == 0

    def undo(self, denoise: Denoiser, x: Tensor, levels: Spacing, generator: Noise, context: Context = ()) -> Tensor:
        sigmas = [levels(k / max(1, self.steps - 1)) for k in range(self.steps)]
        return ddim(denoise, x, [*sigmas, 0.0], self.eta, generator, context)

    def settings(self) -> dict[str, Any]:
        return {"sampler": "ddim", "steps": self.steps, "eta": self.eta}

    def with_steps(self, steps: int) -> "DDIM":
        return replace(self, steps=steps)


@dataclass(frozen=True)
class ProbabilityFlow(UndoesNoise):
    """An ODE solver on the probability flow, then one step of Euler's method from the lowest level to none.

    With Heun's method these are the 2 K - 1 evaluations of Karras et al. 2022, algorithm 1, for K steps.

    Args:
        solver: its steps count the last one.
    """

    solver: Solver

    is_deterministic = True

    def undo(self, denoise: Denoiser, x: Tensor, levels: Spacing, generator: Noise, context: Context = ()) -> Tensor:
        highest, lowest = levels(0.0), levels(1.0)
        solver = self.solver.before_last()
        if solver is None:
            lowest = highest
        else:
            x = follow_flow(solver, denoise, x, highest, lowest, context, levels)
        return denoise(x, x.new_full((len(x),), lowest), *context)

    def settings(self) -> dict[str, Any]:
        return self.solver.settings()

    def with_steps(self, steps: int) -> "ProbabilityFlow":
        return ProbabilityFlow(self.solver.with_steps(steps))
