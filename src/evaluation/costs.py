"""What a model costs: parameters, the time of its training, and time and evaluations of a network to draw from it.

Seconds are measured on the machine at hand while it does whatever else it does. They are told, never tested.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.core.devices import device_name, synchronize
from src.core.protocols import CountsEvaluations, HasSettings

__all__ = ["SamplingMeter", "costs_in_words", "costs_to_json"]


@dataclass(frozen=True)
class _Drawing:
    """One batch of samples: how long it took, how large it is, and the evaluations that were counted meanwhile."""

    seconds: float
    num_samples: int
    num_evaluations: int


class SamplingMeter:
    """Measures a model while it draws samples.

    The first batch, in which a device warms up, is left out of the time if there are others.

    Args:
        model: with `CanSample`, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._drawings: list[_Drawing] = []

    def timed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same batches `(n, *event)` of samples; each is drawn when it is asked for, and timed."""
        drawing = iter(batches)
        while True:
            synchronize(self._device)
            start, evaluations = time.perf_counter(), self._counted()
            try:
                x = next(drawing)
            except StopIteration:
                return
            synchronize(self._device)
            self._drawings.append(_Drawing(time.perf_counter() - start, len(x), self._counted() - evaluations))
            yield x

    def to_json(self) -> dict[str, Any] | None:
        """`{"seconds", "samples", "evaluations_per_sample": x or null, "device", "settings"}`; None if nothing was drawn.

        Evaluations are those of a network, of one example each. A model that does not count them has one, its generator or
        decoder, besides those that its parts count. One that is no network, as it has no modules in it, has null.
        """
        if not self._drawings:
            return None
        timed = self._drawings[1:] or self._drawings
        return {
            "seconds": sum(drawing.seconds for drawing in timed),
            "samples": sum(drawing.num_samples for drawing in timed),
            "evaluations_per_sample": self._evaluations_per_sample(),
            "device": device_name(self._device),
            "settings": self._model.settings() if isinstance(self._model, HasSettings) else {},
        }

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _counted(self) -> int:
        """All that was counted so far, by the model or else by its parts."""
        counting = [self._model] if self._is_counting else self._model.modules()
        return sum(int(module.num_evaluations) for module in counting if isinstance(module, CountsEvaluations))

    @property
    def _is_counting(self) -> bool:
        return isinstance(self._model, CountsEvaluations)

    def _evaluations_per_sample(self) -> float | None:
        counted = sum(drawing.num_evaluations for drawing in self._drawings)
        of_parts = counted / sum(drawing.num_samples for drawing in self._drawings)
        if self._is_counting:
            return of_parts
        return 1 + of_parts if any(True for _ in self._model.children()) else None


def costs_to_json(
    model: nn.Module,
    training: tuple[float, str] | None,
    sampling: dict[str, Any] | None,
    earlier: dict[str, Any],
    autoencoder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The `costs` of a results JSON:

    {"parameters": all of the model's, "training_seconds": x or null, "training_device": name or null,
     "sampling": as `SamplingMeter.to_json`}

    and of a model on the latents of another one besides what that cost before, which `training_seconds` leaves out:

    {"autoencoder": {"parameters": those of the model that are its, "training_seconds", "training_device"}}

    Args:
        model: any.
        training: seconds and the device, if they are known.
        sampling: of the samples drawn now; None if there are none, in which case those of `earlier` stay.
        earlier: the costs as they were known before; may be empty.
        autoencoder: what is told of the other model; None if there is none.
    """
    seconds, device = training or (None, None)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training_seconds": seconds,
        "training_device": device,
        "sampling": earlier.get("sampling") if sampling is None else sampling,
        **({} if autoencoder is None else {"autoencoder": autoencoder}),
    }


def costs_in_words(costs: dict[str, Any]) -> str:
    """`769,089 parameters; training took 120 s; 1,000 samples take 3.1 s, each with 50 evaluations of a network`."""
    before = costs.get("autoencoder")
    of_them = f", {before['parameters']:,} of them the autoencoder's" if before else ""
    words = [f"{costs['parameters']:,} parameters{of_them}"]
    if costs["training_seconds"] is not None:
        words.append(f"training took {costs['training_seconds']:,.4g} s on {costs['training_device']}")
        words[-1] += _with_autoencoder(costs["training_seconds"], before) if before else ""
    sampling = costs["sampling"]
    if sampling is not None:
        evaluations = sampling["evaluations_per_sample"]
        how = f", each with {evaluations:,.4g} evaluation{'s' * (evaluations != 1)} of a network" if evaluations else ""
        words.append(f"1,000 samples take {1000 * sampling['seconds'] / sampling['samples']:.3g} s{how}")
    return "; ".join(words)


def _with_autoencoder(seconds: float, before: dict[str, Any]) -> str:
    """` after 300 s of the autoencoder's on DEVICE, 420 s in all`."""
    own = before["training_seconds"]
    if own is None:
        return ", without that of the autoencoder, which is not known"
    return f" after {own:,.4g} s of the autoencoder's on {before['training_device']}, {own + seconds:,.4g} s in all"
