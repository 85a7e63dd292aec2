"""Oracles of normalizing flows and of dequantization: inverses, determinants, masses, and probabilities of levels.

    z = f(x),  log p(x) = log N(z; 0, I) + log |det df/dx|,    integral of p = 1
    P(x) = E_q(v | x) [ p(v) / q(v | x) ]  for any q on the bin of x,    sum over x of P(x) = 1

Weights are random and far from zero, so that no layer is the identity.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.rng import SampleNoise, StreamNoise
from src.core.shapes import sum_event
from src.core.spec import CONTINUOUS, DISCRETE, DataSpec, Values
from src.evaluation.oracle import Oracle
from src.models.flow import Flow
from src.networks.autoregressive_flow import MaskedAutoregressiveFlow, NeuralSplineFlow
from src.networks.coupling_flow import CouplingFlow
from src.networks.scaling import Scaling
from src.objectives.dequantization import UniformDequantization, VariationalDequantization, dequantize, quantize

__all__ = ["CHECKS", "FLOWS", "Identity", "awake", "image_levels", "log_det_by_autograd", "real_vectors", "small_flow"]

_ERRORS = 3  # standard errors that a mean of random values may be off
_SPLINES: dict[str, Any] = {"hidden": [16], "num_transforms": 2, "num_bins": 4}
_AFFINE: dict[str, Any] = {"hidden": [16], "num_transforms": 2}
_IMAGES: dict[str, Any] = {"widths": [6, 6], "num_couplings": 6, "num_blocks": 1}

FLOWS: dict[str, tuple[tuple[int, ...], Callable[..., nn.Module]]] = {
    "spline couplings": ((5,), partial(NeuralSplineFlow, passes=2, **_SPLINES)),
    "autoregressive splines": ((5,), partial(NeuralSplineFlow, passes=None, **_SPLINES)),
    "spline of one value": ((1,), partial(NeuralSplineFlow, passes=2, **_SPLINES)),
    "masked autoregressive flow": ((5,), partial(MaskedAutoregressiveFlow, passes=None, **_AFFINE)),
    "coupling flow of grey images": ((1, 4, 8), partial(CouplingFlow, **_IMAGES)),
    "coupling flow of colour images": ((3, 4, 4), partial(CouplingFlow, **_IMAGES)),
}
"""Small flows by name, each with the shape of its events."""

Oracles = Iterator[Oracle]


class Identity(nn.Module):
    """z = x: with it a flow of values in a range has independent logit-normal ones."""

    def __init__(self, in_shape: tuple[int, ...], condition_dim: int = 0) -> None:
        super().__init__()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return z


class _Uniform(Identity):
    """From the logit of u to the normal quantile of u: with it a flow is uniform on its range."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.special.ndtri(x.sigmoid())
        log_normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        slope = nn.functional.logsigmoid(x) + nn.functional.logsigmoid(-x)
        return z, sum_event(slope - log_normal)


def image_levels(shape: tuple[int, ...], levels: int) -> DataSpec:
    """Images of so many grey levels."""
    return DataSpec("oracle", "image", shape, Values(DISCRETE, -1.0, 1.0, levels))


def real_vectors(dim: int) -> DataSpec:
    """Unbounded real vectors."""
    return DataSpec("oracle", "vector", (dim,), Values(CONTINUOUS, -math.inf, math.inf, None))


def small_flow(name: str, dtype: torch.dtype, condition_dim: int = 0) -> nn.Module:
    """One of `FLOWS` with random weights."""
    shape, build = FLOWS[name]
    return _built(partial(build, in_shape=shape, condition_dim=condition_dim)).to(dtype)


@torch.no_grad()
def awake(network: nn.Module, std: float = 0.1) -> nn.Module:
    """The network after weights that begin at zero have left it."""
    for i, weight in enumerate(network.parameters()):
        if not weight.any():
            weight.copy_(std * SampleNoise(i).normal((1, *weight.shape), weight)[0])
    return network


def log_det_by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """log |det| of the Jacobian of a function at one x `(*event)`, given as `(1, *event)`."""
    jacobian = torch.autograd.functional.jacobian(lambda flat: function(flat.view(1, *x.shape)).flatten(), x.flatten())
    return float(torch.linalg.slogdet(jacobian)[1])


# --- inverse and determinant -----------------------------------------------------------------------------------------


def inverses() -> Oracles:
    """Largest error of f^-1(f(x)) for x ~ N(0, 4 I), in float32."""
    for name, (shape, _) in FLOWS.items():
        x = 2 * _normal((64, *shape), seed=1).float()
        with torch.no_grad():
            network = small_flow(name, torch.float32)
            error = float((network.inverse(network(x)[0]) - x).abs().max())
        yield Oracle(f"inverse error, {name}", 0.0, error, 1e-4)


def determinants() -> Oracles:
    """log |det df/dx| beside the Jacobian by automatic differentiation, in float64; largest error of three points."""
    for name, (shape, _) in FLOWS.items():
        network, x = small_flow(name, torch.float64), _normal((3, *shape), seed=2)
        found = network(x)[1].detach()
        by_autograd = [log_det_by_autograd(partial(_first, network), point) for point in x]
        error = max(abs(a - float(b)) for a, b in zip(by_autograd, found, strict=True))
        yield Oracle(f"log determinant error, {name}", 0.0, error, 1e-8)
    scaling, v = Scaling((5,), is_bounded=True).double(), SampleNoise(3).uniform((20, 5), _normal((1,), seed=0))
    scaling.fit([v])
    error = abs(log_det_by_autograd(partial(_first, scaling), v[0]) - float(scaling(v[:1])[1]))
    yield Oracle("log determinant error, logit and scaling", 0.0, error, 1e-8)


# --- densities -------------------------------------------------------------------------------------------------------


def masses() -> Oracles:
    """The integral of the density over the plane, by a sum on a grid, after a short training on two noisy arcs."""
    for name, network in (
        ("spline couplings", partial(NeuralSplineFlow, passes=2, **_SPLINES)),
        ("masked autoregressive flow", partial(MaskedAutoregressiveFlow, passes=None, **_AFFINE)),
    ):
        model = _trained(network, _arcs(1000), steps=60, lr=5e-3)
        side = torch.linspace(-5, 5, 241)
        grid = torch.cartesian_prod(side, side)
        with torch.no_grad():
            mass = float(model.log_prob(grid).double().exp().sum()) * float(side[1] - side[0]) ** 2
        yield Oracle(f"mass of a trained density, {name}", 1.0, mass, 0.01)


def entropy_of_a_gaussian() -> Oracles:
    """An affine flow of Gaussian data reaches their entropy 1/2 log det(2 pi e S) as its cross-entropy.

    The points have exactly the covariance S, so for a flow with constant scales the mean over them is the expectation.
    """
    dim = 3
    root = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [-1.0, 0.8, 0.4]], dtype=torch.float64)
    white = _normal((4000, dim), seed=5)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / len(white))).T
    x = (white @ root.T + torch.tensor([3.0, -1.0, 0.5])).float()
    entropy = 0.5 * dim * (1 + math.log(2 * math.pi)) + float(root.diagonal().log().sum())
    linear = partial(MaskedAutoregressiveFlow, hidden=[], num_transforms=1, passes=None)
    model = _trained(linear, x, steps=300, lr=0.3)
    with torch.no_grad():
        found = -float(model.log_prob(x).double().mean())
    yield Oracle("cross-entropy of an affine flow of Gaussian data", entropy, found, 0.005)


# --- dequantization --------------------------------------------------------------------------------------------------


def bits_of_a_uniform_model() -> Oracles:
    """A uniform model needs log2 L bits for each of L levels, whatever they are."""
    for levels in (256, 32, 2):
        spec = image_levels((1, 8, 8), levels)
        x = spec.to_units((SampleNoise(6).uniform((16, 1, 8, 8), torch.zeros(())) * levels).long().clamp(max=levels - 1))
        model = Flow(spec, _Uniform, UniformDequantization, num_dequantizations=2)
        bits = -float(model.log_prob_bound(x, generator=SampleNoise(7)).mean()) / (spec.num_dims * math.log(2))
        yield Oracle(f"bits/dim of {levels} levels by a uniform flow", math.log2(levels), bits, 2e-4)


def dequantized_stay_in_their_bins() -> Oracles:
    """Rounding takes every dequantized level back to where it was, and the noise is as wide as the bin."""
    for levels in (2, 256, 4096):
        spec = image_levels((1, 16, 16), levels)
        x = spec.to_units(torch.arange(256).mul(levels - 1).div(255, rounding_mode="floor").view(1, 1, 16, 16))
        y, log_volume = dequantize(x.expand(200, -1, -1, -1), spec, SampleNoise(8))
        yield Oracle(f"levels changed by dequantization, {levels}", 0.0, float((quantize(y, spec) != x).sum()))
        yield Oracle(f"log volume of a bin, {levels} levels", math.log(2 / (levels - 1)), log_volume / spec.num_dims, 1e-12)


def probabilities_of_levels() -> Oracles:
    """E_q[p(v) / q(v | x)] is P(x) for uniform and for any other noise, here of four pixels with logit-normal v.

    P of a level is then the normal probability of the logits of its bin, and all P add up to 1.
    """
    spec, num_draws = image_levels((1, 2, 2), 4), 4000
    edges = torch.tensor([0.0, 1 / 4, 2 / 4, 3 / 4, 1.0], dtype=torch.float64).clamp(1e-5, 1 - 1e-5).logit()
    of_level = torch.special.ndtr(edges).diff()
    yield Oracle("sum of the probabilities of all levels", 1.0, float(of_level.sum()), 1e-12)
    levels = torch.tensor([[[0, 1], [2, 3]]])
    x = spec.to_units(levels).double().expand(num_draws, -1, -1, -1)
    expected = float(of_level[levels].prod())
    learned = partial(VariationalDequantization, network=partial(CouplingFlow, widths=[6], num_couplings=4, num_blocks=1))
    for name, dequantization in (("uniform", UniformDequantization), ("learned", learned)):
        model = _built(partial(Flow, spec, Identity, dequantization, num_dequantizations=1)).double()
        with torch.no_grad():
            weights = model.log_prob_bound(x, generator=SampleNoise(9)).exp()
        error = _ERRORS * float(weights.std()) / math.sqrt(num_draws)
        yield Oracle(f"probability of an image by {name} noise", expected, float(weights.mean()), error)


def learned_noise_at_its_start() -> Oracles:
    """While its flow is the identity, learned noise is uniform noise: the same bound by the same draws."""
    spec = image_levels((1, 4, 4), 256)
    x = spec.to_units(torch.arange(32).view(2, 1, 4, 4) * 8)
    network = partial(CouplingFlow, widths=[4], num_couplings=2, num_blocks=1)
    bounds = []
    for kind in (UniformDequantization, partial(VariationalDequantization, network=network)):
        with torch.random.fork_rng():
            model = Flow(spec, Identity, kind, num_dequantizations=4).double()
        bounds.append(float(model.log_prob_bound(x.double(), generator=SampleNoise(10)).mean().detach()))
    yield Oracle("bound by learned noise at its start", bounds[0], bounds[1], 1e-9 * abs(bounds[0]))


CHECKS: tuple[Callable[[], Oracles], ...] = (
    inverses,
    determinants,
    masses,
    entropy_of_a_gaussian,
    bits_of_a_uniform_model,
    dequantized_stay_in_their_bins,
    probabilities_of_levels,
    learned_noise_at_its_start,
)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros((), dtype=torch.float64))


def _first(network: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    return network(x)[0]


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights are the same in every call, and not zero; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return awake(build())


def _arcs(count: int) -> Tensor:
    """Points about two half circles, one turned over and moved, as float32 `(count, 2)`."""
    u = SampleNoise(4).uniform((count,), torch.zeros(()))
    is_second = torch.arange(count) % 2 == 1
    angle = math.pi * u
    first = torch.stack([angle.cos(), angle.sin()], 1)
    second = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return torch.where(is_second[:, None], second, first) + 0.1 * _normal((count, 2), seed=5).float()


def _trained(network: Callable[..., nn.Module], x: Tensor, steps: int, lr: float) -> Flow:
    """A flow of real vectors after so many steps of Adam on all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Flow(real_vectors(x.shape[1]), network, UniformDequantization, num_dequantizations=1)
    model.prepare(lambda: [Batch(x)], generator=StreamNoise(0))
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(Batch(x))["loss"].mean().backward()
        optimizer.step()
        schedule.step()
    return model
