"""Pictures of points in the plane: points over the data, curves, and densities side by side."""

import colorsys
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from src.core.spec import DataSpec

__all__ = ["curve_picture", "density_picture", "histogram_density", "is_drawn_as_points", "point_picture"]

_SIDE, _MARGIN = 512, 0.15  # of a picture, in pixels; around the data, as a share of their range
_CELLS = 256  # in a row of a density: on the ring as wide as sigma
_COARSE, _POINTS_IN_A_CELL = (128, 64, 32), 8  # in a row of a histogram of wide distributions; at their peak
_GAP = 4  # between two densities, in pixels
_DATA_COLOUR, _POINT_COLOUR, _GAP_COLOUR = (0.6, 0.66, 0.76), (0.75, 0.08, 0.12), 0.5
_DATA_WIDTH, _POINT_WIDTH = 5, 3  # a real point is drawn larger, so that it shows around the samples that lie on it
_HEAT = ((1.0, 1.0, 1.0), (0.99, 0.8, 0.5), (0.85, 0.25, 0.15), (0.4, 0.0, 0.25), (0.05, 0.0, 0.1))  # none .. most


def is_drawn_as_points(spec: DataSpec) -> bool:
    return spec.modality == "vector" and spec.num_dims == 2


def point_picture(x: Tensor, data: Tensor) -> Tensor:
    """Points `(N, 2)` in red over real ones `(M, 2)` in grey, the denser the darker, as a uint8 picture `(3, side, side)`.

    The axes have one scale and reach a little beyond the real points. Points outside lie on the rim.
    """
    return _painted([(x, _POINT_COLOUR)], data)


def curve_picture(curves: Tensor, data: Tensor) -> Tensor:
    """As `point_picture`, of curves of points `(num_curves, num_points, 2)`, each in a colour of its own."""
    hues = [colorsys.hsv_to_rgb(i / len(curves), 0.9, 0.75) for i in range(len(curves))]
    return _painted(list(zip(curves, hues, strict=True)), data)


def density_picture(x: Tensor, data: Tensor, log_prob: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The density of points `(N, 2)` beside that of the data `(M, 2)`, as a uint8 picture `(3, side, 2 side + gap)`.

    Both have one logarithmic scale of colours, from what one point in a cell is of all of them up to the data's highest.
    A histogram of few points, or of points far apart, has larger cells.

    Args:
        x: samples of the model.
        data: real points; they say where the axes reach to.
        log_prob: the exact density of the data in nats, from `(B, 2)` to `(B,)`; None: their histogram instead.
    """
    corner, length = _frame(data)
    if log_prob is None:
        num_cells = _fine_enough(float(histogram_density(data, corner, length, _COARSE[-1]).max()), length, len(x))
        of_data = histogram_density(data, corner, length, num_cells)
    else:
        of_data = _exact_density(log_prob, corner[0].item(), corner[1].item(), length)
        num_cells = _fine_enough(float(of_data.max()), length, len(x))
    of_samples = histogram_density(x, corner, length, num_cells)
    least = 0.5 * (num_cells / length) ** 2 / len(x)
    most = max(float(of_data.max()), 4 * least)
    sides = [_heat((density / least).log() / math.log(most / least)) for density in (of_samples, of_data)]
    gap = torch.full((3, _SIDE, _GAP), _GAP_COLOUR)
    return _to_bytes(torch.cat([sides[0], gap, sides[1]], 2))


def _fine_enough(density: float, length: float, num_points: int) -> int:
    """As many cells in a row as leave a few points in one where the density is highest."""
    few = (num for num in (_CELLS, *_COARSE) if num_points * density * (length / num) ** 2 >= _POINTS_IN_A_CELL)
    return next(few, _COARSE[-1])


@functools.lru_cache(maxsize=1)
def _exact_density(log_prob: Callable[[Tensor], Tensor], left: float, bottom: float, length: float) -> Tensor:
    """A density in the middle of all cells, `(cells, cells)`; kept, since every picture of a run asks for the same."""
    density = log_prob(_centres(torch.tensor([left, bottom]), length, _CELLS)).exp()
    return density.reshape(_CELLS, _CELLS).float()


def histogram_density(x: Tensor, corner: Tensor, length: float, num_cells: int) -> Tensor:
    """Density of points `(N, 2)` in the square cells of a frame, `(num_cells, num_cells)`, its rows from above.

    It adds up to the share of the points that lie in the frame.

    Args:
        corner: lower left corner `(2,)` of the frame.
        length: of its sides.
    """
    place = (x.detach().cpu().double() - corner.double()) / length * num_cells
    inside = place[((place >= 0) & (place < num_cells)).all(1)]
    return _counts(inside, num_cells).float() / len(x) * (num_cells / length) ** 2


def _frame(data: Tensor) -> tuple[Tensor, float]:
    """The lower left corner and the length of the square around the data."""
    low, high = data.amin(0), data.amax(0)
    half = (0.5 + _MARGIN) * float((high - low).max()) or 1.0
    return ((low + high) / 2 - half).float().cpu(), 2 * half


def _centres(corner: Tensor, length: float, num_cells: int) -> Tensor:
    """The middle of each cell of a frame, `(num_cells^2, 2)` float64, row by row from above."""
    place = (torch.arange(num_cells, dtype=torch.float64) + 0.5) / num_cells * length
    y, x = torch.meshgrid(place.flip(0) + corner[1], place + corner[0], indexing="ij")
    return torch.stack([x, y], 2).reshape(-1, 2)


def _painted(layers: list[tuple[Tensor, tuple[float, float, float]]], data: Tensor) -> Tensor:
    """Points `(N, 2)` with their colours, one after the other over the data."""
    corner, length = _frame(data)
    picture = torch.ones(3, _SIDE, _SIDE)
    real = (data, _DATA_COLOUR, _DATA_WIDTH, 0.4)
    for points, colour, width, least in (real, *((*layer, _POINT_WIDTH, 0.6) for layer in layers)):
        ink = _ink(points.detach().float().cpu(), corner, length, width, least)
        picture = picture * (1 - ink) + torch.tensor(colour)[:, None, None] * ink
    return _to_bytes(picture)


def _ink(points: Tensor, corner: Tensor, length: float, width: int, least: float) -> Tensor:
    """How dark each pixel is, `(side, side)` in 0 .. 1: 0 without a point, from `least` on with one, 1 with the most."""
    place = (points[points.isfinite().all(1)] - corner) / length * _SIDE
    counts = _counts(place.clamp(0, _SIDE - 1), _SIDE).float()[None, None]
    spread = F.max_pool2d(counts, width, stride=1, padding=width // 2)[0, 0].log1p()
    most = spread.max()
    return torch.where(spread > 0, least + (1 - least) * spread / most, 0.0) if most > 0 else spread


def _counts(place: Tensor, num_cells: int) -> Tensor:
    """How many points, in cells from the lower left corner, are in each cell: `(num_cells, num_cells)`, rows from above."""
    column, row = place.long().unbind(1)
    counts = torch.bincount((num_cells - 1 - row) * num_cells + column, minlength=num_cells**2)
    return counts.reshape(num_cells, num_cells)


def _heat(level: Tensor) -> Tensor:
    """Levels `(cells, cells)`, 0 and less for none and 1 for the most, to colours `(3, side, side)`."""
    stops = torch.tensor(_HEAT)
    place = level.clamp(0, 1) * (len(stops) - 1)
    below = place.long().clamp(max=len(stops) - 2)
    share = (place - below)[..., None]
    colours = (stops[below] * (1 - share) + stops[below + 1] * share).permute(2, 0, 1)
    factor = _SIDE // len(level)
    return colours.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _to_bytes(picture: Tensor) -> Tensor:
    return picture.mul(255).round().byte()
