"""Sounds to look at and to listen to: pictures of their log-mels, and WAV files."""

import wave
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

from src.core.sound import LOG_MEL, Sound, log_mel, to_pcm, to_waveform

__all__ = ["joined", "mel_bytes", "mel_grid", "write_wav"]

_PAUSE = 0.25  # seconds between clips that are joined


def mel_bytes(x: Tensor, sound: Sound) -> Tensor:
    """Pictures `(N, 1, num_mels, frames)` uint8 of examples `(N, *sound.shape)`, time to the right and high notes above."""
    mel = x if sound.representation == LOG_MEL else log_mel(to_waveform(x, sound), sound)
    return (mel.clamp(-1, 1) + 1).mul(127.5).round().byte().flip(2).cpu()


def mel_grid(x: Tensor, sound: Sound, per_row: int) -> Tensor:
    """The same as one uint8 picture `(3, height, width)`, with grey lines between them."""
    return make_grid(mel_bytes(x, sound), nrow=per_row, padding=1, pad_value=128)


def joined(clips: Tensor, sound: Sound) -> Tensor:
    """Clips `(N, T)` one after the other with pauses between them, `(t,)`."""
    pause = clips.new_zeros(len(clips), round(_PAUSE * sound.sample_rate))
    return torch.cat([clips, pause], 1).flatten()[: -pause.shape[1]]


def write_wav(file: Path, waveform: Tensor, sample_rate: int) -> None:
    """Write `(T,)` in [-1, 1] as a WAV file of one channel and 16 bits."""
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(sample_rate)
        stream.writeframes(to_pcm(waveform).cpu().numpy().astype("<i2").tobytes())
