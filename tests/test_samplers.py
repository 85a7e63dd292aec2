"""Solvers of differential equations and ways to undo noise: closed forms, other implementations, no example for another."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.samplers.diffusion import DDIM, ProbabilityFlow, ddim, flow_field, flow_log_prob, follow_flow, scaled_flow_field
from src.samplers.ode import (
    Adaptive,
    Euler,
    Heun,
    Solver,
    dormand_prince,
    euler,
    exact_divergence,
    heun,
    hutchinson_divergence,
    ode_log_prob,
    path_energy,
    probes,
)

SOLVERS = [Euler(200), Heun(20), Adaptive(1e-6, 1e-6)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros((), dtype=dtype))


def spiral(x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
    """A field of the plane that is neither linear nor the same at all times."""
    first, second = x.unbind(1)
    return torch.stack([-second + torch.sin(3 * t) * first, first - 0.3 * first * second], 1)


class Counting:
    """A field, the examples it was evaluated at, and how often it was called."""

    def __init__(self, field) -> None:
        self._field = field
        self.num_rows = 0
        self.num_calls = 0

    def __call__(self, x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        self.num_rows += len(x)
        self.num_calls += 1
        return self._field(x, t, *context)


# --- solvers ---------------------------------------------------------------------------------------------------------


def test_one_step_of_euler_and_heun_is_their_formula():
    x, h = normal(5, 2), 0.3
    t, end = torch.full((5,), 0.2, dtype=x.dtype), torch.full((5,), 0.5, dtype=x.dtype)
    slope = spiral(x, t)
    torch.testing.assert_close(euler(spiral, x, [0.2, 0.5]), x + h * slope)
    torch.testing.assert_close(heun(spiral, x, [0.2, 0.5]), x + h / 2 * (slope + spiral(x + h * slope, end)))


@pytest.mark.parametrize(("start", "end"), [(0.0, 2.0), (2.0, 0.5)])
def test_adaptive_solver_agrees_with_scipy(start, end):
    x = normal(6, 2)
    got = dormand_prince(spiral, x, start, end, 1e-8, 1e-8)
    for one, result in zip(x, got, strict=True):

        def field(t: float, x: np.ndarray) -> np.ndarray:
            return spiral(torch.from_numpy(x)[None], torch.tensor([t]))[0].numpy()

        expected = solve_ivp(field, (start, end), one.numpy(), method="RK45", rtol=1e-10, atol=1e-10).y[:, -1]
        torch.testing.assert_close(result, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_adaptive_solver_takes_about_as_many_steps_as_scipys():
    field, x = Counting(spiral), normal(1, 2)
    dormand_prince(field, x, 0.0, 5.0, 1e-6, 1e-6)
    scipys = solve_ivp(
        lambda t, x: spiral(torch.from_numpy(x)[None], torch.tensor([t]))[0].numpy(),
        (0, 5),
        x[0].numpy(),
        rtol=1e-6,
        atol=1e-6,
    ).nfev
    assert 0.7 * scipys <= field.num_calls <= 1.4 * scipys


def test_every_example_has_its_own_steps_whatever_its_batch():
    rates = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)

    def decay(x: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        return -rate[:, None] * x

    x, together = normal(3, 2), Counting(decay)
    joint = dormand_prince(together, x, 0.0, 1.0, 1e-5, 1e-5, (rates,))
    counts = []
    for i in range(3):
        alone = Counting(decay)
        one = dormand_prince(alone, x[i : i + 1], 0.0, 1.0, 1e-5, 1e-5, (rates[i : i + 1],))
        assert torch.equal(one[0], joint[i])
        counts.append(alone.num_rows)
    assert counts[0] < counts[2]
    assert together.num_rows == sum(counts)  # what has arrived is evaluated no more
    torch.testing.assert_close(joint, x * torch.exp(-rates)[:, None], rtol=0, atol=1e-4)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_any_shape_and_dtype_in_both_directions(solver, dtype, shape):
    x = normal(4, *shape, dtype=dtype)
    there = solver.integrate(lambda x, t: -x, x, 0.0, 1.0)
    assert there.dtype == dtype
    torch.testing.assert_close(there, x * math.exp(-1), rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(solver.integrate(lambda x, t: -x, there, 1.0, 0.0), x, rtol=1e-2, atol=1e-5)


@every_solver
def test_context_travels_with_its_example(solver):
    x, goal = normal(4, 2), normal(4, 2, seed=1)
    got = solver.integrate(lambda x, t, goal: goal, x, 0.0, 1.0, (goal,))
    torch.testing.assert_close(got, x + goal)


def test_example_that_runs_to_infinity_is_nan_and_the_others_arrive():
    x = torch.tensor([[2.0], [0.5], [math.nan]], dtype=torch.float64)
    got = dormand_prince(lambda x, t: x.square(), x, 0.0, 1.0, 1e-6, 1e-6)  # 1 / (1 / x - t)
    assert got.isnan().flatten().tolist() == [True, False, True]
    torch.testing.assert_close(got[1], torch.tensor([1.0], dtype=torch.float64), rtol=1e-5, atol=0)


def test_constant_field_and_no_time_need_no_care():
    x = normal(3, 2)
    assert torch.equal(dormand_prince(lambda x, t: torch.zeros_like(x), x, 0.0, 1.0, 1e-5, 1e-5), x)
    assert torch.equal(dormand_prince(spiral, x, 1.0, 1.0, 1e-5, 1e-5), x)
    assert dormand_prince(spiral, x[:0], 0.0, 1.0, 1e-5, 1e-5).shape == (0, 2)


def test_steps_get_as_short_as_the_time_they_are_at_allows():
    """x = sin(6 ln t): the last steps must be a millionth of the first, in float32, too."""
    end = 2e-6
    got = dormand_prince(lambda x, t: (6 * (6 * t.log()).cos() / t)[:, None], torch.zeros(1, 1), 1.0, end, 1e-4, 1e-4)
    assert float(got) == pytest.approx(math.sin(6 * math.log(end)), abs=5e-3)


@pytest.mark.parametrize(("solver", "per_step"), [(Euler(7), 1), (Heun(7), 2)])
def test_evaluations_of_fixed_steps(solver, per_step):
    field = Counting(spiral)
    solver.integrate(field, normal(3, 2), 0.0, 1.0)
    assert field.num_calls == 7 * per_step


def test_steps_can_be_spaced_at_will():
    seen = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return -x

    Euler(4).integrate(field, normal(1, 2), 1.0, 0.0, spacing=lambda u: (1 - u) ** 2)
    assert seen == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Euler(0), r"sampler\.steps=0 must be at least 1"),
        (lambda: Heun(4).with_steps(0), r"sampler\.steps=0 must be at least 1"),
        (lambda: Adaptive(0, 1e-5), r"sampler\.rtol=0 must be at least"),
        (lambda: Adaptive(1e-5, 1e-5).with_steps(10), "steps=10 cannot be set: an adaptive solver"),
        (lambda: DDIM(10, eta=2), r"sampler\.eta=2 must be between 0"),
        (lambda: DDIM(0, eta=0), r"sampler\.steps=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_solver_that_comes_to_no_end_says_so(monkeypatch):
    monkeypatch.setattr("src.samplers.ode._MAX_STEPS", 3)
    with pytest.raises(UserError, match="came to no end in 3 steps with rtol=1e-09"):
        dormand_prince(spiral, normal(2, 2), 0.0, 5.0, 1e-9, 1e-9)


# --- densities -------------------------------------------------------------------------------------------------------


def wavy(x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
    """A field of any shape in which every value depends on all values of its example."""
    mixed = x.flatten(1) @ MIXING[: x[0].numel(), : x[0].numel()].to(x)
    return torch.tanh(mixed).unflatten(1, x.shape[1:]) * (1 + t).reshape(-1, *[1] * (x.ndim - 1))


MIXING = normal(6, 6, seed=5)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
def test_exact_divergence_is_the_trace_of_the_jacobian(shape):
    x, t = normal(4, *shape), torch.rand(4, dtype=torch.float64)
    v, divergence = exact_divergence(wavy, x, t, (), None)
    torch.testing.assert_close(v, wavy(x, t))
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda y, i=i: wavy(y[None], t[i : i + 1])[0], x[i])
        torch.testing.assert_close(divergence[i], jacobian.reshape(v[i].numel(), -1).trace())


def test_hutchinson_divergence_is_exact_on_average():
    x, t = normal(2, 3).repeat_interleave(4000, 0), torch.full((8000,), 0.5, dtype=torch.float64)
    exact = exact_divergence(wavy, x, t, (), None)[1]
    estimate = hutchinson_divergence(wavy, x, t, (), probes(x, SampleNoise(3)))[1]
    for some in (slice(0, 4000), slice(4000, 8000)):
        error = 3 * float(estimate[some].std()) / math.sqrt(4000)
        assert abs(float(estimate[some].mean() - exact[some].mean())) <= error
    assert estimate.std() > 0.1


def normal_log_prob(x: Tensor) -> Tensor:
    return -0.5 * x.flatten(1).square().sum(1) - 0.5 * x[0].numel() * math.log(2 * math.pi)


@pytest.mark.parametrize("solver", [Heun(40), Adaptive(1e-6, 1e-6)])
def test_density_of_a_curved_flow_integrates_to_one(solver):
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)[:, None]
    log_prob = ode_log_prob(
        lambda x, t: torch.sin(2 * x) + t[:, None], x, 1.0, 0.0, normal_log_prob, solver, divergence="exact"
    )
    assert float(torch.trapezoid(log_prob.exp(), x[:, 0])) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_density_needs_no_gradients_of_its_caller(caller, divergence):
    weight = torch.nn.Linear(3, 3, dtype=torch.float64)

    def log_prob() -> Tensor:
        x, scale = normal(4, 3), normal(4, 1, seed=1)
        return ode_log_prob(
            lambda x, t, scale: scale * torch.tanh(weight(x)), x, 1.0, 0.0, normal_log_prob, Heun(4),
            divergence=divergence, generator=SampleNoise(0), context=(scale,),
        )  # fmt: skip

    expected = log_prob()
    assert not expected.requires_grad
    with caller():
        assert torch.equal(log_prob(), expected)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_density_of_an_example_does_not_depend_on_its_batch(divergence):
    def log_prob(x: Tensor, start: int) -> Tensor:
        return ode_log_prob(
            wavy, x, 1.0, 0.0, normal_log_prob, Adaptive(1e-5, 1e-5), divergence=divergence, generator=SampleNoise(0, start)
        )

    x = normal(5, 3)
    alone = torch.cat([log_prob(x[i : i + 1], i) for i in range(5)])
    torch.testing.assert_close(alone, log_prob(x, 0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rate", [20, 40])
def test_steps_heed_the_error_of_the_density_in_many_dimensions(rate):
    """v = (5 + rate cos(rate t)) x near 0, where x is easy to follow; a step may be off by 1e-3 nats for each dimension.

    Among 200 others in one mean, and relative to an integral of a thousand nats, the density's error is off by more.
    """
    x = 0.01 * normal(3, 200)
    total = 5 + math.sin(rate)
    got = ode_log_prob(
        lambda x, t: (5 + rate * torch.cos(rate * t))[:, None] * x, x, 1.0, 0.0, normal_log_prob, Adaptive(1e-3, 1e-3),
        divergence="hutchinson", generator=SampleNoise(0),
    )  # fmt: skip
    torch.testing.assert_close(got, normal_log_prob(x * math.exp(-total)) - 200 * total, rtol=0, atol=0.5)


def test_an_integral_passes_by_itself():
    """x stays at 0, so that the integral alone chooses the steps, as many for any number of dimensions beside it."""

    def evaluations(num_dims: int, integral) -> int:
        def field(x: Tensor, t: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :-1]), 1e3 + 1e3 * torch.cos(9 * t)[:, None]], 1)

        counted = Counting(field)
        x = torch.zeros(1, num_dims + 1, dtype=torch.float64)
        error = dormand_prince(counted, x, 0.0, 1.0, 1e-4, 1e-4, integral=integral)[0, -1] - 1e3 * (1 + math.sin(9) / 9)
        assert abs(float(error)) < (0.01 if integral == "absolute" else 1)
        return counted.num_calls

    few, many = (evaluations(num_dims, "absolute") for num_dims in (1, 1000))
    assert few == many
    assert evaluations(1000, "relative") == evaluations(1, "relative") < many


def test_energy_of_straight_and_of_circular_paths():
    x, goal = normal(4, 2), normal(4, 2, seed=1)
    end, energy = path_energy(lambda x, t, goal: goal, x, 0.0, 1.0, Euler(3), (goal,))
    torch.testing.assert_close(end, x + goal)
    torch.testing.assert_close(energy, goal.square().sum(1))

    def circle(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([-x[:, 1], x[:, 0]], 1)

    for start, stop in ((0.0, 2.0), (2.0, 0.0)):
        energy = path_energy(circle, x, start, stop, Adaptive(1e-7, 1e-7))[1]
        torch.testing.assert_close(energy, 2 * x.square().sum(1), rtol=1e-5, atol=0)


# --- undoing noise ---------------------------------------------------------------------------------------------------


def denoise(x: Tensor, sigma: Tensor, *context: Tensor) -> Tensor:
    return torch.tanh(x) / (1 + sigma)[:, None]


class Draws(SampleNoise):
    """Keeps what it drew."""

    def __init__(self) -> None:
        super().__init__(0)
        self.drawn: list[Tensor] = []

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        self.drawn.append(super().normal(shape, like))
        return self.drawn[-1]


def test_ancestral_step_is_ddpms_posterior_of_the_shrinking_process():
    """Ho, Jain, Abbeel 2020, equations 6 and 7, in y = sqrt(abar) x0 + sqrt(1 - abar) z."""
    abar_t, abar_s = 0.3, 0.6
    sigma_t, sigma_s = (math.sqrt(1 / abar - 1) for abar in (abar_t, abar_s))
    x, noise = normal(5, 2), Draws()
    x0 = denoise(x, torch.full((5,), sigma_t, dtype=x.dtype))
    got = ddim(denoise, x, [sigma_t, sigma_s], eta=1.0, generator=noise) * math.sqrt(abar_s)
    alpha = abar_t / abar_s
    beta, y = 1 - alpha, x * math.sqrt(abar_t)
    mean = (math.sqrt(abar_s) * beta * x0 + math.sqrt(alpha) * (1 - abar_s) * y) / (1 - abar_t)
    variance = (1 - abar_s) / (1 - abar_t) * beta
    torch.testing.assert_close(got, mean + math.sqrt(variance) * noise.drawn[0])


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_step_is_equation_12_of_its_paper(eta):
    abar_t, abar_s = 0.3, 0.6
    sigma_t, sigma_s = (math.sqrt(1 / abar - 1) for abar in (abar_t, abar_s))
    x, noise = normal(5, 2), Draws()
    x0 = denoise(x, torch.full((5,), sigma_t, dtype=x.dtype))
    epsilon = (math.sqrt(abar_t) * x - math.sqrt(abar_t) * x0) / math.sqrt(1 - abar_t)
    fresh = eta * math.sqrt((1 - abar_s) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_s)
    expected = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s - fresh**2) * epsilon
    got = ddim(denoise, x, [sigma_t, sigma_s], eta, noise) * math.sqrt(abar_s)
    torch.testing.assert_close(got, expected + (fresh * noise.drawn[0] if eta else 0))


def test_deterministic_ddim_is_eulers_method_on_the_probability_flow():
    sigmas, x = [10.0, 3.0, 1.0, 0.2], normal(5, 2)
    torch.testing.assert_close(ddim(denoise, x, sigmas, 0.0), euler(flow_field(denoise), x, sigmas))


def test_scaled_flow_is_the_flow_in_other_coordinates():
    """dy/ds by the chain rule: y = x / r with r = sqrt(1 + sigma^2), and dsigma/ds = sigma."""
    x, sigma = normal(5, 2), torch.tensor([0.01, 0.3, 1.0, 7.0, 60.0], dtype=torch.float64)
    r = (1 + sigma.square()).sqrt()[:, None]
    along = sigma[:, None] * flow_field(denoise)(x, sigma)
    expected = along / r - x * sigma.square()[:, None] / r**3
    torch.testing.assert_close(scaled_flow_field(denoise)(x / r, sigma.log()), expected)


def test_flow_and_its_density_are_the_same_in_both_coordinates():
    def some_denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x) / (1 + sigma).reshape(-1, *[1] * (x.ndim - 1))

    def end_log_prob(x: Tensor) -> Tensor:
        return normal_log_prob(x / 10)

    x, (high, low) = 5 * normal(2, 1, 1, 2), (10.0, 0.05)
    for start, end in ((high, low), (low, high)):
        found = []
        for solver in (Adaptive(1e-6, 1e-6), Heun(150)):
            spaced = {"levels": lambda u, start=start, end=end: start * (end / start) ** u}
            there = follow_flow(solver, some_denoise, x, start, end, **spaced)
            log_prob = flow_log_prob(solver, some_denoise, x, start, end, end_log_prob, divergence="exact", **spaced)
            found.append((there, log_prob))
        for adaptive, fixed in zip(*found, strict=True):
            torch.testing.assert_close(adaptive, fixed, rtol=2e-3, atol=2e-3)


def levels(u: float) -> float:
    return 10.0 * (0.01 / 10) ** u


def test_ddim_and_euler_are_one_sampler():
    x = normal(5, 2)
    got = ProbabilityFlow(Euler(8)).undo(denoise, x, levels, SampleNoise(0))
    torch.testing.assert_close(got, DDIM(8, 0.0).undo(denoise, x, levels, SampleNoise(0)))


def karras_levels(u: float) -> float:
    return (80 ** (1 / 7) + u * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


def test_rounding_errors_of_a_denoiser_do_not_choose_the_steps():
    """The best denoiser of Gaussians around -1 and 1, and one that is off as a network is in a batch of another size."""

    def answers(error: float) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            narrow, wide = 0.05**2, sigma.square()[:, None]
            clean = (narrow * x + wide * torch.tanh(x / (narrow + wide))) / (narrow + wide)
            return clean * (1 + error)

        start = 80 * normal(128, 2, dtype=torch.float32)
        return ProbabilityFlow(Adaptive(1e-5, 1e-5)).undo(denoise, start, karras_levels, SampleNoise(0))

    torch.testing.assert_close(answers(2e-7), answers(0.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 18])
@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (ProbabilityFlow(Heun(5)), lambda steps: 2 * steps - 1),
        (ProbabilityFlow(Euler(5)), lambda steps: steps),
        (DDIM(5, 0.0), lambda steps: steps),
        (DDIM(5, 1.0), lambda steps: steps),
    ],
)
def test_evaluations_of_so_many_steps(sampler, evaluations, steps):
    counted = Counting(denoise)
    x = sampler.with_steps(steps).undo(counted, normal(5, 2), levels, SampleNoise(0))
    assert counted.num_calls == evaluations(steps)
    assert x.isfinite().all()


def test_settings_say_what_samples_depend_on():
    named: list[tuple[Solver | DDIM | ProbabilityFlow, dict[str, object]]] = [
        (Euler(3), {"solver": "euler", "steps": 3}),
        (Heun(3), {"solver": "heun", "steps": 3}),
        (Adaptive(1e-4, 1e-5), {"solver": "dormand_prince", "rtol": 1e-4, "atol": 1e-5}),
        (DDIM(3, 0.5), {"sampler": "ddim", "steps": 3, "eta": 0.5}),
        (ProbabilityFlow(Heun(3)), {"solver": "heun", "steps": 3}),
    ]
    for one, settings in named:
        assert one.settings() == settings
