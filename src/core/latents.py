"""Latent vectors of N(0, I): ways between two of them, and their truncation.

References:
    Shoemake 1985, "Animating rotation with quaternion curves", SIGGRAPH: slerp.
    White 2016, "Sampling generative networks", arXiv:1609.04468: between latents go along the sphere, since N(0, I) in many
        dimensions lies near one, and the middle of a straight line does not.
    Brock, Donahue, Simonyan 2019, "Large scale GAN training for high fidelity natural image synthesis", arXiv:1809.11096:
        the truncation of z.
"""

import math

import torch
from torch import Tensor

from src.core.errors import NotApplicable
from src.core.rng import Noise

__all__ = ["BetweenNoise", "TruncatedNoise", "lerp", "slerp", "truncate_normal"]

_LEAST_SINE = 1e-6  # of an angle that is told from 0 and from 180 degrees


def lerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The straight line (1 - t) a + t b; its ends are exact."""
    return (1 - share) * start + share * end


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The arc sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b between rows `(B, ...)`, w their angle; its ends are exact.

    Rows of one direction, of opposite ones or of zeros span no arc: between them the line is straight.
    """
    a, b = _to_float64(start.flatten(1)), _to_float64(end.flatten(1))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()[:, None]
    sine = angle.sin()
    arc = (((1 - share) * angle).sin() / sine) * a + ((share * angle).sin() / sine) * b
    has_arc = sine > _LEAST_SINE  # false for nan, the angle of zeros
    return torch.where(has_arc, arc, lerp(a, b, share)).reshape(start.shape).to(start)


def truncate_normal(z: Tensor, bound: float) -> Tensor:
    """N(0, 1) values to N(0, 1) values given |z| <= bound, in the same order: what redrawing the others gives.

    It is the inverse of the truncated distribution function at the value of the plain one, Phi(z), so that each value
    depends on one draw alone.
    """
    inside = math.erf(bound / math.sqrt(2))  # P(|z| <= bound)
    truncated = math.sqrt(2) * torch.erfinv(torch.erf(_to_float64(z) / math.sqrt(2)) * inside)
    return truncated.to(z).clamp(-bound, bound)


class TruncatedNoise(Noise):
    """The noise of another source, its normal values truncated to |z| <= bound."""

    def __init__(self, noise: Noise, bound: float) -> None:
        self._noise = noise
        self._bound = bound

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return truncate_normal(self._noise.normal(shape, like), self._bound)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._noise.uniform(shape, like)


class BetweenNoise(Noise):
    """Every normal draw on the arc between the draws of two sources: at share = 0 the first's, at 1 the second's."""

    def __init__(self, start: Noise, end: Noise, share: float) -> None:
        self._start = start
        self._end = end
        self._share = share

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return slerp(self._start.normal(shape, like), self._end.normal(shape, like), self._share)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        raise NotApplicable("it draws from uniform noise, between two values of which there is no natural way")


def _to_float64(z: Tensor) -> Tensor:
    """On the CPU what is on Apple's GPU, which has no float64; all else where it is."""
    return (z.cpu() if z.device.type == "mps" else z).double()
