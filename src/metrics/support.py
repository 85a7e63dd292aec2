"""Collapse within classes: how many different images the samples are, judged by collisions.

Among s draws from K equally likely images, s(s - 1)/2K pairs are expected to be the same one. So C pairs of near
duplicates speak for an effective support of s(s - 1)/2C images. What is near is calibrated on held-out real images: as near
as one in a thousand of them has its nearest neighbour.

References:
    Arora, Zhang 2017, "Do GANs actually learn the distribution?", arXiv:1706.08224.
"""

from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError
from src.metrics.features import Extractor, ImageSet
from src.metrics.metric import HELD_OUT, Finding, Inputs, Reading, SampleMetric, Space
from src.metrics.neighbours import count_near_pairs, neighbour_radii

__all__ = ["EffectiveSupport", "support_from_collisions"]


def support_from_collisions(num_pairs: int, num_samples: int) -> float:
    """s(s - 1) / 2C images; with no collision at all the value of one, which the support then probably exceeds."""
    return num_samples * (num_samples - 1) / (2 * max(1, num_pairs))


class EffectiveSupport(SampleMetric):
    """Number of equally likely images that would collide as often as the samples do.

    It raises an alarm if it is smaller than the number of samples: then most of them have a near duplicate among them.

    Args:
        space: where nearness is measured.
        quantile: the share of held-out images that have a neighbour as near as what counts as a duplicate.
    """

    unit = "images"
    better = None  # once it is that of real images, more is no better
    beside = (HELD_OUT,)
    judges_by_held_out = True

    def __init__(self, space: Space, quantile: float) -> None:
        super().__init__(space)
        if not 0 < quantile < 1:
            raise UserError(f"metric.effective_support.quantile={quantile} must be between 0 and 1")
        self._quantile = quantile

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        held_out = inputs.need_held_out()
        count = min(inputs.features(some, extractor).count for some in (images, held_out))
        if count < 2:
            raise NotApplicable(f"{count} images make no pairs")

        def distances() -> dict[str, Tensor]:
            return {"radii": neighbour_radii(inputs.features(held_out, extractor).features[:count], 1)}

        nearest = inputs.store.get("radii", held_out, extractor, {"k": 1, "count": count}, distances)["radii"]
        radius = float(torch.quantile(nearest.double(), self._quantile, interpolation="lower"))

        def pairs() -> dict[str, Tensor]:
            x = inputs.features(images, extractor).features[:count]
            return {"pairs": torch.tensor(count_near_pairs(x, radius))}

        settings = {"count": count, "radius": radius}
        num_pairs = int(inputs.store.get("near_pairs", images, extractor, settings, pairs)["pairs"])
        return Reading(support_from_collisions(num_pairs, count), count, parts={"near_duplicate_pairs": float(num_pairs)})

    def protocol(self) -> dict[str, Any]:
        return {"near": f"as near as {self._quantile:g} of held-out images have a neighbour"}

    def finding(self, reading: Reading, null: Reading | None) -> Finding:
        least = "" if reading.parts["near_duplicate_pairs"] else "at least "
        beside = f" (null {null.value:,.0f})" if null else ""
        words = f"effective support {least}{reading.value:,.0f} images{beside}"
        return Finding(words, "support" if reading.value < reading.count else None)
