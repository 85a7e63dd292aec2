"""What is known of flow matching, diffusion, and the solvers of both, between Gaussians: their best fields are formulas.

All is computed by the functions that train and sample models. As in `selftest`, random values have fixed seeds.

References:
    Lipman et al. 2023, arXiv:2210.02747: the best field is the mean velocity of all paths through a point.
    Karras et al. 2022, arXiv:2206.00364, appendix B: the best denoiser.
    Ho, Jain, Abbeel 2020, arXiv:2006.11239, equation 5: the variational bound of a chain of denoising steps.
    Dowson, Landau 1982, "The Frechet distance between multivariate normal distributions": the Wasserstein distance.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from src.core.rng import Noise, SampleNoise
from src.evaluation.oracle import Oracle
from src.metrics.frechet import frechet_distance
from src.objectives.diffusion import EDM, Cosine, Epsilon, Linear, LogNormal, Noising, Prediction, V
from src.objectives.matching import StraightPath, matching_loss
from src.objectives.transport import Independent, OptimalTransport
from src.samplers.diffusion import DDIM, ProbabilityFlow, UndoesNoise, ddim
from src.samplers.ode import Adaptive, Euler, Heun, Solver, ode_log_prob

__all__ = ["CHECKS", "gaussian_denoiser", "gaussian_field"]

_ERRORS = 3  # standard errors that a mean of random values may be off


def gaussian_field(mu: float, sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The best field of straight paths from N(0, I) to N(mu, sigma^2 I), independently paired, called as `field(x, t)`.

    u(x, t) = mu + (t sigma^2 - (1 - t)) / ((1 - t)^2 + t^2 sigma^2) (x - t mu). Its flow is x0 -> mu + sigma x0.
    """

    def field(x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        slope = (t * sigma**2 - (1 - t)) / ((1 - t).square() + (t * sigma).square())
        return mu + slope * (x - t * mu)

    return field


def gaussian_denoiser(mu: float, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x0 | x] for x0 ~ N(mu, scale^2 I) and x = x0 + sigma z, called as `denoise(x, sigma)`."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        share = scale**2 / (scale**2 + sigma.square())
        return mu + share.reshape(-1, *[1] * (x.ndim - 1)) * (x - mu)

    return denoise


# --- flow matching ---------------------------------------------------------------------------------------------------


def irreducible_matching_loss() -> Iterator[Oracle]:
    """The best field is left with sigma pi / 2 per dimension from N(0, I) to N(mu, sigma^2 I): less is a leak."""
    for sigma in (0.5, 1.0, 2.0):
        losses = _matching_losses(gaussian_field(0.7, sigma), 0.7, sigma)
        yield _mean_oracle(f"flow matching loss of the best field, sigma = {sigma:g}", sigma * math.pi / 2, losses)
    losses = _matching_losses(lambda x, t: torch.zeros_like(x), 0.0, 1.0)
    yield _mean_oracle("flow matching loss of a field of zeros, N(0, I) to itself", 2.0, losses)


def _matching_losses(field: Callable[[Tensor, Tensor], Tensor], mu: float, sigma: float) -> Tensor:
    noise, count, dim = SampleNoise(0), 20_000, 4
    x0, z = (noise.normal((count, dim), _FLOAT64) for _ in range(2))
    x1 = mu + sigma * z
    t = (torch.arange(count, dtype=torch.float64) + noise.uniform((count,), _FLOAT64)) / count
    x_t, target = StraightPath().at(x0[Independent().order(x0, x1, None)], x1, t)
    return matching_loss(field(x_t, t), target)


def flow_between_gaussians() -> Iterator[Oracle]:
    """The flow of the best field takes x0 to mu + sigma x0."""
    mu, sigma, x0 = 1.5, 0.5, _normal(64, 3)
    for solver, tolerance in ((Heun(200), 1e-4), (Adaptive(1e-7, 1e-7), 1e-5)):
        x1 = solver.integrate(gaussian_field(mu, sigma), x0, 0.0, 1.0)
        off = float((x1 - (mu + sigma * x0)).abs().max())
        yield Oracle(f"flow map between Gaussians by {type(solver).__name__}, largest error", 0.0, off, tolerance)


def orders_of_solvers() -> Iterator[Oracle]:
    """Half the step, half the error of Euler's method and a quarter of that of Heun's."""
    mu, sigma, x0 = 1.5, 0.5, _normal(64, 3)

    def error(solver: Solver) -> float:
        x1 = solver.integrate(gaussian_field(mu, sigma), x0, 0.0, 1.0)
        return float((x1 - (mu + sigma * x0)).square().mean().sqrt())

    for kind, order in ((Euler, 1), (Heun, 2)):
        slope = math.log2(error(kind(80)) / error(kind(160)))
        yield Oracle(f"order of {kind.__name__}", float(order), slope, 0.1)


def energy_of_optimal_pairs() -> Iterator[Oracle]:
    """Straight paths of the cheapest pairs have the energy W2^2, from above as batches grow; the best map has it exactly.

    From N(0, I) to N(mu, diag(s)^2), W2^2 = |mu|^2 + sum (s - 1)^2; independent pairs have |mu|^2 + sum (s^2 + 1).
    """
    mu, scales = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    one = torch.eye(2, dtype=torch.float64)
    floor = float(frechet_distance(torch.zeros_like(mu), one, mu, scales.square().diag()))
    yield Oracle("squared W2 of the Gaussians that are paired", 5 + 0.25 + 1, floor, 1e-9)
    noise = SampleNoise(0)
    x0, z = (noise.normal((1024, 2), mu) for _ in range(2))
    x1 = mu + scales * z
    energies = {}
    for size in (16, 64, 256, 1024):  # the same examples, so that larger batches cannot be worse
        costs = []
        for some0, some1 in zip(x0.split(size), x1.split(size), strict=True):
            order = OptimalTransport().order(some0, some1, None)
            costs.append(float((some1 - some0[order]).square().sum(1).mean()))
        energies[size] = sum(costs) / len(costs)
    falls = all(energies[a] > energies[b] for a, b in itertools.pairwise(energies))
    yield Oracle("path energy falls as batches grow", "yes", "yes" if falls else str(energies))
    yield Oracle("path energy of optimal pairs in batches of 1024, over squared W2", 1.0, energies[1024] / floor, 0.05)


# --- likelihood ------------------------------------------------------------------------------------------------------


def likelihood_of_linear_fields() -> Iterator[Oracle]:
    """u = a x carries p0 to log p1(x) = log p0(e^-a x) - a D, and a probe of signs knows a D without error."""
    rate = 0.8
    for shape in ((2,), (6,), (1, 4, 4)):
        x, dim = _normal(8, *shape).float(), math.prod(shape)
        start = (x * math.exp(-rate)).flatten(1).double()
        expected = -0.5 * start.square().sum(1) - 0.5 * dim * math.log(2 * math.pi) - rate * dim
        for divergence in ("exact", "hutchinson"):
            got = ode_log_prob(
                lambda x, t: rate * x,
                x,
                1.0,
                0.0,
                lambda x: -0.5 * x.flatten(1).square().sum(1) - 0.5 * x[0].numel() * math.log(2 * math.pi),
                Adaptive(1e-6, 1e-6),
                divergence=divergence,
                generator=SampleNoise(1),
            )
            off = float(((got.double() - expected) / expected).abs().max())
            shown = "x".join(map(str, shape))
            yield Oracle(f"{divergence} likelihood of a linear field, D = {shown}, relative error", 0.0, off, 1e-5)


# --- diffusion -------------------------------------------------------------------------------------------------------


def loss_of_zero_networks() -> Iterator[Oracle]:
    """A network of zeros is EDM's best one on N(0, sigma_data^2 I), with a loss of 1 at every level; epsilon's is E z^2."""
    noise = SampleNoise(3)
    kinds: tuple[tuple[str, Prediction], ...] = (("EDM", EDM(0.5)), ("epsilon", Epsilon()), ("v", V()))
    for name, prediction in kinds:
        x0 = prediction.sigma_data * noise.normal((20_000, 4), _FLOAT64)
        for sigma in (0.01, 0.5, 20.0):
            level = torch.full((len(x0), 1), sigma, dtype=torch.float64)
            target = prediction.target(x0 + level * noise.normal(tuple(x0.shape), _FLOAT64), level, x0)
            losses = matching_loss(torch.zeros_like(target), target)
            yield _mean_oracle(f"{name} loss of a network of zeros, noise level {sigma:g}", 1.0, losses)


def samplers_on_gaussian_data() -> Iterator[Oracle]:
    """With the best denoiser samples have the mean and the variance of the data, which are N(mu, scale^2 I)."""
    mu, scale = 1.5, 0.5
    noises: tuple[tuple[str, Noising], ...] = (
        ("EDM", LogNormal(mean=-1.2, std=1.2, sigma_max=80.0, sigma_min=0.002, rho=7.0)),
        ("linear", Linear()),
        ("cosine", Cosine()),
    )
    ways: tuple[tuple[str, UndoesNoise], ...] = (
        ("Heun", ProbabilityFlow(Heun(64))),
        ("DDIM", DDIM(500, 0.0)),
        ("ancestral", DDIM(1000, 1.0)),
    )
    for name, noise in noises:
        for way, sampler in ways:
            generator = _UncorrelatedNoise()
            start = math.hypot(noise.level(0.0), 1.0) * generator.normal((2048, 1), _FLOAT64)
            x = sampler.undo(gaussian_denoiser(mu, scale), start, noise.level, generator)
            found = f"of samples by {way}, {name} noise levels"
            yield Oracle(f"mean {found}", mu, float(x.mean()), 0.02 * mu)
            yield Oracle(f"variance {found}", scale**2, float(x.var(correction=0)), 0.02 * scale**2)


def bound_of_ancestral_sampling() -> Iterator[Oracle]:
    """The steps of ancestral sampling are a model with latents: its bound is never above its log likelihood, and both come
    to that of the data as the steps become many.

    With the best denoiser of N(mu, scale^2) all is Gaussian. The last step, to no noise, has none of its own and so no
    density: the chain ends at the lowest noise level, where the data are N(mu, scale^2 + level^2).
    """
    noise = LogNormal(mean=-1.2, std=1.2, sigma_max=80.0, sigma_min=0.002, rho=7.0)
    mu, scale = 1.5, 0.5
    spread = math.hypot(scale, noise.level(1.0))
    entropy = 0.5 * math.log(2 * math.pi * math.e * spread**2)
    few = mu + spread * torch.tensor([-1.0, 1.0], dtype=torch.float64)  # what is quadratic has its mean over the data here
    many = mu + spread * torch.linspace(-4, 4, 33, dtype=torch.float64)
    gaps, excess = {}, {}
    for steps in (250, 500, 1000):
        levels = [noise.level(k / steps) for k in range(steps + 1)]
        moves = [_move(gaussian_denoiser(mu, scale), *pair) for pair in itertools.pairwise(levels)]
        least = float((_negative_bound(many, levels, moves) - _negative_log_prob(many, levels, moves)).min())
        yield Oracle(f"bound of {steps} ancestral steps is never above log p", "yes", "yes" if least >= 0 else str(least))
        bound, exact = (float(of(few, levels, moves).mean()) for of in (_negative_bound, _negative_log_prob))
        gaps[steps], excess[steps] = bound - exact, bound - entropy
    for steps in (500, 1000):
        order = math.log2(gaps[steps // 2] / gaps[steps])
        yield Oracle(f"order in which the gap of that bound closes, {steps} steps", 1.0, order, 0.1)
    yield Oracle("bound of 1000 ancestral steps, nats from the entropy of the data", 0.0, excess[1000], 0.1)


def _move(denoise: Callable[[Tensor, Tensor], Tensor], level: float, following: float) -> tuple[float, float, float]:
    """a, b and v of one step p(x_s | x_t) = N(a x_t + b, v^2), read off the sampler, which is linear in x and its noise."""

    def step(x: float, z: float) -> float:
        return float(ddim(denoise, torch.full((1, 1), x, dtype=torch.float64), (level, following), 1.0, _ConstantNoise(z)))

    b = step(0.0, 0.0)
    return step(1.0, 0.0) - b, b, step(0.0, 1.0) - b


_Moves = list[tuple[float, float, float]]


def _negative_log_prob(x: Tensor, levels: list[float], moves: _Moves) -> Tensor:
    """-log p(x) at the last level, `(B,)`: the steps are composed."""
    mean, variance = 0.0, 1 + levels[0] ** 2
    for a, b, v in moves:
        mean, variance = a * mean + b, a**2 * variance + v**2
    return 0.5 * (x - mean).square() / variance + 0.5 * math.log(2 * math.pi * variance)


def _negative_bound(x: Tensor, levels: list[float], moves: _Moves) -> Tensor:
    """KL(q(x_T | x) | p(x_T)) + sum E KL(q(x_s | x_t, x) | p(x_s | x_t)) - E log p(x | x_t) of x at the last level, `(B,)`.

    Noise is added in independent steps: q(x_t | x) = N(x, t^2 - last^2).
    """
    added = [level**2 - levels[-1] ** 2 for level in levels]
    start = 1 + levels[0] ** 2
    total = 0.5 * ((x.square() + added[0]) / start - 1 + math.log(start / added[0]))
    for (a, b, v), before, after in zip(moves, added[:-1], added[1:], strict=True):
        share, variance = after / before, after * (before - after) / before
        apart = (x - a * x - b).square() + (share - a) ** 2 * before  # of the two means, squared, on average
        constant = 0.5 * math.log(v**2 / variance) - 0.5 if after else 0.5 * math.log(2 * math.pi * v**2)
        total = total + 0.5 * (variance + apart) / v**2 + constant
    return total


class _ConstantNoise(Noise):
    """One value everywhere."""

    def __init__(self, value: float) -> None:
        self._value = value

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_full(shape, self._value)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        raise NotImplementedError


class _UncorrelatedNoise(Noise):
    """Columns of a Hadamard matrix: signs whose mean is 0, variance 1, and correlation with all others 0, exactly.

    What is a linear function of such noise has the exact mean and variance that it would have of N(0, 1).
    """

    def __init__(self) -> None:
        self._column = 0

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        rows = torch.arange(shape[0])
        self._column += 1
        assert shape == (len(rows), 1)
        assert self._column < len(rows)
        shared = rows & self._column
        for shift in (8, 4, 2, 1):  # the parity of the bits that row and column share
            shared = shared ^ (shared >> shift)
        return (1 - 2 * (shared & 1)).to(like)[:, None]

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        raise NotImplementedError


CHECKS: tuple[Callable[[], Iterator[Oracle]], ...] = (
    irreducible_matching_loss,
    flow_between_gaussians,
    orders_of_solvers,
    energy_of_optimal_pairs,
    likelihood_of_linear_fields,
    loss_of_zero_networks,
    samplers_on_gaussian_data,
    bound_of_ancestral_sampling,
)

_FLOAT64 = torch.zeros((), dtype=torch.float64)


def _normal(*shape: int) -> Tensor:
    return SampleNoise(0).normal(shape, _FLOAT64)


def _mean_oracle(name: str, expected: float, values: Tensor) -> Oracle:
    """The mean of random values, to three standard errors."""
    standard_error = float(values.double().std()) / math.sqrt(len(values))
    return Oracle(name, expected, float(values.double().mean()), _ERRORS * standard_error)
