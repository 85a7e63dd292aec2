"""Diffusion: a network learns to denoise at every noise level, and samples lose their noise by and by.

All is in the coordinates x = x0 + sigma z (`objectives.diffusion`): EDM, and DDPM with epsilon or v prediction, differ in
what the network predicts and in the noise levels alone.

References:
    Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models", arXiv:2006.11239.
    Song et al. 2021, "Score-based generative modeling through stochastic differential equations", arXiv:2011.13456: the
        likelihood by the probability flow.
    Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", arXiv:2206.00364.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from src.core.rng import Noise
from src.core.shapes import sum_event
from src.core.spec import DataSpec
from src.models.stepwise import Stepwise
from src.objectives.diffusion import Noising, Prediction
from src.objectives.matching import matching_loss
from src.samplers.diffusion import ProbabilityFlow, UndoesNoise, flow_log_prob
from src.samplers.ode import Solver

__all__ = ["Diffusion"]


class Diffusion(Stepwise):
    """A denoiser D(x; sigma), and a sampler that asks it.

    Samples begin with N(0, (sigma_max^2 + sigma_data^2) I). The likelihood is that of the probability flow from there to
    the lowest noise level: of samples that still have that noise.

    Args:
        spec: the data.
        network: called as `network(in_shape=, out_shape=, condition_dim=)`.
        prediction: what the network predicts.
        noise: its noise levels.
        sampler: an ODE solver for the probability flow, or one of `samplers.diffusion`.
        likelihood_solver: solver of the likelihood.
        divergence: "exact" or "hutchinson"; None for exact up to 16 dimensions.
        standardize: bring the data to mean 0 and the standard deviation that `prediction` is made for.
        conditional: give the class to the network.
        drop_condition: share of training examples whose class is left out; above 0 for guidance.
        guidance: weight of the condition in samples; 1 for none.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        prediction: Prediction,
        noise: Noising,
        sampler: Solver | UndoesNoise,
        likelihood_solver: Solver,
        divergence: str | None = None,
        standardize: bool = True,
        conditional: bool = False,
        drop_condition: float = 0.0,
        guidance: float = 1.0,
    ) -> None:
        std = prediction.sigma_data if standardize else None
        super().__init__(spec, network, likelihood_solver, divergence, std, conditional, drop_condition, guidance)
        self._prediction, self._noise = prediction, noise
        self._sampler = ProbabilityFlow(sampler) if isinstance(sampler, Solver) else sampler
        self._start_scale = math.hypot(noise.level(0.0), prediction.sigma_data)
        if self._sampler.is_deterministic:
            self.latent_dim = spec.num_dims  # CanDecode: its samples are `decode(z)` of z ~ N(0, I)

    @property
    def objective(self) -> str:
        return self._in_words(f"|F - target|^2 / D, {self._prediction.in_words} prediction at {self._noise.in_words}")

    def _start(self, n: int, generator: Noise) -> Tensor:
        return self._start_of(generator.normal((n, *self._spec.shape), like=self.shift))

    def _start_of(self, z: Tensor) -> Tensor:
        return self._start_scale * z

    def _follow(
        self, start: Tensor, generator: Noise, features: tuple[Tensor, ...], known: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor, *features: Tensor) -> Tensor:
            return self._denoised(self._answer, x, sigma, features)

        def denoise_unknown(x: Tensor, sigma: Tensor, mask: Tensor, x0: Tensor, *features: Tensor) -> Tensor:
            return torch.where(mask, x0, denoise(x, sigma, *features))

        if known is None:
            return self._sampler.undo(denoise, start, self._noise.level, generator, features)
        return self._sampler.undo(denoise_unknown, start, self._noise.level, generator, (*known, *features))

    def _denoised(self, answer: Callable[..., Tensor], x: Tensor, sigma: Tensor, features: tuple[Tensor, ...]) -> Tensor:
        """D(x; sigma) by a network `answer(x, t, *features)`."""
        c = self._prediction.coefficients(_each(sigma, x))
        return c.skip * x + c.out * answer(c.scale * x, c.noise.flatten(), *features)

    def _log_density(self, x: Tensor, features: tuple[Tensor, ...], generator: Noise) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor, *features: Tensor) -> Tensor:
            return self._denoised(self._in_likelihood, x, sigma, features)

        def start_log_prob(x: Tensor) -> Tensor:
            constant = 0.5 * self._spec.num_dims * math.log(2 * math.pi * self._start_scale**2)
            return sum_event(-0.5 * (x / self._start_scale).square()) - constant

        return flow_log_prob(
            self._likelihood_solver,
            denoise,
            x,
            self._noise.level(1.0),
            self._noise.level(0.0),
            start_log_prob,
            divergence=self._divergence,
            generator=generator,
            context=features,
            levels=lambda u: self._noise.level(1 - u),
        )

    def _losses(self, x: Tensor, condition: Tensor | None, u: Tensor, generator: Noise) -> Tensor:
        sigma = _each(self._noise.draw(u), x)
        noisy = x + sigma * generator.normal(tuple(x.shape), like=x)
        c = self._prediction.coefficients(sigma)
        answer = self._in_training(c.scale * noisy, c.noise.flatten(), condition, generator)
        return matching_loss(answer, self._prediction.target(noisy, sigma, x))

    def _sampling(self) -> dict[str, Any]:
        return self._sampler.settings()

    def _with_steps(self, steps: int) -> None:
        self._sampler = self._sampler.with_steps(steps)


def _each(sigma: Tensor, x: Tensor) -> Tensor:
    """`(B,)` to `(B, 1, ...)`, to be broadcast against x `(B, *E)`."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))
