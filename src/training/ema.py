"""Exponential moving average of a network's weights.

References:
    Polyak, Juditsky 1992; Karras et al. 2018, "Progressive growing of GANs", arXiv:1710.10196 (for generators);
    Karras et al. 2020, StyleGAN2-ADA, whose warm-up of the half-life is used here.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["WeightAverage"]

_WARM_UP = 0.05  # the half-life is at most this share of the examples seen so far (StyleGAN2-ADA: ema_rampup)


class WeightAverage(nn.Module):
    """A slowly following copy of a network.

    After each update w_avg <- w_avg * d + w * (1 - d) with d = 0.5^(examples / half-life), so the half-life does not
    depend on the batch size. Buffers (batch norm's statistics) are copied, not averaged.

    Args:
        network: what to follow.
        half_life_examples: training examples after which an old weight counts half.
    """

    def __init__(self, network: nn.Module, half_life_examples: float) -> None:
        super().__init__()
        self.average = copy.deepcopy(network).requires_grad_(False)
        self._half_life = half_life_examples

    def restart(self, network: nn.Module) -> None:
        """Begin anew at the weights of `network`."""
        self.average.load_state_dict(network.state_dict())

    @torch.no_grad()
    def update(self, network: nn.Module, num_examples: int, examples_seen: int) -> None:
        """Move towards the weights of `network` after a batch of `num_examples`; `examples_seen` counts it."""
        half_life = min(self._half_life, _WARM_UP * examples_seen)
        weight = 1 - 0.5 ** (num_examples / half_life)
        torch._foreach_lerp_(list(self.average.parameters()), list(network.parameters()), weight)
        for mine, theirs in zip(self.average.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    @contextmanager
    def swapped_into(self, network: nn.Module) -> Iterator[None]:
        """Give `network` the averaged weights inside the block, and its own ones back after it, whatever happens."""
        self._swap(network)
        try:
            yield
        finally:
            self._swap(network)

    @torch.no_grad()
    def _swap(self, network: nn.Module) -> None:
        mine = [*self.average.parameters(), *self.average.buffers()]
        theirs = [*network.parameters(), *network.buffers()]
        for a, b in zip(mine, theirs, strict=True):
            a.data, b.data = b.data, a.data
