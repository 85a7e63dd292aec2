"""Vectors replaced by the nearest of a few: the codebook of a VQ-VAE, learned by counting, and the gradient through it.

References:
    van den Oord, Vinyals, Kavukcuoglu 2017, "Neural discrete representation learning", arXiv:1711.00937: the
        straight-through gradient, the commitment loss, and in appendix A.1 the codebook by exponential moving averages.
    Dhariwal et al. 2020, "Jukebox: a generative model for music", arXiv:2005.00341: random restarts of codes out of use.
"""

import torch
from torch import Tensor, nn

from src.core.collectives import broadcast, sum_over_ranks
from src.core.errors import UserError, require_at_least, require_sizes
from src.core.rng import Noise

__all__ = ["Codebook", "nearest_code", "squared_distance", "straight_through"]

_LEAST_COUNT = 1e-5  # below it, nothing was assigned to a code for so long that it stays where it is


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest row of `codebook` `(K, D)` for each row of z `(N, D)`, `(N,)` int64.

    argmin_k |z - e_k|^2 = argmin_k |e_k|^2 - 2 z.e_k
    """
    return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of z: d out / d z = I. Same shape."""
    return z + (quantized - z).detach()


def squared_distance(z: Tensor, quantized: Tensor) -> Tensor:
    """|z - sg(e)|^2 of an example, summed over its vectors `(B, ...)`, `(B,)`: the commitment loss, without its weight.

    The sum of an example, as its likelihood is: neither depends on the batch size.
    """
    return (z - quantized.detach()).square().flatten(1).sum(1)


class Codebook(nn.Module):
    """K vectors, each the moving mean of the vectors that it is nearest to.

    With n_k the vectors of a batch (of all devices) whose nearest code is k, and s_k their sum:
        N_k <- decay N_k + (1 - decay) n_k,   m_k <- decay m_k + (1 - decay) s_k,   e_k = m_k / N_k
    At one fixed assignment that is online k-means, with the mean of each cluster as its fixed point.

    A code is out of use when N_k < revive_below mean_j N_j. It then moves onto a random vector of the batch and has the
    mean count, which is the time that it is given to find its use.

    Args:
        num_codes: K.
        code_dim: D.
        decay: of the moving averages, below 1.
        revive_below: share of the mean use below which a code is out of use; 0 leaves all where they are.
    """

    vectors: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, num_codes: int, code_dim: int, decay: float, revive_below: float) -> None:
        super().__init__()
        require_sizes(num_codes=num_codes, code_dim=code_dim)
        require_at_least("model.revive_below", revive_below, 0)
        if not 0 <= decay < 1:
            raise UserError(f"model.decay={decay} must be at least 0 and below 1")
        if revive_below >= 1:
            raise UserError(f"model.revive_below={revive_below} must be below 1, the mean use of a code")
        self._decay = decay
        self._revive_below = revive_below
        vectors = nn.init.normal_(torch.empty(num_codes, code_dim))
        self.register_buffer("vectors", vectors)
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", vectors.clone())

    @property
    def num_codes(self) -> int:
        return len(self.vectors)

    @torch.no_grad()
    def start_at(self, vectors: Tensor) -> None:
        """Set the codes `(K, D)`, each counted once."""
        self.vectors.copy_(vectors)
        self.counts.fill_(1)
        self.sums.copy_(vectors)

    def indices(self, z: Tensor) -> Tensor:
        """The nearest codes of vectors `(..., D)`, `(...)` int64."""
        with torch.autocast(z.device.type, enabled=False):  # a distance in half precision may name another code
            return nearest_code(z.flatten(0, -2).to(self.vectors.dtype), self.vectors).unflatten(0, z.shape[:-1])

    def look_up(self, indices: Tensor) -> Tensor:
        """The vectors of codes `(...)`, `(..., D)`."""
        return self.vectors[indices]

    @torch.no_grad()
    def learn(self, z: Tensor, indices: Tensor, generator: Noise) -> int:
        """Move the codes by vectors z `(..., D)` and their codes `(...)`; every rank calls it. Returns how many codes were
        out of use and revived."""
        z, indices = z.flatten(0, -2).to(self.sums.dtype), indices.flatten()
        counts = torch.bincount(indices, minlength=self.num_codes).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, z)
        self.counts.lerp_(sum_over_ranks(counts), 1 - self._decay)
        self.sums.lerp_(sum_over_ranks(sums), 1 - self._decay)
        num_revived = self._revive(z, generator) if self._revive_below > 0 else 0
        counts = self.counts[:, None]
        self.vectors.copy_(torch.where(counts > _LEAST_COUNT, self.sums / counts, self.vectors))
        return num_revived

    def _revive(self, z: Tensor, generator: Noise) -> int:
        out_of_use = self.counts < self._revive_below * self.counts.mean()
        places = generator.uniform((self.num_codes, 1), like=z)[:, 0]  # always, so that the noise that follows is the same
        if not (num_revived := int(out_of_use.sum())):
            return 0
        fresh = broadcast(z[(places * len(z)).long().clamp(max=len(z) - 1)])  # of rank 0's batch
        count = self.counts.mean()
        self.sums[out_of_use] = count * fresh[out_of_use]
        self.counts[out_of_use] = count
        return num_revived
