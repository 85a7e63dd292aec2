"""How a discriminator takes the class: not at all, beside the example, by a projection, or by naming it.

Each is built around a network that has `features`, `num_features` and `head` (its last linear layer), and gives a logit for
each example that says how real it looks. What the generator does with the class is the generator's own setting.

References:
    Mirza, Osindero 2014, "Conditional generative adversarial nets", arXiv:1411.1784: concatenation.
    Miyato, Koyama 2018, "cGANs with projection discriminator", arXiv:1802.05637, equation 3.
    Odena, Olah, Shlens 2017, "Conditional image synthesis with auxiliary classifier GANs", arXiv:1610.09585.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError
from src.core.spec import DataSpec
from src.networks.style import equalize

__all__ = ["AuxiliaryClassifier", "Concatenation", "Conditioning", "Projection", "Unconditional", "Verdict"]


class Verdict(NamedTuple):
    """What a discriminator says.

    Args:
        logit: `(B,)`, how real each example looks.
        class_logits: `(B, K)`, which class it looks like, if the discriminator names one.
    """

    logit: Tensor
    class_logits: Tensor | None = None


class Conditioning(nn.Module):
    """A discriminator and its way with the class.

    Args:
        network: called as `network(in_shape=, out_shape=(1,), condition_dim=)`.
        in_shape: event shape of what it sees.
        spec: the data, for their K classes.
    """

    is_conditional = True
    class_weight = 0.0  # of the cross-entropy of the class that is named, in both players' losses

    def __init__(
        self, network: Callable[..., nn.Module], in_shape: Sequence[int], spec: DataSpec, condition_dim: int = 0
    ) -> None:
        super().__init__()
        if self.is_conditional:
            spec.require_classes()
        self.network = network(in_shape=in_shape, out_shape=(1,), condition_dim=condition_dim)
        self._num_classes = spec.num_classes

    @property
    def _num_features(self) -> int:
        num_features = self.network.num_features
        assert isinstance(num_features, int)
        return num_features

    @property
    def _is_equalized(self) -> bool:
        return bool(getattr(self.network, "is_equalized", False))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Verdict:
        """From examples `(B, *in_shape)` and classes `(B,)` int64 or None."""
        return Verdict(self.network(x).squeeze(1))


class Unconditional(Conditioning):
    """No class for either player."""

    is_conditional = False


class Concatenation(Conditioning):
    """The class as further values, or constant planes, of the example."""

    def __init__(self, network: Callable[..., nn.Module], in_shape: Sequence[int], spec: DataSpec) -> None:
        super().__init__(network, in_shape, spec, condition_dim=spec.num_classes)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Verdict:
        return Verdict(self.network(x, F.one_hot(_given(condition), self._num_classes)).squeeze(1))


class Projection(Conditioning):
    """logit = psi(phi(x)) + <e_y, phi(x)> of features phi, the last linear layer psi, a vector e_y a class.

    Where the network's layers have an equalised learning rate, so has e_y: it is N(0, I), and the product is divided by
    the root of the number of features.
    """

    def __init__(self, network: Callable[..., nn.Module], in_shape: Sequence[int], spec: DataSpec) -> None:
        super().__init__(network, in_shape, spec)
        self.embedding = nn.Embedding(spec.num_classes, self._num_features)
        self._scale = self._num_features**-0.5 if self._is_equalized else 1.0
        if not self._is_equalized:  # else N(0, 1), as torch begins
            nn.init.xavier_uniform_(self.embedding.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Verdict:
        features = self.network.features(x)
        agreement = (self.embedding(_given(condition)) * features).sum(1) * self._scale
        return Verdict(self.network.head(features).squeeze(1) + agreement)


class AuxiliaryClassifier(Conditioning):
    """A second linear layer on the features names the class; both players are told when it is wrong.

    Args:
        network, in_shape, spec: see `Conditioning`.
        weight: of the cross-entropy, in both players' losses.
    """

    def __init__(self, network: Callable[..., nn.Module], in_shape: Sequence[int], spec: DataSpec, weight: float) -> None:
        if not (weight is not None and weight > 0):
            raise UserError(f"conditioning.weight={weight} must be more than 0")
        super().__init__(network, in_shape, spec)
        self.class_weight = weight
        classifier = nn.Linear(self._num_features, spec.num_classes)
        self.classifier = equalize(classifier) if self._is_equalized else classifier

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Verdict:
        features = self.network.features(x)
        return Verdict(self.network.head(features).squeeze(1), self.classifier(features))


def _given(condition: Tensor | None) -> Tensor:
    assert condition is not None, "a conditional model needs class labels"
    return condition
