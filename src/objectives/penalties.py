"""Penalties on the gradient of a discriminator with respect to its input, per example.

Where the discriminator sees its examples augmented, the input is what goes into the augmentation.

    R1   gamma / 2 * |grad D(x)|^2        at real examples
    R2   gamma / 2 * |grad D(G(z))|^2     at generated ones
    GP   weight * (|grad D(y)| - 1)^2     at y = u x + (1 - u) G(z), u uniform on (0, 1), one an example

The norm is Euclidean over all values of an example. A weight is in units of the data: images here live in [-1, 1].

References:
    Mescheder, Geiger, Nowozin 2018, "Which training methods for GANs do actually converge?", arXiv:1801.04406 (R1, R2).
    Gulrajani et al. 2017, "Improved training of Wasserstein GANs", arXiv:1704.00028, equation 3 (GP).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.core.errors import require_number
from src.core.protocols import Terms
from src.core.rng import Noise

__all__ = ["GradientPenalty", "Judged", "NoPenalty", "Penalty", "ZeroCentred", "judge", "squared_gradient_norm"]

Critic = Callable[[Tensor], Tensor]
"""A discriminator of examples `(B, *event)`, to logits `(B,)`."""


@dataclass(frozen=True)
class Judged:
    """Examples, and what a discriminator says of them.

    Args:
        x: `(B, *event)`.
        logit: `(B,)`.
    """

    x: Tensor
    logit: Tensor


def judge(critic: Critic, x: Tensor, for_slope: bool) -> Judged:
    """The logits of examples; with `for_slope` so that the gradient at them can be taken without another pass.

    Under automatic mixed precision, and where no gradients are recorded, they cannot serve for that.
    """
    if for_slope and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
        x = x.detach().requires_grad_()
    return Judged(x, critic(x))


def squared_gradient_norm(critic: Critic, at: Tensor | Judged) -> Tensor:
    """|grad D(x)|^2 of each example, `(B,)`, differentiable where gradients are recorded.

    Computed in float32 at least, with automatic mixed precision off: squares of small gradients vanish in 16 bits.
    """
    is_training = torch.is_grad_enabled()
    x = at.x if isinstance(at, Judged) else at
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        if isinstance(at, Judged) and x.requires_grad:
            logit = at.logit
        else:
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
            logit = critic(x)
        (gradient,) = torch.autograd.grad(logit.sum(), x, create_graph=is_training)
    return gradient.flatten(1).square().sum(1)


class Penalty(ABC):
    """What is added to the discriminator's loss.

    `of_real` and `of_fake` say whether it takes the gradient at the real and at the generated examples themselves.
    """

    of_real = False
    of_fake = False

    @abstractmethod
    def __call__(self, critic: Critic, real: Judged, fake: Judged, noise: Noise) -> Terms:
        """Named parts `(B,)`, to be added up; none without a penalty.

        Args:
            critic: the discriminator.
            real, fake: `(B, *event)`, as it sees them, with its logits.
            noise: of random places between them.
        """


class NoPenalty(Penalty):
    def __call__(self, critic: Critic, real: Judged, fake: Judged, noise: Noise) -> Terms:
        return {}


class ZeroCentred(Penalty):
    """R1, R2, or both.

    Args:
        gamma_real: of R1; 0 for none.
        gamma_fake: of R2; 0 for none.
    """

    def __init__(self, gamma_real: float, gamma_fake: float) -> None:
        require_number("penalty.gamma_real", gamma_real, 0)
        require_number("penalty.gamma_fake", gamma_fake, 0)
        self._gammas = (gamma_real, gamma_fake)
        self.of_real, self.of_fake = gamma_real > 0, gamma_fake > 0

    def __call__(self, critic: Critic, real: Judged, fake: Judged, noise: Noise) -> Terms:
        places = zip(("r1", "r2"), self._gammas, (real, fake), strict=True)
        return {name: 0.5 * gamma * squared_gradient_norm(critic, at) for name, gamma, at in places if gamma}


class GradientPenalty(Penalty):
    """Pulls the critic's slope towards one between real and generated examples.

    Args:
        weight: 10 for images, 0.1 for points in the plane (Gulrajani et al. 2017).
    """

    def __init__(self, weight: float) -> None:
        require_number("penalty.weight", weight, 0)
        self._weight = weight

    def __call__(self, critic: Critic, real: Judged, fake: Judged, noise: Noise) -> Terms:
        u = noise.uniform((len(real.x), *[1] * (real.x.ndim - 1)), like=real.x)
        norm = squared_gradient_norm(critic, torch.lerp(fake.x, real.x, u)).add(1e-12).sqrt()  # its slope at 0 is finite
        return {"gradient_penalty": self._weight * (norm - 1).square()}
