"""Batch norm's statistics for weights that it was never trained with.

The averaged weights of a generator give other activations than the trained ones whose running statistics were kept. So the
statistics are taken anew from samples of the averaged generator (Brock et al. 2019, "Large scale GAN training",
arXiv:1809.11096, section 3.1: standing statistics).
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from src.core.errors import UserError
from src.core.protocols import CanSample
from src.core.rng import SampleNoise

__all__ = ["has_batch_norm", "renew_batch_norm", "require_batch_norm_samples"]


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a network has running statistics of batches."""
    return bool(_norms(network))


def require_batch_norm_samples(num_samples: int | None, batch_size: int) -> None:
    """Raise `UserError` for a number of samples that is neither none nor a whole batch."""
    if num_samples is None or (num_samples < batch_size and num_samples != 0):
        raise UserError(
            f"evaluation.batch_norm_samples={num_samples} must be at least loader.batch_size={batch_size}, or 0 for the "
            "statistics of the trained weights"
        )


@torch.no_grad()
def renew_batch_norm(
    model: CanSample, network: nn.Module, num_samples: int, batch_size: int, seed: int, condition: Tensor | None
) -> None:
    """Set the running statistics of every batch norm in `network` to their means over batches of the model's samples.

    Args:
        model: draws its samples through `network`.
        network: whose statistics are renewed.
        num_samples: drawn for it, in whole batches, one at least.
        batch_size: of the training, since batch norm's effect hangs on it.
        seed: of the noise.
        condition: classes `(num_samples,)` of a conditional model.
    """
    require_batch_norm_samples(num_samples, batch_size)
    norms = _norms(network)
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all batches
    for start in range(0, num_samples - batch_size + 1, batch_size):
        part = None if condition is None else condition[start : start + batch_size]
        model.sample(batch_size, part, generator=SampleNoise(seed, start))
    for norm, (was_training, momentum) in zip(norms, before, strict=True):
        norm.train(was_training)
        norm.momentum = momentum


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
