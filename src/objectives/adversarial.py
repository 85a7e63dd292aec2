"""The two losses of a generative adversarial network, from logits, per example.

A logit l says how real an example looks: D = sigmoid(l). With softplus(l) = log(1 + exp(l)):
    -log D = softplus(-l),    -log(1 - D) = softplus(l),
so no probability and no logarithm of one is ever formed.

References:
    Goodfellow et al. 2014, "Generative adversarial networks", arXiv:1406.2661, equation 1 and section 3.
    Mao et al. 2017, "Least squares generative adversarial networks", arXiv:1611.04076, equation 9.
    Arjovsky, Chintala, Bottou 2017, "Wasserstein GAN", arXiv:1701.07875.
    Lim, Ye 2017, "Geometric GAN", arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957: the hinge.
    Jolicoeur-Martineau 2019, "The relativistic discriminator", arXiv:1807.00734; Huang et al. 2024, "The GAN is dead; long
    live the GAN!", arXiv:2501.05441, equation 2: pairs.
"""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F

from src.core.errors import require_number

__all__ = [
    "AdversarialLoss",
    "Hinge",
    "LeastSquares",
    "Minimax",
    "NonSaturating",
    "Relativistic",
    "Wasserstein",
]


class AdversarialLoss(ABC):
    """What the two players minimise."""

    needs_real = False  # whether the generator's loss looks at the logits of real examples, too

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss, `(B,)`, from logits `(B,)`."""

    @abstractmethod
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """The generator's loss, `(B,)`, from the logits `(B,)` of its samples, and of real examples if it needs them."""


class _Logistic(AdversarialLoss):
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """-log D(x) - log(1 - D(G(z))), in nats. 2 log 2 where D cannot tell."""
        return F.softplus(-real) + F.softplus(fake)


class NonSaturating(_Logistic):
    """Maximise log D(G(z)): strong gradients while the discriminator wins. In nats."""

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return F.softplus(-fake)


class Minimax(_Logistic):
    """Minimise log(1 - D(G(z))), the zero-sum game; its gradient vanishes where the discriminator is sure. In nats."""

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return -F.softplus(fake)


class Hinge(AdversarialLoss):
    """max(0, 1 - l_x) + max(0, 1 + l_G(z)) against -l_G(z): what is right by more than the margin teaches no more."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return -fake


class LeastSquares(AdversarialLoss):
    """(l_x - 1)^2 / 2 + l_G(z)^2 / 2 against (l_G(z) - 1)^2 / 2: a logit is a target, 1 for real and 0 for generated."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (real - 1).square() + 0.5 * fake.square()

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return 0.5 * (fake - 1).square()


class Wasserstein(AdversarialLoss):
    """l_G(z) - l_x against -l_G(z): with a critic of Lipschitz constant 1 an estimate of the earth mover's distance.

    Args:
        drift: weight of l_x^2, which keeps the critic's logits from wandering off (Karras et al. 2018, arXiv:1710.10196,
            appendix A.1: 0.001); 0 for none.
    """

    def __init__(self, drift: float) -> None:
        require_number("adversarial_loss.drift", drift, 0)
        self.drift = drift

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real + self.drift * real.square()

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return -fake


class Relativistic(AdversarialLoss):
    """softplus(l_G(z) - l_x) against softplus(l_x - l_G(z)), in nats: an example is only more real than its partner.

    No generated example can be left alone where no real one is, so this loss has no bad local minima where modes are
    missing (Sun, Fang, Schwing 2020, arXiv:2011.04926). log 2 where D cannot tell.
    """

    needs_real = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        assert real is not None, "pairs have two partners"
        return F.softplus(real - fake)
