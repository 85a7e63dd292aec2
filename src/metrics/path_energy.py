"""How much a model moves its noise on the way to examples: the energy of paths.

    E of the integral of |v(x(t), t)|^2 dt, from t = 0 to 1, over paths dx/dt = v(x, t)

No paths from one distribution to another have less than their squared 2-Wasserstein distance, and those that do are
straight, so that one step of Euler's method follows them exactly.

References:
    Benamou, Brenier 2000, "A computational fluid mechanics solution to the Monge-Kantorovich mass transfer problem",
        Numerische Mathematik 84: the least energy.
    Liu, Gong, Liu 2023, "Flow straight and fast: learning to generate and transfer data with rectified flow",
        arXiv:2209.03003: the straightness of paths, here called the bend.
    Tong et al. 2024, "Improving and generalizing flow-based generative models with minibatch optimal transport",
        arXiv:2302.00482: path energy as a measure of flows.
"""

from typing import Any

import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.protocols import HasPaths
from src.core.rng import SampleNoise
from src.metrics.intervals import mean_interval
from src.metrics.metric import LOWER, STANDARDIZED, Inputs, Measurement, Metric, require

__all__ = ["PathEnergy"]

_BATCH_SIZE = 500


class PathEnergy(Metric):
    """Mean energy of the paths that samples come along, in squared data units; of two models of the same data and the same
    source, the one with less has the straighter and shorter paths. Of a table it is in squared units of the standardized
    columns.

    It is of the field, not of the sampler: the paths are followed accurately, however few steps the samples take. It says
    nothing of where they end; samples that stay at the source have none. Its parts are `displacement`, the mean squared
    distance from end to end, and `bend`, what straight lines in even speed would save: 0 if one step of Euler's method is
    exact.

    Args:
        num_paths: at least 2; of a conditional model they have the classes of the samples, and are at most as many.
    """

    def __init__(self, num_paths: int) -> None:
        if not isinstance(num_paths, int) or num_paths < 2:
            raise UserError(f"metric.path_energy.num_paths={num_paths} must be a whole number of at least 2")
        self._num_paths = num_paths

    @torch.no_grad()
    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, HasPaths)
        labels = _classes(inputs, self._num_paths) if inputs.model.is_conditional else None
        count = self._num_paths if labels is None else len(labels)
        collected: dict[str, list[Tensor]] = {}
        for start in range(0, count, _BATCH_SIZE):
            size = min(_BATCH_SIZE, count - start)
            condition = None if labels is None else labels[start : start + size].to(inputs.device)
            terms = inputs.model.path_energy_terms(size, condition, generator=SampleNoise(inputs.seed, start))
            for name, values in terms.items():
                collected.setdefault(name, []).append(values.cpu().double())
        parts = {name: torch.cat(values) for name, values in collected.items()}
        energy = torch.stack(list(parts.values())).sum(0)
        card: dict[str, Any] = {"num_paths": count, "seed": inputs.seed, "paths": inputs.model.path_settings()}
        unit = "data units^2"
        if inputs.spec.own_units is not None:
            unit, card["units"] = "standardized units^2", STANDARDIZED
        means = {name: float(part.mean()) for name, part in parts.items()}
        return Measurement(float(energy.mean()), unit, card, LOWER, mean_interval(energy), means)


def _classes(inputs: Inputs, count: int) -> Tensor:
    """The classes `(count,)` of the first samples, or of all if they are fewer."""
    labels = [labels for _, labels in inputs.need_generated().batches() if labels is not None]
    return torch.cat(labels)[:count]
