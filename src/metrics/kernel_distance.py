"""The kernel distance: the squared maximum mean discrepancy of two sets of features, unbiased, with a standard error.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),   k(x, y) = (x.y / D + 1)^3

On the features of a domain classifier it is called `kd`; only on Inception's may it be called KID. It is zero on average
for two samples of one distribution, so it can be negative.

References:
    Gretton et al. 2012, "A kernel two-sample test", JMLR 13, equation 3.
    Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401: this kernel on Inception.
"""

from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable
from src.metrics.features import Extractor, ImageSet
from src.metrics.jackknife import NUM_BLOCKS, block_of, jackknife
from src.metrics.metric import HELD_OUT, NOISE, Inputs, Reading, SampleMetric

__all__ = ["KernelDistance", "block_sums", "squared_mmd"]

_CHUNK = 1024


def block_sums(x: Tensor, y: Tensor, num_blocks: int, without_diagonal: bool) -> Tensor:
    """Sums of k(x_i, y_j) over pairs of blocks, `(G, G)` float64, from `(N, D)` and `(M, D)`; i is in block i mod G.

    Args:
        without_diagonal: leave out i = j, if x and y are the same.
    """
    x, y = x.double(), y.double()
    dim = x.shape[1]
    to_block = torch.zeros(len(y), num_blocks, dtype=torch.float64)
    to_block[torch.arange(len(y)), block_of(len(y), num_blocks)] = 1
    sums = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
    block = block_of(len(x), num_blocks)
    for part, place in zip(x.split(_CHUNK), block.split(_CHUNK), strict=True):
        kernel = (part @ y.T).div_(dim).add_(1).pow_(3)
        sums.index_add_(0, place, kernel @ to_block)
    if without_diagonal:
        own = (x.square().sum(1) / dim + 1).pow(3)
        sums -= torch.zeros(num_blocks, dtype=torch.float64).index_add_(0, block, own).diag()
    return sums


def squared_mmd(within_x: Tensor, within_y: Tensor, between: Tensor, n: int, m: int) -> Tensor:
    """The unbiased estimate, `()`, from the three sums of kernel values (without i = j within) over n and m examples."""
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)


class KernelDistance(SampleMetric):
    """The kernel distance to as many training images as there are samples, with a 95 % interval.

    The standard error is by a jackknife over 20 blocks of both sides, so it counts the luck of both draws. Between equal
    distributions the interval is about 1.4 times wider than need be.
    """

    beside = (HELD_OUT, NOISE)

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        x = inputs.features(images, extractor).features
        y = inputs.reference_part(extractor, len(x))
        count = min(len(x), len(y))
        if count < 2 * NUM_BLOCKS:
            raise NotApplicable(f"the kernel distance needs at least {2 * NUM_BLOCKS} images on each side, not {count}")
        x, y = x[:count], y[:count]

        def within_reference() -> dict[str, Tensor]:
            return {"sums": block_sums(y, y, NUM_BLOCKS, without_diagonal=True)}

        xx = block_sums(x, x, NUM_BLOCKS, without_diagonal=True)
        yy = inputs.store.get("kernel", inputs.reference, extractor, {"count": count}, within_reference)["sums"]
        xy = block_sums(x, y, NUM_BLOCKS, without_diagonal=False)
        sizes = block_of(count).bincount(minlength=NUM_BLOCKS)
        value = squared_mmd(xx.sum(), yy.sum(), xy.sum(), count, count)
        left_out = []
        for g in range(NUM_BLOCKS):  # block g of both sides
            rest = torch.arange(NUM_BLOCKS) != g
            sums = [s[rest][:, rest].sum() for s in (xx, yy, xy)]
            n = count - int(sizes[g])
            left_out.append(squared_mmd(sums[0], sums[1], sums[2], n, n))
        found = jackknife(value, torch.stack(left_out))
        return Reading(float(value), count, found.around(float(value)))

    def protocol(self) -> dict[str, Any]:
        return {"kernel": "(x.y / D + 1)^3", "estimate": "unbiased", "reference_part": "as many as samples"}
