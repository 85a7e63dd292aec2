"""What is minimised in place of a VAE's KL while it is trained, so that it does not give up its latents early.

Held-out losses and reported bounds never contain it: there the KL is the KL.

References:
    Bowman et al. 2016, "Generating sentences from a continuous space", arXiv:1511.06349: warm-up.
    Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow", arXiv:1606.04934, appendix C.8:
        free bits.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from src.core.collectives import num_ranks, sum_over_ranks
from src.core.errors import UserError, require_number

__all__ = ["Constant", "FreeBits", "KLWeight", "WarmUp"]


class KLWeight(ABC):
    """From the KL of every dimension to what is minimised for it."""

    @abstractmethod
    def __call__(self, kl_per_dim: Tensor, examples_seen: float) -> Tensor:
        """From `(B, D)` in nats, with the training examples seen so far, to `(B,)`."""


class Constant(KLWeight):
    """The KL itself."""

    def __call__(self, kl_per_dim: Tensor, examples_seen: float) -> Tensor:
        return kl_per_dim.sum(1)


class WarmUp(KLWeight):
    """The KL times a factor that rises to 1 in a straight line.

    Args:
        examples: training examples until it is 1.
        start: the factor at the first one, from 0 to below 1.
    """

    def __init__(self, examples: float, start: float) -> None:
        require_number("kl_weight.examples", examples, 1)
        if start is None or not 0 <= start < 1:
            raise UserError(f"kl_weight.start={start} must be at least 0 and below 1")
        self._examples = examples
        self._start = start

    def factor(self, examples_seen: float) -> float:
        return self._start + (1 - self._start) * min(1.0, examples_seen / self._examples)

    def __call__(self, kl_per_dim: Tensor, examples_seen: float) -> Tensor:
        return self.factor(examples_seen) * kl_per_dim.sum(1)


class FreeBits(KLWeight):
    """sum_d max(nats, mean KL_d), with the mean over the batch: a dimension is not pushed below so much information.

    Per example: the KL of the dimensions above the floor, and the floor for those below it, which get no gradient. The
    mean is over the batches that all devices take at the same time; accumulated batches have a mean each.

    Args:
        nats: the floor of each dimension, in nats.
    """

    def __init__(self, nats: float) -> None:
        require_number("kl_weight.nats", nats, 0)
        self._nats = nats

    def __call__(self, kl_per_dim: Tensor, examples_seen: float) -> Tensor:
        mean = sum_over_ranks(kl_per_dim.mean(0)) / num_ranks()
        return kl_per_dim.where(mean > self._nats, self._nats).sum(1)
