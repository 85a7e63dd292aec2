"""Euclidean nearest neighbours, exact, in pieces that fit into memory."""

import torch
from torch import Tensor

__all__ = ["count_near_pairs", "nearest_distances", "neighbour_radii", "squared_distances"]

_CHUNK_ENTRIES = 1 << 24  # of a matrix of distances, at a time
_CANCELLED = 1e-3  # squared distances below this share of the squared norms have lost digits


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, `(N, M)`, from `(N, D)` and `(M, D)`: by a matrix product, so with the rounding of |x|^2."""
    products = x @ y.T
    return products.mul_(-2).add_(x.square().sum(1)[:, None]).add_(y.square().sum(1)).clamp_(min=0)


def nearest_distances(x: Tensor, y: Tensor, k: int) -> Tensor:
    """Distances from every x `(N, D)` to its k nearest y `(M, D)`, `(N, k)` ascending; float32 of integers.

    Small distances are computed again from the differences, so that a copy is at distance zero exactly.
    """
    assert k <= len(y)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    y = y.to(dtype, copy=True)
    centre = y.mean(0)
    y -= centre  # shorter vectors, fewer lost digits
    found = [_nearest(part.to(dtype) - centre, y, k) for part in x.split(max(1, _CHUNK_ENTRIES // len(y)))]
    return torch.cat(found)


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """Distance from every x `(N, D)` to its k-th nearest other one, `(N,)`."""
    return nearest_distances(x, x, k + 1)[:, k]  # the nearest is itself, or an equal one


def count_near_pairs(x: Tensor, radius: float) -> int:
    """Number of unordered pairs of different rows of x `(N, D)` that are no farther apart than `radius`."""
    x = x.double() - x.double().mean(0)
    # equal rows are at distance zero up to rounding, and shall count whatever the radius
    slack = 1e-12 * float(x.square().sum(1).max())
    parts = x.split(max(1, _CHUNK_ENTRIES // (2 * len(x))))
    near = sum(int((squared_distances(part, x) <= radius**2 + slack).sum()) for part in parts)
    return (near - len(x)) // 2


def _nearest(x: Tensor, y: Tensor, k: int) -> Tensor:
    squared, index = squared_distances(x, y).topk(k, dim=1, largest=False)
    norms = x.square().sum(1)[:, None] + y.square().sum(1)[index]
    rows, places = (squared < _CANCELLED * norms).nonzero(as_tuple=True)
    for some_rows, some_places in zip(rows.split(4096), places.split(4096), strict=True):
        difference = x[some_rows] - y[index[some_rows, some_places]]
        squared[some_rows, some_places] = difference.square().sum(1)
    return squared.sqrt().sort(dim=1).values
