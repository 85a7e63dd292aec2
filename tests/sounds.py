"""Small folders of sound files, and the settings that suit them."""

import wave
from pathlib import Path
from typing import Any

import numpy as np

from src.data.arrays import Arrays
from src.data.audio_folder import audio_folder

__all__ = ["RATE", "SETTINGS", "prepared", "tone", "write_tones", "write_wav16"]

RATE = 4000
SETTINGS: dict[str, Any] = {
    "representation": "waveform",
    "sample_rate": RATE,
    "length": 512,
    "n_fft": 64,
    "hop": 32,
    "num_mels": 16,
    "log_low": -16.0,
    "log_high": 2.0,
    "label_pattern": None,
    "test_pattern": None,
    "val_pattern": None,
    "held_out": 0.25,
}


def prepared(path: Path, cache: Path, **settings: Any) -> Arrays:
    """The clips of a folder, as by `data=audio_folder`."""
    return audio_folder(path=str(path), cache=str(cache), **(SETTINGS | settings))


def tone(hertz: float, count: int = 400, rate: int = RATE, loudness: float = 0.5) -> np.ndarray:
    return loudness * np.sin(2 * np.pi * hertz * np.arange(count) / rate)


def write_wav16(file: Path, x: np.ndarray, rate: int = RATE) -> None:
    """Write `(t,)` or `(t, channels)` in [-1, 1] as a WAV file of 16 bits, without any library."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1 if x.ndim == 1 else x.shape[1])
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(np.round(x * 32767).astype("<i2").tobytes())


def write_tones(folder: Path, per_class: int = 8) -> Path:
    """Low and high tones of several lengths, a class each."""
    for i in range(per_class):
        write_wav16(folder / "low" / f"{i}.wav", tone(200 + 10 * (i % 30), 300 + 10 * (i % 10)))
        write_wav16(folder / "high" / f"{i}.wav", tone(1200 + 20 * (i % 30), 300 + 10 * (i % 10)))
    return folder
