"""How well a model rebuilds test examples from its own code.

References:
    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13 (SSIM).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from src.core.errors import NotApplicable
from src.core.protocols import CanReconstruct
from src.metrics.intervals import mean_interval
from src.metrics.metric import HIGHER, LOWER, QUANTISATION, Inputs, Measurement, Metric, require

__all__ = ["PSNR", "SSIM", "ReconstructionError"]

_MIN_SSIM_SIDE = 11  # its window


class ReconstructionError(Metric):
    """Mean squared error of one value of a test example, in squared data units (images span 2 units)."""

    def measure(self, inputs: Inputs) -> Measurement:
        errors = _each(inputs, lambda x, rebuilt: (rebuilt - x).cpu().double().square().flatten(1).mean(1))
        return Measurement(float(errors.mean()), "data units^2", _card(inputs, errors), LOWER, mean_interval(errors))


class PSNR(Metric):
    """Peak signal-to-noise ratio of reconstructed test images in 0 .. 255, in decibels: 10 log10(255^2 / MSE).

    The mean squared error is that of all images together, so that one perfect image does not make it infinite.
    """

    def measure(self, inputs: Inputs) -> Measurement:
        errors = _each(inputs, _on_bytes(inputs, lambda x, rebuilt: (rebuilt - x).square().flatten(1).mean(1)))
        error = float(errors.mean())
        if error == 0:
            raise NotApplicable("every test image is rebuilt exactly, so the ratio has no upper end")
        interval = mean_interval(errors)
        card = {**_card(inputs, errors), "quantisation": QUANTISATION, "mean_over": "squared errors"}
        return Measurement(
            _decibels(error),
            "dB",
            card,
            HIGHER,
            None if interval is None or interval[0] <= 0 else (_decibels(interval[1]), _decibels(interval[0])),
        )


class SSIM(Metric):
    """Structural similarity of reconstructed test images in 0 .. 255, mean over images; 1 for equal ones.

    Gaussian window of 11x11 pixels, sigma 1.5, constants 0.01 and 0.03, as in the paper; by torchmetrics.
    """

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanReconstruct)
        inputs.need_images()
        side = min(inputs.spec.shape[1:])
        if side < _MIN_SSIM_SIDE:
            raise NotApplicable(f"the 11x11 window of SSIM does not fit into images with a side of {side}")

        def similarity(x: Tensor, rebuilt: Tensor) -> Tensor:
            found = structural_similarity_index_measure(rebuilt, x, data_range=255.0, reduction="none")
            assert isinstance(found, Tensor)
            return found.reshape(len(x))

        values = _each(inputs, _on_bytes(inputs, similarity))
        card = {**_card(inputs, values), "quantisation": QUANTISATION}
        return Measurement(float(values.mean()), "1", card, HIGHER, mean_interval(values))


def _each(inputs: Inputs, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A quantity of every test example and its reconstruction, `(N,)` float64."""
    require(inputs, CanReconstruct)
    values = []
    with torch.no_grad():
        for batch in inputs.test_batches():
            rebuilt = inputs.model.reconstruct(batch.x, batch.condition)
            if not rebuilt.isfinite().all():
                raise NotApplicable(f"{inputs.model_name} rebuilt examples that are not finite")
            values.append(of(batch.x, rebuilt).cpu().double())
    return torch.cat(values)


def _on_bytes(inputs: Inputs, of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same quantity of images quantised to 0 .. 255, as everywhere in evaluation."""
    require(inputs, CanReconstruct)
    inputs.need_images()
    return lambda x, rebuilt: of(*(inputs.spec.to_bytes(some).float() for some in (x, rebuilt)))


def _decibels(error: float) -> float:
    return float(10 * torch.tensor(255**2 / error, dtype=torch.float64).log10())


def _card(inputs: Inputs, values: Tensor) -> dict[str, Any]:
    return {"split": "test", "num_examples": len(values), "values": inputs.spec.values.kind}
