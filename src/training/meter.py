"""From per-example terms to the numbers that are minimised and shown."""

import math

import torch
from torch import Tensor

from src.core.collectives import gather, num_ranks
from src.core.errors import UserError
from src.core.protocols import Terms

__all__ = ["Meter", "NonFiniteLossError", "reduce_terms", "require_finite"]


class NonFiniteLossError(UserError):
    """A term of the loss is nan or infinite."""


def reduce_terms(terms: Terms) -> tuple[Tensor, dict[str, float]]:
    """Means over the batch: the one place where losses are reduced.

    Args:
        terms: named quantities `(B,)`, one of them `loss`.

    Returns:
        The mean loss `()` to differentiate, and every mean as a number.
    """
    means = {name: values.mean() for name, values in terms.items()}
    numbers = torch.stack([mean.detach() for mean in means.values()]).tolist()
    return means["loss"], dict(zip(means, numbers, strict=True))


class Meter:
    """Means of named numbers since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, numbers: dict[str, float], weight: float = 1.0) -> None:
        """Count one batch; `weight` is its share in the mean."""
        for name, number in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * number
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_other_ranks(self) -> None:
        """Count what all ranks have counted; each name that one of them has."""
        if num_ranks() == 1:
            return
        states = gather(self.state_dict())
        self._sums, self._weights = {}, {}
        for state in states:
            for name, total in state["sums"].items():
                self._sums[name] = self._sums.get(name, 0.0) + total
                self._weights[name] = self._weights.get(name, 0.0) + state["weights"][name]

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"sums": self._sums, "weights": self._weights}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])

    def take(self) -> dict[str, float]:
        """The means so far; starts anew."""
        means = {name: total / self._weights[name] for name, total in self._sums.items()}
        self._sums, self._weights = {}, {}
        return means


def require_finite(numbers: dict[str, float], step: int, split: str) -> None:
    """Raise `NonFiniteLossError`, naming the term, its split and the step, if a number is nan or infinite."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise NonFiniteLossError(
                f"{split}/{name} became {number} at step {step}; the run stops before it is used, and the last checkpoint "
                "is kept (the usual cure is a lower learning rate: optim.lr=, optim.generator.lr=, optim.discriminator.lr=)"
            )
