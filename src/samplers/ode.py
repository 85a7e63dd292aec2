"""Following dx/dt = v(x, t) from one time to another, and what happens to a density on the way.

A field is called as `field(x, t, *context)` with x `(B, *E)`, t `(B,)` and, if there is a context, what else belongs to
each example (its condition, say), tensors `(B, ...)`; it gives dx/dt, `(B, *E)`, of each example by itself. Times may fall.
All is computed in the dtype and on the device of x.

References:
    Dormand, Prince 1980, "A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math. 6: the pair of order 5(4).
    Hairer, Norsett, Wanner 1993, "Solving ordinary differential equations I", section II.4: step control, first step.
    Chen et al. 2018, "Neural ordinary differential equations", arXiv:1806.07366: the instantaneous change of variables.
    Grathwohl et al. 2019, "FFJORD", arXiv:1810.01367: Hutchinson's estimate with one probe for the whole path.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from src.core.errors import UserError, require_at_least
from src.core.rng import Noise

__all__ = [
    "DIVERGENCES",
    "Adaptive",
    "Euler",
    "Field",
    "Heun",
    "Solver",
    "dormand_prince",
    "euler",
    "exact_divergence",
    "heun",
    "hutchinson_divergence",
    "ode_log_prob",
    "path_energy",
    "probes",
]

Field = Callable[..., Tensor]
Context = tuple[Tensor, ...]
Spacing = Callable[[float], float]
Integral = Literal["absolute", "relative"]

# Dormand, Prince 1980, table 2: times of the stages 2 .. 7, their weights, and the error of the fourth order
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _LEAST_FACTOR, _LARGEST_FACTOR = 0.9, 0.2, 10.0
_NOTCHES = 4  # of the size of steps, within a factor of 2
_MAX_STEPS = 10_000  # tried with one batch


def euler(field: Field, x: Tensor, times: Sequence[float], context: Context = ()) -> Tensor:
    """x at the last of the times `(K + 1)`, from x `(B, *E)` at the first: x + h v(x, t), one evaluation each."""
    for t, following in itertools.pairwise(times):
        x = x + (following - t) * field(x, _times(x, t), *context)
    return x


def heun(field: Field, x: Tensor, times: Sequence[float], context: Context = ()) -> Tensor:
    """x at the last of the times `(K + 1)`, from x `(B, *E)` at the first, by Heun's method, two evaluations each.

    x + h/2 (v(x, t) + v(x + h v(x, t), t + h))
    """
    for t, following in itertools.pairwise(times):
        step = following - t
        slope = field(x, _times(x, t), *context)
        end_slope = field(x + step * slope, _times(x, following), *context)
        x = x + (0.5 * step) * (slope + end_slope)
    return x


def dormand_prince(
    field: Field,
    x: Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
    context: Context = (),
    integral: Integral | None = None,
) -> Tensor:
    """x at time `end` from x `(B, *E)` at `start`, every example in steps of its own.

    The step of an example is accepted if the root mean square over its dimensions of error / (atol + rtol |x|) is at most
    1. So an example's path does not depend on the others of its batch; it is evaluated no more once it has arrived. What is
    lost to infinity comes back as nan.

    Args:
        integral: if given, the last value of x, which then is `(B, D + 1)`, is an integral along the path of the others. It
            is no part of that mean, where one error among D would count for little, and must pass by itself: "relative",
            as the others, or "absolute", with an error of at most atol however large it is.

    Raises:
        UserError: an example needs far too many steps.
    """
    shape, direction = x.shape[1:], 1.0 if end >= start else -1.0
    x = x.flatten(1)
    if start == end or not len(x):
        return x.unflatten(1, shape)

    def flat_field(x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return direction * field(x.unflatten(1, shape), t, *context).flatten(1)

    eps = torch.finfo(x.dtype).eps
    has_integral = integral is not None
    tolerances = x.new_full((x.shape[1],), rtol)
    if integral == "absolute":
        tolerances[-1] = 0
    arrived = torch.empty_like(x)
    rows = torch.arange(len(x), device=x.device)
    t = _times(x, start)
    slope = flat_field(x, t, *context)
    step = _in_notches(
        _first_step(flat_field, x, t, slope, direction, abs(end - start), tolerances, atol, context, has_integral)
    )
    for _ in range(_MAX_STEPS):
        left = (end - t).abs()
        is_last = step >= left
        step = torch.where(is_last, left, step)
        slopes = [slope]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            moved = x + step[:, None] * _combined(weights, slopes)
            slopes.append(flat_field(moved, t + (direction * node) * step, *context))
        error = step[:, None] * _combined(_ERROR, slopes)  # `moved` is the fifth order's answer
        size = _size(error / (atol + tolerances * torch.maximum(x.abs(), moved.abs())), has_integral)
        least = 8 * eps * t.abs().clamp(min=eps * abs(end - start))  # a step that t + step can still tell from t
        is_least = step <= least
        is_lost = is_least & ~size.isfinite()
        is_accepted = (size <= 1) | is_least
        x = torch.where(is_accepted[:, None], moved, x)
        x = torch.where(is_lost[:, None], torch.nan, x)
        slope = torch.where(is_accepted[:, None], slopes[-1], slope)  # the last stage is the first of the next step
        t = torch.where(is_accepted, torch.where(is_last, end, t + direction * step), t)
        size = torch.where(size.isfinite(), size, torch.inf)
        factor = _in_notches((_SAFETY * size.pow(-0.2)).clamp(_LEAST_FACTOR, _LARGEST_FACTOR))
        step = torch.clamp(step * torch.where(is_accepted, factor, factor.clamp(max=1)), min=least)
        is_done = (is_accepted & is_last) | is_lost
        if bool(is_done.any()):
            arrived[rows[is_done]] = x[is_done]
            if bool(is_done.all()):
                return arrived.unflatten(1, shape)
            kept = ~is_done
            x, t, step, slope, rows = x[kept], t[kept], step[kept], slope[kept], rows[kept]
            context = tuple(some[kept] for some in context)
    raise UserError(
        f"the adaptive solver came to no end in {_MAX_STEPS} steps with rtol={rtol:g} and atol={atol:g}: allow it larger "
        "errors, or take a solver of fixed steps (sampler=heun, or sampler@likelihood_solver=heun for a likelihood)"
    )


def _first_step(
    field: Field,
    x: Tensor,
    t: Tensor,
    slope: Tensor,
    direction: float,
    largest: float,
    rtol: Tensor,
    atol: float,
    context: Context,
    has_integral: bool,
) -> Tensor:
    """A step `(B,)` whose error is about that allowed, by one more evaluation (Hairer, Norsett, Wanner 1993, II.4)."""
    scale = atol + rtol * x.abs()
    size, speed = _size(x / scale, has_integral), _size(slope / scale, has_integral)
    is_small = (size < 1e-5) | (speed < 1e-5)
    guess = torch.where(is_small, 1e-6, 0.01 * size / speed).clamp(max=largest)
    then = field(x + guess[:, None] * slope, t + direction * guess, *context)
    curvature = _size((then - slope) / scale, has_integral) / guess
    fastest = torch.maximum(speed, curvature)
    by_curvature = torch.where(fastest <= 1e-15, (1e-3 * guess).clamp(min=1e-6), (0.01 / fastest).pow(0.2))
    step = torch.minimum(100 * guess, by_curvature).clamp(max=largest)
    return torch.where(step.isfinite(), step, largest)


def _in_notches(step: Tensor) -> Tensor:
    """Rounded down to a power of the fourth root of 2.

    A network's answers differ in their last digits with the size of the batch. Steps that follow the error to its last
    digit would differ, too, and then the results by as much as the solver's error; rounded ones hardly ever do.
    """
    return torch.exp2((_NOTCHES * step.log2()).floor() / _NOTCHES)


def _combined(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]).sum(0)


def _size(x: Tensor, has_integral: bool) -> Tensor:
    """`(B, D)` or, with an integral, `(B, D + 1)` to `(B,)`: the root mean square of D values, the last if it is larger."""
    if not has_integral:
        return x.square().mean(1).sqrt()
    return torch.maximum(x[:, :-1].square().mean(1).sqrt(), x[:, -1].abs())


def _times(x: Tensor, t: float) -> Tensor:
    return x.new_full((len(x),), t)


# --- solvers as settings ---------------------------------------------------------------------------------------------


class Solver(ABC):
    """A way to follow a field, with its accuracy."""

    chooses_steps: ClassVar[bool] = False  # by the error; else it has a number of them

    @abstractmethod
    def integrate(
        self,
        field: Field,
        x: Tensor,
        start: float,
        end: float,
        context: Context = (),
        spacing: Spacing | None = None,
        integral: Integral | None = None,
    ) -> Tensor:
        """x at time `end` from x `(B, *E)` at `start`.

        Args:
            spacing: of the steps: the time at u for equally spaced u from 0 to 1, `start` at 0 and `end` at 1; None for
                equal steps. A solver that chooses its steps itself does not ask.
            integral: as of `dormand_prince`, of a solver that chooses its steps by the error; the others do not ask.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the result depends on, in plain types."""

    @abstractmethod
    def with_steps(self, steps: int) -> "Solver":
        """The same with another number of steps; `UserError` if it has none."""

    @abstractmethod
    def before_last(self) -> "Solver | None":
        """What is left of the way if its last step is taken otherwise: one step less, or None for none."""


@dataclass(frozen=True)
class _FixedSteps(Solver, ABC):
    steps: int

    def __post_init__(self) -> None:
        require_at_least("sampler.steps", self.steps, 1)

    def with_steps(self, steps: int) -> Solver:
        return replace(self, steps=steps)

    def before_last(self) -> Solver | None:
        return self.with_steps(self.steps - 1) if self.steps > 1 else None

    def _times(self, start: float, end: float, spacing: Spacing | None) -> list[float]:
        places = [k / self.steps for k in range(self.steps + 1)]
        times = [start + (end - start) * u if spacing is None else spacing(u) for u in places]
        return [start, *times[1:-1], end]


@dataclass(frozen=True)
class Euler(_FixedSteps):
    """Euler's method.

    Args:
        steps: of one evaluation each.
    """

    def integrate(
        self,
        field: Field,
        x: Tensor,
        start: float,
        end: float,
        context: Context = (),
        spacing: Spacing | None = None,
        integral: Integral | None = None,
    ) -> Tensor:
        return euler(field, x, self._times(start, end, spacing), context)

    def settings(self) -> dict[str, Any]:
        return {"solver": "euler", "steps": self.steps}


@dataclass(frozen=True)
class Heun(_FixedSteps):
    """Heun's method, of second order.

    Args:
        steps: of two evaluations each.
    """

    def integrate(
        self,
        field: Field,
        x: Tensor,
        start: float,
        end: float,
        context: Context = (),
        spacing: Spacing | None = None,
        integral: Integral | None = None,
    ) -> Tensor:
        return heun(field, x, self._times(start, end, spacing), context)

    def settings(self) -> dict[str, Any]:
        return {"solver": "heun", "steps": self.steps}


@dataclass(frozen=True)
class Adaptive(Solver):
    """The method of Dormand and Prince, in steps that every example chooses by the error.

    Args:
        rtol: error of one step that is allowed, over |x|.
        atol: the same in the units of x; both are added. Of a likelihood it is also the error of one step that is allowed
            in log p, in nats for each dimension: rtol would allow one in proportion to log p, whose zero means nothing.
    """

    rtol: float
    atol: float

    chooses_steps = True

    def __post_init__(self) -> None:
        require_at_least("sampler.rtol", self.rtol, 1e-12)
        require_at_least("sampler.atol", self.atol, 1e-12)

    def integrate(
        self,
        field: Field,
        x: Tensor,
        start: float,
        end: float,
        context: Context = (),
        spacing: Spacing | None = None,
        integral: Integral | None = None,
    ) -> Tensor:
        return dormand_prince(field, x, start, end, self.rtol, self.atol, context, integral)

    def settings(self) -> dict[str, Any]:
        return {"solver": "dormand_prince", "rtol": self.rtol, "atol": self.atol}

    def with_steps(self, steps: int) -> Solver:
        raise UserError(
            f"steps={steps} cannot be set: an adaptive solver chooses its steps itself (sampler=heun and sampler=euler "
            "have a number of them, rtol and atol are its accuracy)"
        )

    def before_last(self) -> Solver:
        return self


# --- densities -------------------------------------------------------------------------------------------------------


def exact_divergence(field: Field, x: Tensor, t: Tensor, context: Context, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """v `(B, *E)` and div v = sum_d dv_d/dx_d `(B,)`, by one backward pass for each dimension. `probe` is not looked at."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = field(x, t, *context)
        values = v.flatten(1)
        num_dims = values.shape[1]
        divergence = x.new_zeros(len(x))
        for d in range(num_dims):
            # of the sum over examples, since no example's field depends on another's x
            gradient = _gradient(values[:, d].sum(), x, keep=d + 1 < num_dims)
            divergence = divergence + gradient.flatten(1)[:, d]
    return v.detach(), divergence.detach()


def hutchinson_divergence(
    field: Field, x: Tensor, t: Tensor, context: Context, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """v `(B, *E)` and e^T (dv/dx) e `(B,)`, by one backward pass: on average div v, for a probe e of independent signs."""
    assert probe is not None
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = field(x, t, *context)
        gradient = _gradient((v * probe).sum(), x, keep=False)
    return v.detach(), (gradient * probe).flatten(1).sum(1).detach()


def _gradient(value: Tensor, x: Tensor, keep: bool) -> Tensor:
    if not value.requires_grad:  # a field that does not look at x
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value, x, retain_graph=keep, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


DIVERGENCES: dict[str, Callable[[Field, Tensor, Tensor, Context, Tensor | None], tuple[Tensor, Tensor]]] = {
    "exact": exact_divergence,
    "hutchinson": hutchinson_divergence,
}


def probes(x: Tensor, generator: Noise) -> Tensor:
    """Independent values of -1 and 1 in the shape of x, the probes with the least variance for this trace."""
    u = generator.uniform(tuple(x.shape), like=x)
    return torch.where(u < 0.5, -1.0, 1.0).to(x)


def ode_log_prob(
    field: Field,
    x: Tensor,
    start: float,
    end: float,
    end_log_prob: Callable[[Tensor], Tensor],
    solver: Solver,
    *,
    divergence: str,
    generator: Noise | None = None,
    context: Context = (),
    spacing: Spacing | None = None,
) -> Tensor:
    """log p(x) at time `start`, `(B,)` in nats, of the density that the field carries to a known one at time `end`.

        log p_start(x) = log p_end(x(end)) + integral from start to end of div v(x(t), t) dt

    Gradients are computed within, whatever the caller has turned off, and none come out.

    Args:
        field: v, differentiable in x; no example may depend on another.
        x: `(B, *E)` at time `start`.
        end_log_prob: log p_end, `(B, *E)` to `(B,)`.
        solver: of x and the integral together. One that chooses its steps allows each an error of `atol` nats in the
            integral for each dimension of x: what counts is bits per dimension, and rounding errors grow with D, too.
        divergence: "exact", or "hutchinson" for an unbiased estimate by one probe for each example, fixed on its path.
        generator: source of the probes; the exact divergence needs none.
        context, spacing: as of `Solver.integrate`.
    """
    shape, num_dims = x.shape[1:], x.shape[1:].numel()
    has_probe = divergence == "hutchinson"
    diverge = DIVERGENCES[divergence]
    with torch.inference_mode(False), torch.no_grad():
        # autograd refuses tensors made in inference mode
        x = x.clone()
        per_example = [some.clone() for some in context]
        if has_probe:
            assert generator is not None
            per_example.append(probes(x, generator))

        def joint_field(state: Tensor, t: Tensor, *context: Tensor) -> Tensor:
            x = state[:, :-1].unflatten(1, shape)
            own, probe = (context[:-1], context[-1]) if has_probe else (context, None)
            v, change = diverge(field, x, t, own, probe)
            return torch.cat([v.flatten(1), change[:, None] / num_dims], 1)

        state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
        state = solver.integrate(joint_field, state, start, end, tuple(per_example), spacing, integral="absolute")
        return end_log_prob(state[:, :-1].unflatten(1, shape)) + num_dims * state[:, -1]


def path_energy(
    field: Field, x: Tensor, start: float, end: float, solver: Solver, context: Context = (), scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """x at time `end`, and the integral of |scale v(x(t), t)|^2 dt on the way there, `(B,)` in squared units of scale x.

    No way from one distribution to another within a time of 1 has less on average than their squared Wasserstein distance
    (Benamou, Brenier 2000).

    Args:
        scale: of every value, to be broadcast against x: the path of scale x is what is measured.
    """
    shape = x.shape[1:]

    def joint_field(state: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        v = field(state[:, :-1].unflatten(1, shape), t, *context)
        return torch.cat([v.flatten(1), (scale * v).square().flatten(1).mean(1, keepdim=True)], 1)

    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
    state = solver.integrate(joint_field, state, start, end, context, integral="relative")
    sign = shape.numel() if end >= start else -shape.numel()
    return state[:, :-1].unflatten(1, shape), sign * state[:, -1]
