"""Sound as numbers: mu-law, log-mels as librosa's, the way back, and the settings that are refused."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.core.sound import (
    LOG_MEL,
    MU_LAW,
    REPRESENTATIONS,
    SILENCE,
    WAVEFORM,
    Sound,
    _nonnegative_least_squares,
    from_pcm,
    from_waveform,
    griffin_lim,
    log_mel,
    mel_filters,
    mel_to_waveform,
    mu_law_decode,
    mu_law_encode,
    recorded_lengths,
    spectrogram,
    to_pcm,
    to_waveform,
)
from src.core.spec import CONTINUOUS, DataSpec, Values

ORACLE = Path(__file__).parent / "librosa_mel.npz"


def sound(representation=WAVEFORM, **settings) -> Sound:
    plain = {
        "sample_rate": 8000,
        "length": 2048,
        "n_fft": 256,
        "hop": 128,
        "num_mels": 64,
        "log_low": -16.0,
        "log_high": 2.0,
    }
    return Sound(representation=representation, **(plain | settings))


def tones() -> torch.Tensor:
    """Two clips of voices that glide, `(2, 2048)`."""
    t = torch.arange(2048) / 8000
    glide = sum(torch.sin(2 * math.pi * k * (150 * t + 200 * t**2)) / k for k in range(1, 8))
    clip = 0.2 * glide * torch.sin(math.pi * t / t[-1])
    return torch.stack([clip, clip.flip(0)])


def snr(x, y) -> float:
    return float(10 * (x.square().sum() / (x - y).square().sum()).log10())


def test_mu_law_is_the_formula_and_round_trips_every_level():
    levels = torch.arange(256)
    torch.testing.assert_close(mu_law_encode(mu_law_decode(levels)), levels)
    x = 0.5
    expected = math.floor((math.log(1 + 255 * x) / math.log(256) + 1) / 2 * 255 + 0.5)
    assert mu_law_encode(torch.tensor([x, 0.0, 1.0, -1.0, 3.0, -3.0])).tolist() == [expected, 128, 255, 0, 255, 0]
    torch.testing.assert_close(mu_law_decode(levels), -mu_law_decode(255 - levels))
    assert 30 < snr(tones(), mu_law_decode(mu_law_encode(tones()))) < 45


def test_16_bits_round_trip_exactly_and_clamp():
    pcm = torch.arange(-32768, 32768, dtype=torch.int16)
    assert torch.equal(to_pcm(from_pcm(pcm)), pcm)
    assert to_pcm(torch.tensor([2.0, -2.0])).tolist() == [32767, -32768]


def librosa_signal() -> np.ndarray:
    """What the stored values were computed of, by librosa 0.11.0 in float64."""
    t = np.arange(2048) / 8000
    chirp = 0.25 * np.sin(2 * np.pi * (1000 * t + 800 * t**2))
    return 0.5 * np.sin(2 * np.pi * 440 * t) + chirp + 0.1 * np.cos(2 * np.pi * 3111 * t) * (t > 0.1)


def test_mel_powers_and_filters_are_those_of_librosa():
    stored = np.load(ORACLE)
    filters = mel_filters(16_000, 512, 40).numpy()
    np.testing.assert_allclose(filters, stored["filters_16000_512_40"], rtol=1e-6, atol=1e-9)
    x = torch.from_numpy(librosa_signal())[None]
    power = mel_filters(8000, 256, 64) @ spectrogram(x, 256, 128).abs().square()
    np.testing.assert_allclose(power[0].numpy(), stored["mel_8000_256_128_64"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_log_mel_is_the_logarithm_of_librosas(dtype, tolerance):
    stored = np.load(ORACLE)["mel_8000_256_128_64"][:, :-1]
    found = log_mel(torch.from_numpy(librosa_signal()).to(dtype)[None], sound())
    expected = np.clip((np.log(stored.clip(math.exp(-16))) + 16) / 9 - 1, -1, 1)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.slow  # for the import
def test_mel_filters_are_those_of_transformers():
    audio_utils = pytest.importorskip("transformers.audio_utils", reason="the extra `text` is not installed")
    for rate, n_fft, num_mels in ((8000, 256, 64), (22_050, 1024, 80)):
        expected = audio_utils.mel_filter_bank(
            1 + n_fft // 2, num_mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
        )
        np.testing.assert_allclose(mel_filters(rate, n_fft, num_mels).numpy(), expected.T, rtol=0, atol=1e-8)


def test_a_filter_has_the_area_1_and_none_is_empty():
    filters = mel_filters(8000, 4096, 20)
    torch.testing.assert_close(filters.sum(1) * 8000 / 4096, torch.ones(20, dtype=torch.float64), rtol=1e-3, atol=0)
    with pytest.raises(
        UserError, match=r"data\.num_mels=200 leaves \d+ of the bands without a frequency at data\.n_fft=256"
    ):
        mel_filters(8000, 256, 200)


def test_a_tone_is_loudest_about_its_own_band_all_the_time():
    t = torch.arange(2048) / 8000
    centre = mel_filters(8000, 256, 64)[30].argmax() * 8000 / 256
    mel = log_mel(0.5 * torch.sin(2 * math.pi * centre * t)[None], sound())
    assert mel.shape == (1, 1, 64, 16)
    assert ((mel[0, 0].argmax(0) - 30).abs() <= 1).all()


def test_silence_is_the_lowest_level_and_comes_back_as_silence():
    mel = log_mel(torch.zeros(1, 2048), sound())
    assert (mel == -1).all()
    assert mel_to_waveform(mel, sound()).abs().max() < 1e-6


def distance(x: torch.Tensor, magnitude: torch.Tensor, hop: int) -> float:
    """Of the magnitudes of clips' spectra from others, relative, over all frequencies: those but the first and the last
    belong to a negative one too."""
    twice = torch.full((129, 1), 2.0)
    twice[[0, -1]] = 1
    error = (spectrogram(x, 256, hop).abs() - magnitude).square() * twice
    return float((error.sum() / (magnitude.square() * twice).sum()).sqrt())


def test_without_momentum_no_iteration_of_griffin_lim_goes_away_from_the_magnitudes():
    """Griffin and Lim 1984, section III."""
    magnitude = spectrogram(tones(), 256, 64).abs()
    found = [distance(griffin_lim(magnitude, 256, 64, 2048, k, momentum=0.0), magnitude, 64) for k in range(12)]
    assert all(after < before + 1e-6 for before, after in itertools.pairwise(found))
    assert found[-1] < 0.5 * found[0]


def test_momentum_brings_griffin_lim_nearer_to_the_magnitudes_of_a_sound():
    magnitude = spectrogram(tones(), 256, 64).abs()
    with_momentum, without = (
        distance(griffin_lim(magnitude, 256, 64, 2048, 32, momentum), magnitude, 64) for momentum in (0.99, 0.0)
    )
    assert with_momentum < 0.15
    assert with_momentum < without


def test_the_spectrum_of_a_tone_on_a_frequency_of_it_is_known():
    k, amplitude = 20, 0.5
    x = amplitude * torch.cos(2 * math.pi * k / 256 * torch.arange(2048, dtype=torch.float64))[None]
    frame = spectrogram(x, 256, 128)[0, :, 8].abs()
    expected = torch.zeros(129, dtype=torch.float64)  # a Hann window is 1/2 - cos / 2: three lines
    expected[[k - 1, k, k + 1]] = amplitude * 256 / 4 * torch.tensor([0.5, 1, 0.5], dtype=torch.float64)
    torch.testing.assert_close(frame, expected, rtol=0, atol=1e-9)


def test_powers_of_a_mel_are_the_least_squares_of_its_bands():
    optimize = pytest.importorskip("scipy.optimize")
    filters = mel_filters(8000, 256, 64)
    power = spectrogram(tones().double(), 256, 128).abs().square()[:1, :, 4:8]
    bands = filters @ power
    found = _nonnegative_least_squares(filters, bands)
    assert (found >= 0).all()
    for t in range(4):
        _, least = optimize.nnls(filters.numpy(), bands[0, :, t].numpy())
        residual = float((filters @ found[0, :, t] - bands[0, :, t]).norm())
        assert residual < least + 0.01 * float(bands[0, :, t].norm())


def test_griffin_lim_does_not_depend_on_the_batch():
    magnitude = spectrogram(tones(), 256, 128).abs()
    together = griffin_lim(magnitude, 256, 128, 2048)
    apart = torch.cat([griffin_lim(one[None], 256, 128, 2048) for one in magnitude])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-4)


def test_the_way_back_from_a_log_mel_keeps_the_log_mel():
    settings = sound(LOG_MEL)
    mel = log_mel(tones(), settings)
    again = log_mel(mel_to_waveform(mel, settings), settings)
    assert (again - mel).abs().mean() * 9 < 0.3  # 9 nats of power are 1 of a log-mel
    assert (again - mel).abs().mean() < 0.2 * (mel - mel.mean()).abs().mean()


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_every_representation_has_its_shape_and_its_way_back(representation):
    settings = sound(representation)
    x = from_waveform(tones(), settings)
    assert x.shape == (2, *settings.shape)
    assert x.dtype == (torch.int64 if representation == MU_LAW else torch.float32)
    back = to_waveform(x, settings)
    assert back.shape == (2, 2048)
    assert back.abs().max() <= 1
    magnitude = spectrogram(tones(), 256, 64).abs()  # not the samples: phases are not in a log-mel
    assert distance(back, magnitude, 64) < {WAVEFORM: 1e-6, MU_LAW: 0.02, LOG_MEL: 0.4}[representation]


def test_silence_in_mu_law_is_heard_as_silence_and_has_no_length():
    settings = sound(MU_LAW)
    levels = from_waveform(torch.zeros(2, 2048), settings)
    assert (levels == SILENCE).all()
    assert (mu_law_decode(levels) > 0).all()  # the formula has no level for 0
    assert (to_waveform(levels, settings) == 0).all()
    assert (log_mel(to_waveform(levels, settings), settings) == -1).all()
    assert recorded_lengths(levels).tolist() == [0, 0]
    levels[1, [3, 700]] = torch.tensor([0, 129])
    assert recorded_lengths(levels).tolist() == [0, 701]


def test_noise_of_the_size_of_the_rounding_is_below_the_lowest_level():
    noise = (SampleNoise(0).uniform((4, 2048), torch.zeros(())) - 0.5) / 32768
    assert (log_mel(noise, sound()) == -1).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"representation": "mp3"}, r"data\.representation=mp3 is not known; allowed: waveform, mu_law, log_mel"),
        ({"length": 100}, r"data\.n_fft=256 must be at least twice data\.hop=128, and at most data\.length=100"),
        ({"hop": 200}, r"data\.n_fft=256 must be at least twice data\.hop=200"),
        ({"length": 2000}, r"data\.length=2000 must be a multiple of data\.hop=128"),
        ({"num_mels": 0}, r"data\.num_mels=0 must be a whole number of at least 1"),
        ({"log_high": -20.0}, r"data\.log_low=-16\.0 must be below data\.log_high=-20\.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        sound(**settings)


def test_a_spec_of_sound_survives_json_and_one_without_is_as_before():
    values = Values(CONTINUOUS, -1.0, 1.0, None)
    spec = DataSpec("tones", "audio", (1, 2048), values, sound=sound())
    assert DataSpec.from_dict(spec.to_dict()) == spec
    assert "0.256 s of sound at 8,000 Hz as waveform" in spec.describe()
    assert "sound" not in DataSpec("tones", "audio", (1, 2048), values).to_dict()
    with pytest.raises(UserError, match=r"gives audio \(set data\.representation=mu_law\)"):
        spec.require_modality("tokens")
