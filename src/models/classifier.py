"""A classifier of the data set at hand, trained like every model; its features are what `fd`, `cs` and their kin are
measured on. It generates nothing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.batch import Batch
from src.core.errors import require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.sound import LOG_MEL, log_mel, to_waveform
from src.core.spec import DataSpec

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Minimises the cross entropy of the class, in nats, on images that are shifted and mirrored at random.

    Sounds it sees as log-mels, whatever their representation.

    Args:
        spec: the data, labelled.
        network: called as `network(in_shape=, num_classes=)`; returns features and logits.
        max_shift: training images are shifted by up to so many pixels, up or down and left or right.
        mirror: half of the training images are mirrored; not for digits or letters.
    """

    objective = "cross entropy of the class"

    def __init__(self, spec: DataSpec, network: Callable[..., nn.Module], max_shift: int = 0, mirror: bool = False) -> None:
        super().__init__()
        if spec.sound is None:
            spec.require_modality("image")
        spec.require_classes()
        require_at_least("model.max_shift", max_shift, 0)
        self._max_shift = max_shift
        self._mirror = mirror
        self._sound = spec.sound
        self._empty = spec.values.low if spec.sound is None else -1.0  # what is shifted in
        self.in_shape = spec.shape if spec.sound is None else spec.sound.mel_shape
        self.network = network(in_shape=self.in_shape, num_classes=spec.num_classes)

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        assert batch.condition is not None, "the data of a classifier has labels"
        x = self._seen(batch.x)
        x = self._varied(x, generator or fresh_noise()) if self.training else x
        logits = self.network(x)[1]
        error = (logits.argmax(1) != batch.condition).float()
        return {"loss": F.cross_entropy(logits, batch.condition, reduction="none"), "error": error}

    def classify(self, x: Tensor) -> Tensor:
        return self.network(self._seen(x))[1]

    def _seen(self, x: Tensor) -> Tensor:
        """Images as they are, of sounds their log-mel."""
        if self._sound is None or self._sound.representation == LOG_MEL:
            return x
        return log_mel(to_waveform(x, self._sound), self._sound)

    def _varied(self, x: Tensor, generator: Noise) -> Tensor:
        """Each image shifted by whole pixels, and perhaps mirrored."""
        num_images, _, height, width = x.shape
        u = generator.uniform((num_images, 3), x)
        if self._mirror:
            x = torch.where((u[:, 0] < 0.5)[:, None, None, None], x.flip(3), x)
        if not self._max_shift:
            return x
        padded = F.pad(x, [self._max_shift] * 4, value=self._empty)
        down, right = (u[:, 1:] * (2 * self._max_shift + 1)).long().unbind(1)
        rows = down[:, None] + torch.arange(height, device=x.device)
        columns = right[:, None] + torch.arange(width, device=x.device)
        each = torch.arange(num_images, device=x.device)
        return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
