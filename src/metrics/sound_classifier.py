"""The frozen classifier of a data set of sounds: it hears waveforms, whatever the models see of them."""

from torch import Tensor, nn

from src.core.sound import Sound, from_pcm, log_mel
from src.metrics.features import NetworkExtractor

__all__ = ["SoundExtractor"]


class SoundExtractor(NetworkExtractor):
    """A network that sees clips as log-mels, always the same ones.

    Args:
        name, network, sha256, accuracy: as of `NetworkExtractor`.
        sound: how the network sees a clip.
    """

    def __init__(
        self, name: str, network: nn.Module, sound: Sound, sha256: str | None = None, accuracy: float | None = None
    ) -> None:
        super().__init__(name, network, sha256, accuracy)
        self._sound = sound

    def _seen(self, images: Tensor) -> Tensor:
        """Clips `(B, T)` int16 as pictures `(B, 1, num_mels, frames)`."""
        return log_mel(from_pcm(images), self._sound)
