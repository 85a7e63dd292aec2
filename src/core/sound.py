"""Sound as numbers: what the waveform of an example becomes before a model sees it, and the way back to a waveform.

A clip is stored once, as 16-bit integers. A model sees it as one of three:

    waveform   x in [-1, 1], `(1, T)`
    mu_law     integers 0 .. 255, `(T,)`: the logarithm of the amplitude in 256 steps, as telephones have it
    log_mel    a picture in [-1, 1], `(1, num_mels, T / hop)`: the logarithm of the power at each pitch and time

The way back is exact up to rounding from a waveform, leaves a signal 36 dB above the noise from mu-law, and from a log-mel
has to guess the phase (Griffin, Lim 1984). Whatever the representation, sounds are compared by their waveforms.

References:
    ITU-T recommendation G.711: mu-law, here as a formula and not in segments.
    Slaney 1998, "Auditory toolbox", technical report 1998-010, Interval Research: the mel scale and the triangular filters
        of unit area, which librosa has as its defaults.
    Griffin, Lim 1984, "Signal estimation from modified short-time Fourier transform", IEEE TASSP 32.
    Perraudin, Balazs, Sondergaard 2013, "A fast Griffin-Lim algorithm", WASPAA: the momentum.
    Lee, Seung 2001, "Algorithms for non-negative matrix factorization", NIPS: the updates of non-negative least squares.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.rng import SampleNoise

__all__ = [
    "LOG_MEL",
    "MU_LAW",
    "MU_LAW_LEVELS",
    "REPRESENTATIONS",
    "SILENCE",
    "WAVEFORM",
    "Sound",
    "from_pcm",
    "from_waveform",
    "griffin_lim",
    "log_mel",
    "mel_filters",
    "mel_to_waveform",
    "mu_law_decode",
    "mu_law_encode",
    "recorded_lengths",
    "spectrogram",
    "stft_distance",
    "to_pcm",
    "to_waveform",
]

WAVEFORM, MU_LAW, LOG_MEL = "waveform", "mu_law", "log_mel"
REPRESENTATIONS = (WAVEFORM, MU_LAW, LOG_MEL)
MU_LAW_LEVELS = 256
SILENCE = 128  # the level that an amplitude of 0 becomes

_MU = MU_LAW_LEVELS - 1
_PCM_SCALE = 32768  # of 16-bit integers
_HZ_PER_MEL = 200 / 3  # below 1 kHz
_KNEE_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27  # of the frequency, for each mel above the knee
_ITERATIONS = 32  # of Griffin and Lim
_MOMENTUM = 0.99
_NNLS_ITERATIONS = 100
_PHASE_SEED = 0
_TINY = 1e-10


@dataclass(frozen=True)
class Sound:
    """How the examples of a data set are clips of sound.

    Args:
        sample_rate: in Hz.
        length: samples T of a clip.
        representation: what models see, one of `REPRESENTATIONS`.
        n_fft: samples in the window of a spectrum, a Hann window.
        hop: samples from one window to the next.
        num_mels: bands of a log-mel.
        log_low, log_high: natural logarithms of the power that become -1 and 1 in a log-mel; what is beyond is clamped.
    """

    sample_rate: int
    length: int
    representation: str
    n_fft: int
    hop: int
    num_mels: int
    log_low: float
    log_high: float

    def __post_init__(self) -> None:
        if self.representation not in REPRESENTATIONS:
            raise UserError(
                f"data.representation={self.representation} is not known; allowed: {', '.join(REPRESENTATIONS)}"
            )
        sizes = {name: getattr(self, name) for name in ("sample_rate", "length", "n_fft", "hop", "num_mels")}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise UserError(f"data.{name}={size} must be a whole number of at least 1")
        if not 2 * self.hop <= self.n_fft <= self.length:
            raise UserError(
                f"data.n_fft={self.n_fft} must be at least twice data.hop={self.hop}, and at most data.length={self.length}"
            )
        if self.length % self.hop:
            raise UserError(f"data.length={self.length} must be a multiple of data.hop={self.hop}")
        if not self.log_low < self.log_high:
            raise UserError(f"data.log_low={self.log_low} must be below data.log_high={self.log_high}")

    @property
    def num_frames(self) -> int:
        return self.length // self.hop

    @property
    def mel_shape(self) -> tuple[int, int, int]:
        """Of the log-mel of one clip."""
        return (1, self.num_mels, self.num_frames)

    @property
    def shape(self) -> tuple[int, ...]:
        """Event shape of what models see."""
        return {WAVEFORM: (1, self.length), MU_LAW: (self.length,), LOG_MEL: self.mel_shape}[self.representation]

    @property
    def seconds(self) -> float:
        return self.length / self.sample_rate

    def describe(self) -> str:
        as_what = self.representation.replace("_", "-")
        return f"{self.seconds:.3g} s of sound at {self.sample_rate:,} Hz as {as_what}"

    def seen_as(self, representation: str) -> "Sound":
        """The same clips in another representation."""
        return replace(self, representation=representation)


def mu_law_encode(x: Tensor) -> Tensor:
    """Amplitudes in [-1, 1] to levels 0 .. 255, int64, same shape.

        round((sign(x) ln(1 + 255 |x|) / ln 256 + 1) / 2 * 255)

    What is beyond 1 is clamped. An even number of levels has none for 0, which is between two of them and becomes 128
    (`SILENCE`), as all amplitudes from 0 to 1.7e-4.
    """
    x = x.clamp(-1, 1)
    squashed = x.sign() * torch.log1p(_MU * x.abs()) / math.log1p(_MU)
    return ((squashed + 1) / 2 * _MU + 0.5).floor().long()


def mu_law_decode(levels: Tensor) -> Tensor:
    """Levels 0 .. 255 to amplitudes in [-1, 1], float32, same shape: the amplitude whose logarithm is the level's.

    So 128 becomes 8.6e-5 and not 0, as with torchaudio's `mu_law_decoding`; `to_waveform` hears it as silence.
    """
    squashed = 2 * levels.float() / _MU - 1
    return squashed.sign() * torch.expm1(squashed.abs() * math.log1p(_MU)) / _MU


def recorded_lengths(levels: Tensor) -> Tensor:
    """How many samples of clips `(B, T)` in mu-law there are up to the last that is not silence, `(B,)` int64.

    What is behind them is what a clip was padded with, and what cannot be told from it: samples below 1.7e-4.
    """
    place = torch.arange(1, levels.shape[1] + 1, device=levels.device)
    return ((levels != SILENCE) * place).amax(1)


def to_pcm(waveform: Tensor) -> Tensor:
    """Amplitudes in [-1, 1] to int16, clamped and rounded; same shape."""
    return (waveform * _PCM_SCALE).round().clamp(-_PCM_SCALE, _PCM_SCALE - 1).to(torch.int16)


def from_pcm(pcm: Tensor) -> Tensor:
    """int16 to amplitudes in [-1, 1), float32, exactly; same shape."""
    return pcm.float() / _PCM_SCALE


def spectrogram(waveform: Tensor, n_fft: int, hop: int) -> Tensor:
    """The short-time Fourier transform of clips `(B, T)`, complex `(B, n_fft // 2 + 1, 1 + T // hop)`.

    Frame t is centred on sample t * hop; the ends are padded with silence, the window is a periodic Hann window.
    """
    window = torch.hann_window(n_fft, dtype=waveform.dtype, device=waveform.device)
    return torch.stft(waveform, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True)


def stft_distance(x: Tensor, y: Tensor, n_fft: int, hop: int, floor: float) -> Tensor:
    """Spectral convergence of y from x plus their log magnitude distance at one resolution, `(B,)`.

        | |X| - |Y| |_F / | |X| |_F  +  mean | ln |X| - ln |Y| |

    Args:
        x, y: clips `(B, T)`, x the recording.
        n_fft, hop: the resolution.
        floor: magnitudes below it count as it, in both terms.
    """
    a, b = (spectrogram(clip, n_fft, hop).abs().clamp(min=floor).flatten(1) for clip in (x, y))
    return (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=_TINY) + (a.log() - b.log()).abs().mean(1)


@functools.lru_cache
def _mel_filters(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    def to_mel(hertz: float) -> float:
        if hertz < _KNEE_HZ:
            return hertz / _HZ_PER_MEL
        return _KNEE_HZ / _HZ_PER_MEL + math.log(hertz / _KNEE_HZ) / _LOG_STEP

    knee = _KNEE_HZ / _HZ_PER_MEL
    mels = torch.linspace(0, to_mel(sample_rate / 2), num_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < knee, mels * _HZ_PER_MEL, _KNEE_HZ * ((mels - knee) * _LOG_STEP).exp())
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    below, centre, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - below) / (centre - below), (above - bins) / (above - centre)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (above - below)


def mel_filters(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """Slaney's filters, from 0 Hz to half the sample rate, `(num_mels, n_fft // 2 + 1)` float64, in 1/Hz.

    Triangles on the frequency axis whose corners are equally far apart in mels: 200/3 Hz a mel below 1 kHz, and a factor of
    6.4^(1/27) a mel above. Each has the area 1. It is librosa's `filters.mel(sr, n_fft, n_mels)`.

    Raises:
        UserError: a band lies between two frequencies of the spectrum, so that nothing would ever be in it.
    """
    filters = _mel_filters(sample_rate, n_fft, num_mels)
    if empty := int((filters.sum(1) == 0).sum()):
        raise UserError(
            f"data.num_mels={num_mels} leaves {empty} of the bands without a frequency at data.n_fft={n_fft} and "
            f"data.sample_rate={sample_rate}; lower data.num_mels or raise data.n_fft"
        )
    return filters


def log_mel(waveform: Tensor, sound: Sound) -> Tensor:
    """Clips `(B, T)` to pictures `(B, 1, num_mels, T // hop)` in [-1, 1], the low notes first.

    ln of the power in each mel band, linearly from [log_low, log_high] onto [-1, 1], clamped at both ends. The last frame,
    which is centred on the end of the clip, is left out.
    """
    power = spectrogram(waveform, sound.n_fft, sound.hop)[..., :-1].abs().square()
    filters = mel_filters(sound.sample_rate, sound.n_fft, sound.num_mels).to(power)
    logarithm = (filters @ power).clamp(min=math.exp(sound.log_low)).log()
    return (2 * (logarithm - sound.log_low) / (sound.log_high - sound.log_low) - 1).clamp(-1, 1)[:, None]


def griffin_lim(
    magnitude: Tensor, n_fft: int, hop: int, length: int, iterations: int = _ITERATIONS, momentum: float = _MOMENTUM
) -> Tensor:
    """Clips `(B, length)` whose spectrograms have about these magnitudes `(B, n_fft // 2 + 1, 1 + length // hop)`.

    Phases, at random in the beginning and the same ones for every clip, are again and again replaced by those of the
    nearest spectrogram that belongs to a sound. Without momentum no iteration makes the distance of both magnitudes larger
    (Griffin, Lim 1984); with one of 0.99 it gets smaller sooner, as a rule (Perraudin et al. 2013).
    """
    window = torch.hann_window(n_fft, dtype=magnitude.dtype, device=magnitude.device)

    def sound_of(spectrum: Tensor) -> Tensor:
        return torch.istft(spectrum, n_fft, hop, window=window, center=True, length=length)

    angle = SampleNoise(_PHASE_SEED).uniform((1, *magnitude.shape[1:]), magnitude) * (2 * math.pi)
    phase = torch.polar(torch.ones_like(angle), angle).expand(magnitude.shape)
    before = torch.zeros_like(phase)
    for _ in range(iterations):
        rebuilt = spectrogram(sound_of(magnitude * phase), n_fft, hop)
        ahead = rebuilt - before * (momentum / (1 + momentum))
        phase = ahead / ahead.abs().clamp(min=_TINY)
        before = rebuilt
    return sound_of(magnitude * phase)


def mel_to_waveform(mel: Tensor, sound: Sound, iterations: int = _ITERATIONS) -> Tensor:
    """Pictures `(B, 1, num_mels, T // hop)` in [-1, 1] to clips `(B, T)`: powers by non-negative least squares, phases by
    Griffin and Lim. What is at the lower end of the range, where a log-mel is clamped, becomes silence."""
    unit = (mel[:, 0].clamp(-1, 1) + 1) / 2
    in_bands = (sound.log_low + (sound.log_high - sound.log_low) * unit).exp() - math.exp(sound.log_low)
    filters = mel_filters(sound.sample_rate, sound.n_fft, sound.num_mels).to(mel)
    magnitude = _nonnegative_least_squares(filters, in_bands.clamp(min=0)).sqrt()
    ending = torch.zeros_like(magnitude[..., :1])  # the frame that a log-mel leaves out
    return griffin_lim(torch.cat([magnitude, ending], -1), sound.n_fft, sound.hop, sound.length, iterations)


def _nonnegative_least_squares(a: Tensor, y: Tensor) -> Tensor:
    """x >= 0 `(B, N, t)` with a small |a x - y|^2, for a >= 0 `(M, N)` and y >= 0 `(B, M, t)`: multiplicative updates."""
    projected, gram = a.T @ y, a.T @ a
    x = projected / gram.sum(1, keepdim=True).clamp(min=_TINY)
    for _ in range(_NNLS_ITERATIONS):
        x = x * projected / (gram @ x).clamp(min=torch.finfo(x.dtype).tiny)
    return x


def to_waveform(x: Tensor, sound: Sound) -> Tensor:
    """Examples `(B, *sound.shape)` in data units to the clips that they are heard as, `(B, T)` float32 in [-1, 1].

    The level of silence is heard as 0: a constant 8.6e-5 would be a sound wherever the logarithm of a power is taken.
    """
    if sound.representation == WAVEFORM:
        return x[:, 0].float().clamp(-1, 1)
    if sound.representation == MU_LAW:
        return mu_law_decode(x).masked_fill(x == SILENCE, 0.0)
    return mel_to_waveform(x.float(), sound).clamp(-1, 1)


def from_waveform(waveform: Tensor, sound: Sound) -> Tensor:
    """Clips `(B, T)` to examples `(B, *sound.shape)` in data units."""
    if sound.representation == WAVEFORM:
        return waveform[:, None]
    if sound.representation == MU_LAW:
        return mu_law_encode(waveform)
    return log_mel(waveform, sound)
