"""Euclidean nearest neighbours, exact, in pieces that fit into memory."""

import torch
from torch import Tensor

__all__ = ["count_near_pairs", "nearest_distances", "neighbour_radii", "squared_distances"]

_CHUNK_ENTRIES = 1 << 24  # of a matrix of distances, at a time
_CHUNK_VALUES = 1 << 25  # of one side, turned into floats at a time
_CHUNK_ROWS = 4096
_CANCELLED = 2e-3  # squared distances below this share of the squared norm have lost digits


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
    rows = max(k, _CHUNK_VALUES // y.shape[1])  # of y at a time
    centre = y[:rows].to(dtype).mean(0)  # shorter vectors, fewer lost digits
    squared = torch.empty(len(x), 0, dtype=dtype, device=x.device)
    index = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for start in range(0, len(y), rows):
        part = y[start : start + rows].to(dtype) - centre
        found = [_nearest(some.to(dtype) - centre, part, k) for some in x.split(max(1, _CHUNK_ENTRIES // len(part)))]
        squared = torch.cat([squared, torch.cat([values for values, _ in found])], dim=1)
        index = torch.cat([index, torch.cat([place for _, place in found]) + start], dim=1)
        squared, order = squared.topk(min(k, squared.shape[1]), dim=1, largest=False)
        index = index.gather(1, order)
    return _without_cancellation(squared, index, x, y, centre).sqrt().sort(dim=1).values


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


def _nearest(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The smallest squared distances `(N, k)`, or `(N, M)` if y is shorter, and which y they are to."""
    return squared_distances(x, y).topk(min(k, len(y)), dim=1, largest=False)


def _without_cancellation(squared: Tensor, index: Tensor, x: Tensor, y: Tensor, centre: Tensor) -> Tensor:
    """The same squared distances `(N, k)`; those that lost digits are computed again from the differences."""
    norms = torch.cat([(some.to(centre.dtype) - centre).square().sum(1) for some in x.split(_CHUNK_ROWS)])
    rows, places = (squared < _CANCELLED * norms[:, None]).nonzero(as_tuple=True)
    for some_rows, some_places in zip(rows.split(_CHUNK_ROWS), places.split(_CHUNK_ROWS), strict=True):
        difference = x[some_rows].to(centre.dtype) - y[index[some_rows, some_places]].to(centre.dtype)
        squared[some_rows, some_places] = difference.square().sum(1)
    return squared
