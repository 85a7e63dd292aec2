"""How far reconstructed sounds are from the recordings, by their spectra: the ear does not hear the phase.

Whatever a model sees of a clip, its reconstruction is turned into a waveform and compared with the recording itself. Beside
the model stand the same clips by way of mu-law, and by way of a log-mel and Griffin and Lim, which no model of these
representations can surpass by much, and noise.

References:
    Yamamoto, Song, Kim 2020, "Parallel WaveGAN: a fast waveform generation model based on generative adversarial networks
        with multi-resolution spectrogram", arXiv:1910.11480, section 2.2.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import CanReconstruct
from src.core.rng import SampleNoise, derive_seed
from src.core.sound import MU_LAW as IN_MU_LAW
from src.core.sound import (
    Sound,
    from_pcm,
    from_waveform,
    log_mel,
    mel_to_waveform,
    stft_distance,
    to_pcm,
    to_waveform,
)
from src.metrics.intervals import mean_interval
from src.metrics.metric import GRIFFIN_LIM, LOWER, MU_LAW, NOISE, Inputs, Measurement, Metric, Reading, require

__all__ = ["LogMelDistance", "STFTDistance", "log_mel_distance", "round_trips"]

_DECIBELS = 10 / math.log(10)  # of a natural logarithm of power
_KEPT = "reconstructed_clips"
_TINY = 1e-8
_AT_A_TIME = 100  # clips


def log_mel_distance(x: Tensor, y: Tensor, sound: Sound) -> Tensor:
    """Mean |difference| of the levels of two clips `(B, T)` over mel bands and frames, `(B,)` in decibels.

    Levels are those of `core.sound.log_mel`: what is softer than its lower end counts as equally soft.
    """
    span = (sound.log_high - sound.log_low) / 2  # what 1 of a log-mel is, as a natural logarithm
    return (log_mel(x, sound) - log_mel(y, sound)).abs().flatten(1).mean(1) * span * _DECIBELS


def round_trips(sound: Sound) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways of clips `(B, T)` through a representation and back, by the name of the reference row."""
    in_mu_law = sound.seen_as(IN_MU_LAW)
    return {
        MU_LAW: lambda clips: to_waveform(from_waveform(clips, in_mu_law), in_mu_law),
        GRIFFIN_LIM: lambda clips: mel_to_waveform(log_mel(clips, sound), sound),
    }


class _OfReconstructions(Metric):
    """A distance of test clips and their reconstructions, mean over clips.

    Args:
        num_examples: so many test clips, evenly spread over the split; None for all.
    """

    unit = "1"

    def __init__(self, num_examples: int | None) -> None:
        require_at_least("metric.*.num_examples", num_examples, 1)
        self._num_examples = num_examples

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor, sound: Sound) -> Tensor:
        """Of recordings and reconstructions `(B, T)`, `(B,)`."""

    @abstractmethod
    def protocol(self, sound: Sound) -> dict[str, Any]:
        """What the distance depends on, for its card."""

    def measure(self, inputs: Inputs) -> Measurement:
        sound = inputs.spec.sound
        if sound is None or inputs.clips is None:
            raise NotApplicable(f"it is of sound; data={inputs.spec.name} gives {inputs.spec.modality}")
        require(inputs, CanReconstruct)
        clips = _reconstructed(inputs, sound, self._num_examples)
        readings = {name: self._reading(clips[""], rebuilt, sound) for name, rebuilt in clips.items() if name}
        own = readings.pop(_KEPT)
        examples = "all" if self._num_examples is None else "evenly spread over the split"
        card = {"split": "test", "num_examples": own.count, "examples": examples, **inputs.values_as_judged}
        card |= self.protocol(sound)
        return Measurement(own.value, self.unit, card, LOWER, own.interval, anchors=dict(readings))

    def _reading(self, x: Tensor, y: Tensor, sound: Sound) -> Reading:
        parts = zip(x.split(_AT_A_TIME), y.split(_AT_A_TIME), strict=True)
        values = torch.cat([self.distance(from_pcm(a), from_pcm(b), sound) for a, b in parts]).double()
        return Reading(float(values.mean()), len(values), mean_interval(values))


class LogMelDistance(_OfReconstructions):
    """Mean distance of the levels in mel bands, in decibels."""

    unit = "dB"

    def distance(self, x: Tensor, y: Tensor, sound: Sound) -> Tensor:
        return log_mel_distance(x, y, sound)

    def protocol(self, sound: Sound) -> dict[str, Any]:
        return {
            "n_fft": sound.n_fft,
            "hop": sound.hop,
            "num_mels": sound.num_mels,
            "levels": f"{sound.log_low * _DECIBELS:.1f} to {sound.log_high * _DECIBELS:.1f} dB",
        }


class STFTDistance(_OfReconstructions):
    """Mean over resolutions of spectral convergence plus log magnitude distance.

    Args:
        n_ffts: windows in samples, one for each resolution; the hop is a quarter of each.
        floor: magnitudes below it count as it.
        num_examples: so many test clips, evenly spread over the split; None for all.
    """

    def __init__(self, n_ffts: list[int], floor: float, num_examples: int | None) -> None:
        super().__init__(num_examples)
        if not n_ffts or any(n_fft < 4 for n_fft in n_ffts):
            raise UserError(f"metric.stft_distance.n_ffts={n_ffts} must be one or more windows of at least 4 samples")
        if not floor > 0:
            raise UserError(f"metric.stft_distance.floor={floor} must be a positive magnitude")
        self._n_ffts = n_ffts
        self._floor = floor

    def distance(self, x: Tensor, y: Tensor, sound: Sound) -> Tensor:
        each = [stft_distance(x, y, n_fft, n_fft // 4, self._floor) for n_fft in self._n_ffts]
        return torch.stack(each).mean(0)

    def protocol(self, sound: Sound) -> dict[str, Any]:
        return {"n_ffts": list(self._n_ffts), "hop": "a quarter", "floor": self._floor}


@torch.no_grad()
def _reconstructed(inputs: Inputs, sound: Sound, num_examples: int | None) -> dict[str, Tensor]:
    """Recordings (under ""), their reconstructions and the yardsticks, `(N, T)` int16 each, made once for all metrics."""
    kept: dict[Any, dict[str, Tensor]] = inputs.kept.setdefault(_KEPT, {})
    if num_examples in kept:
        return kept[num_examples]
    assert inputs.clips is not None
    assert isinstance(inputs.model, CanReconstruct)
    total = len(inputs.clips)
    count = total if num_examples is None else min(num_examples, total)
    chosen = torch.arange(count) * total // count
    rebuilt, start = [], 0
    for batch in inputs.test_batches():
        own = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        start += len(batch)
        if not len(own):
            continue
        own = own.to(batch.x.device)
        out = inputs.model.reconstruct(batch.x[own], None if batch.condition is None else batch.condition[own])
        if not out.isfinite().all():
            raise NotApplicable(f"{inputs.model_name} rebuilt examples that are not finite")
        rebuilt.append(to_pcm(to_waveform(out, sound)).cpu())
    x = torch.from_numpy(inputs.clips[chosen.numpy()])
    noise = SampleNoise(derive_seed(inputs.seed, 2)).uniform(tuple(x.shape), torch.zeros(()))
    found = {"": x, _KEPT: torch.cat(rebuilt), NOISE: to_pcm(2 * noise - 1)}
    for name, way in round_trips(sound).items():
        found[name] = torch.cat([to_pcm(way(from_pcm(some))) for some in x.split(_AT_A_TIME)])
    kept[num_examples] = found
    return found
