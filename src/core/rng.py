"""Randomness comes in through a `Noise` object; nobody reads torch's global generator.

`StreamNoise` is one fast stream, for training. `SampleNoise` gives every sample a stream of its own, so that sample i of
a call is the same whatever the batch it was drawn in, on every device. It is counter based: bits are a hash of (seed,
sample index, position), so nothing has to be stored.

The hash is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA), computed in
wrapping int64 arithmetic.
"""

import math
import secrets
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Noise", "SampleNoise", "StreamNoise", "derive_seed", "fresh_noise", "hash_bits"]


class Noise(ABC):
    """A source of random tensors on the device and in the dtype of `like`."""

    @abstractmethod
    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Independent N(0, 1) values of `shape`, first dimension = samples."""

    @abstractmethod
    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Independent values of `shape`, uniform on the open interval (0, 1)."""


class StreamNoise(Noise):
    """One torch generator per device, all seeded alike. Fast; values depend on what was drawn before."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=self._on(like.device), device=like.device, dtype=like.dtype)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        u = torch.rand(shape, generator=self._on(like.device), device=like.device, dtype=like.dtype)
        return u.clamp_(min=torch.finfo(u.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        """The state of every stream, as plain types and tensors; one entry per device used so far."""
        return {str(device): generator.get_state() for device, generator in self._generators.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, generator_state in state.items():
            self._on(torch.device(name)).set_state(generator_state.cpu())

    def _on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


class SampleNoise(Noise):
    """A stream of its own for every sample: row i of every draw belongs to sample `start + i`.

    Args:
        seed: any integer.
        start: index of the first sample, to continue an earlier call: drawing samples 0..9 and 10..19 in two calls
            gives the same values as drawing 0..19 in one. Or the indices of all samples of a draw, `(N,)` int64.
    """

    def __init__(self, seed: int, start: int | Tensor = 0) -> None:
        self._seed = seed
        self._start = start
        self._position = 0

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        # Box and Muller 1958; two uniforms for each pair of normals
        count = math.prod(shape[1:])
        half = (count + 1) // 2
        u = self._uniform64(shape[0], 2 * half, like.device)
        radius = (-2 * u[:, :half].log()).sqrt()
        angle = (2 * math.pi) * u[:, half:]
        z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return z[:, :count].reshape(shape).to(like)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        u = self._uniform64(shape[0], math.prod(shape[1:]), like.device).reshape(shape)
        eps = torch.finfo(like.dtype).eps
        return u.clamp(eps / 2, 1 - eps / 2).to(like)

    def _uniform64(self, num_samples: int, count: int, device: torch.device) -> Tensor:
        where = torch.device("cpu") if device.type == "mps" else device  # Apple's GPU has no float64
        if isinstance(self._start, Tensor):
            index = self._start.to(where)
            assert len(index) == num_samples
        else:
            index = torch.arange(self._start, self._start + num_samples, device=where)
        bits = hash_bits(self._seed, index, count, offset=self._position)
        self._position += count
        return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def fresh_noise() -> StreamNoise:
    """Unrepeatable noise, seeded by the operating system: what `generator=None` means."""
    return StreamNoise(secrets.randbits(63))


def hash_bits(seed: int, index: Tensor, count: int, offset: int = 0) -> Tensor:
    """Random 64-bit words as a function of (seed, index, position).

    Args:
        seed: any integer.
        index: `(N,)` int64, one independent stream each.
        count: words per stream.
        offset: position of the first word in its stream.

    Returns:
        `(N, count)` int64, all 64 bits random.
    """
    key = _mix(_mix(torch.full_like(index, _signed(seed))) + index * _GOLDEN)
    position = torch.arange(offset + 1, offset + count + 1, device=index.device)
    return _mix(key[:, None] + position * _GOLDEN)


def derive_seed(seed: int, *parts: int) -> int:
    """A 63-bit seed for one purpose, from the run's seed and a few integers naming the purpose."""
    state = _mix(torch.tensor([_signed(seed)]) + _GOLDEN)  # hashed first: seed 0 for purpose 1 is not seed 1 for purpose 0
    for part in parts:
        state = _mix(state + _signed(part)) + _GOLDEN
    return int(_mix(state)) & ((1 << 63) - 1)


def _signed(value: int) -> int:
    """The 64-bit two's complement reading of an integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser; `>>` on int64 copies the sign, so the copied bits are masked away."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MULTIPLIER_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MULTIPLIER_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))
