"""Spectral normalization: every weight matrix divided by its largest singular value.

    W_sn = W / sigma(W),   sigma(W) = u^T W v

with u, v by one power iteration at each forward pass in training mode, from where the last one left them. They count as
constants in the gradient, and stay as they are in evaluation mode. A discriminator that is called several times in a
step runs one iteration at each call, as in the paper.

References:
    Miyato et al. 2018, "Spectral normalization for generative adversarial networks", arXiv:1802.05957, algorithm 1.
"""

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from src.core.errors import UserError

__all__ = ["normalize_spectra"]

_NORMALIZED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)


def normalize_spectra(network: nn.Module) -> None:
    """Normalise the weights of all linear, convolutional and embedding layers of a network, in place.

    A kernel counts as a matrix with a row for each output channel, an embedding as one with a row for each class. The
    first u and v come from torch's global generator, like initial weights. Where a weight is parametrized already (an
    equalized learning rate, say), its effective value is normalised.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, _NORMALIZED):
            if not module.weight.any():
                raise UserError(
                    f"has spectral normalization, but {name}.weight starts at zero, and so does its largest singular "
                    "value; set model.spectral_norm=false or choose another network"
                )
            spectral_norm(module)  # torch knows that the outputs of a transposed convolution are dimension 1, not 0
