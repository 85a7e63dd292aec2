"""The two losses of a generative adversarial network, from logits, per example.

A logit l says how real an example looks: D = sigmoid(l). With softplus(l) = log(1 + exp(l)):
    -log D = softplus(-l),    -log(1 - D) = softplus(l),
so no probability and no logarithm of one is ever formed.

References:
    Goodfellow et al. 2014, "Generative adversarial networks", arXiv:1406.2661, equation 1 and section 3.
"""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F

__all__ = ["AdversarialLoss", "Minimax", "NonSaturating"]


class AdversarialLoss(ABC):
    """What the two players minimise."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """-log D(x) - log(1 - D(G(z))), `(B,)` in nats, from logits `(B,)`. 2 log 2 where D cannot tell."""
        return F.softplus(-real) + F.softplus(fake)

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor:
        """The generator's loss, `(B,)` in nats, from the logits `(B,)` of its samples."""


class NonSaturating(AdversarialLoss):
    """Maximise log D(G(z)): strong gradients while the discriminator wins."""

    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake)


class Minimax(AdversarialLoss):
    """Minimise log(1 - D(G(z))), the zero-sum game; its gradient vanishes where the discriminator is sure."""

    def generator(self, fake: Tensor) -> Tensor:
        return -F.softplus(fake)
