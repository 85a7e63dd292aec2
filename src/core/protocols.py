"""What a model can do. Metrics, callbacks and entry points ask for a capability, never for a class.

Each protocol is checked with `isinstance` at run time, by the presence of its methods. A capability that a model has in
general but not as it is configured (a bound, with a reconstruction loss that is no likelihood) raises `NotApplicable`.

Conventions: `x` is `(B, *spec.shape)` in data units; `condition` is `(B,)` int64 class labels or None; `generator` is the
source of randomness, None for unrepeatable draws; losses and likelihoods are per example, `(B,)`.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from src.core.batch import Batch
from src.core.rng import Noise

__all__ = [
    "Adversarial",
    "CanBound",
    "CanClassify",
    "CanEncode",
    "CanReconstruct",
    "CanSample",
    "CanScore",
    "Terms",
    "Trainable",
]

Terms = dict[str, Tensor]
"""Named quantities of one batch, each `(B,)` per example; of a training loss, `loss` is the objective to minimise."""


@runtime_checkable
class CanSample(Protocol):
    is_conditional: bool  # True if `sample` needs class labels

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """n new examples, `(n, *spec.shape)` in data units."""
        ...


@runtime_checkable
class CanScore(Protocol):
    def log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Exact log likelihood, `(B,)` in nats."""
        ...


@runtime_checkable
class CanBound(Protocol):
    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """A lower bound of the log likelihood, `(B,)` in nats; unbiased for the bound if it is itself an estimate."""
        ...

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """What the bound is the sum of, by name, each `(B,)` in nats: for a VAE the reconstruction and minus the KL."""
        ...


@runtime_checkable
class CanReconstruct(Protocol):
    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x after a round trip through the model's code, deterministic, `(B, *spec.shape)` in data units."""
        ...


@runtime_checkable
class CanEncode(Protocol):
    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The code of x, deterministic, `(B, latent_dim)`."""
        ...

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """The example of code z, deterministic, `(B, *spec.shape)` in data units."""
        ...


@runtime_checkable
class CanClassify(Protocol):
    def classify(self, x: Tensor) -> Tensor:
        """Class logits, `(B, num_classes)`."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """Trained by following the gradient of one loss."""

    objective: str  # what the loss is, in words, with all that its value depends on but the weights

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms: ...


@runtime_checkable
class Adversarial(Protocol):
    """Trained by two players with an optimizer each."""

    def players(self) -> tuple[nn.Module, nn.Module]:
        """The generator and the discriminator: disjoint sets of parameters."""
        ...

    def discriminator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms: ...

    def generator_loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms: ...
