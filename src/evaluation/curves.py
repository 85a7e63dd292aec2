"""Pictures of what a metric says at several places: a line for the model, and one for each reference row."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["curve_picture", "curve_pictures"]

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 64  # of the axes, in pixels from the rim
_INK, _PALE = (20, 20, 20), (200, 200, 200)
_COLOURS = ((190, 20, 30), (120, 120, 120), (40, 110, 180), (30, 140, 80), (160, 100, 20), (120, 60, 150))
_NUM_MARKS = 5  # on the upright axis


def curve_pictures(results: Mapping[str, Any]) -> dict[str, Tensor]:
    """A picture for every metric of a results JSON that has a curve, by name."""
    entries = results["metrics"].items()
    return {name: curve_picture(name, entry["unit"], entry["curve"]) for name, entry in entries if "curve" in entry}


def curve_picture(name: str, unit: str, curve: Mapping[str, Any]) -> Tensor:
    """A line for each row of a curve (see `evaluation.results.to_json`), the model's in red, as uint8 `(3, height, width)`.

    Places are equally far from each other, whatever they are.
    """
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    places, rows = curve["places"], curve["rows"]
    values = [value for row in rows.values() for value in row]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    low, high = low - room, high + room

    def x(i: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (i + 0.5) / len(places)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    for mark in _marks(low, high):
        draw.line([(_LEFT, y(mark)), (_WIDTH - _RIGHT, y(mark))], fill=_PALE)
        draw.text((_LEFT - 6, y(mark)), f"{mark:g}", fill=_INK, font=font, anchor="rm")
    for i, place in enumerate(places):
        draw.text((x(i), _HEIGHT - _BOTTOM + 6), place.replace(" to ", "-"), fill=_INK, font=font, anchor="ma")
    draw.text((_WIDTH / 2, _HEIGHT - 24), curve["of"], fill=_INK, font=font, anchor="ma")
    draw.text((8, 8), f"{name.replace('_', ' ')}, {unit}", fill=_INK, font=font)
    end: float = _WIDTH - _RIGHT
    for (row, of_row), colour in reversed(list(zip(rows.items(), _COLOURS, strict=False))):  # the model's lies on top
        points = [(x(i), y(value)) for i, value in enumerate(of_row)]
        draw.line(points, fill=colour, width=3 if not row else 1)
        for a, b in points:
            draw.ellipse((a - 2, b - 2, a + 2, b + 2), fill=colour)
        shown = row or "model"
        draw.text((end, 8), shown, fill=colour, font=font, anchor="ra")
        end -= draw.textlength(shown, font=font) + 14
    return torch.from_numpy(np.asarray(image).copy()).movedim(2, 0)


def _marks(low: float, high: float) -> list[float]:
    """A few round numbers between two others."""
    rough = (high - low) / _NUM_MARKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
