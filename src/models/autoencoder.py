"""The autoencoder: a code from which the data can be rebuilt. It has no prior, so it draws no samples.

References:
    Hinton, Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks", Science 313.
"""

from collections.abc import Callable

from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise
from src.core.shapes import sum_event
from src.core.spec import DataSpec

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """Minimises the squared error |x - decode(encode(x))|^2, summed over the event, in squared data units.

    Args:
        spec: the data.
        encoder: network from data to code, called as `encoder(in_shape=, out_shape=)`.
        decoder: network from code to data, called likewise.
        latent_dim: length of the code.
    """

    objective = "squared error, summed over the values of an example"

    def __init__(
        self,
        spec: DataSpec,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        latent_dim: int,
    ) -> None:
        super().__init__()
        spec.require_modality("image", "vector")
        require_at_least("model.latent_dim", latent_dim, 1)
        self._spec = spec
        self.encoder = encoder(in_shape=spec.shape, out_shape=(latent_dim,))
        self.decoder = decoder(in_shape=(latent_dim,), out_shape=spec.shape)

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        return {"loss": sum_event((batch.x - self.decode(self.encoder(batch.x))).square())}

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._spec.squash(self.decoder(z))

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x))
