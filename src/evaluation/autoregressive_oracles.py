"""Known values of autoregressive networks: nothing looks ahead, and all probabilities sum to 1."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from src.core.rng import SampleNoise
from src.evaluation.oracle import Oracle
from src.networks.pixelcnn import GatedPixelCNN

__all__ = ["CHECKS"]

Oracles = Iterator[Oracle]

_GRID, _NUM_CODES = (2, 2), 3


def probabilities_of_all_grids() -> Oracles:
    """The sum of p over all grids of 2 x 2 codes out of 3."""
    network = _network()
    grids = torch.tensor(list(itertools.product(range(_NUM_CODES), repeat=4))).unflatten(1, _GRID)
    log_p = network(grids).log_softmax(1).gather(1, grids[:, None]).sum((1, 2, 3))
    yield Oracle("sum of the probabilities of all grids, PixelCNN", 1.0, float(log_p.exp().sum()), 1e-12)


def no_place_sees_itself_or_a_later_one() -> Oracles:
    """The largest change of a logit when a code at its own place or a later one changes, on a grid of 3 x 3."""
    network, size = _network(), (3, 3)
    codes = torch.zeros(1, *size, dtype=torch.int64)
    before, worst, least = network(codes).flatten(2), 0.0, float("inf")
    for place in range(size[0] * size[1]):
        changed = codes.flatten(1).clone()
        changed[0, place] = 1
        change = (network(changed.unflatten(1, size)).flatten(2) - before).abs().amax((0, 1))
        worst = max(worst, float(change[: place + 1].max()))
        if place + 1 < change.numel():
            least = min(least, float(change[place + 1]))
    yield Oracle("change of logits by codes that come later, PixelCNN", 0.0, worst)
    yield Oracle("every logit changes with the code before it, PixelCNN", "yes", "yes" if least > 0 else "no")


CHECKS: tuple[Callable[[], Oracles], ...] = (probabilities_of_all_grids, no_place_sees_itself_or_a_later_one)


@torch.no_grad()
def _network() -> GatedPixelCNN:
    """In float64, with weights that depend on nothing else that is random."""
    with torch.random.fork_rng():
        network = GatedPixelCNN(_NUM_CODES, width=6, num_layers=2, kernel_size=3).double()
    for i, weight in enumerate(network.parameters()):
        weight.copy_(0.3 * SampleNoise(i).normal(tuple(weight.shape), _like(weight)))
    return network.requires_grad_(False)


def _like(weight: Tensor) -> Tensor:
    return torch.zeros((), dtype=weight.dtype)
