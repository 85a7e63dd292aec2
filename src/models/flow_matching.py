"""Flow matching: a field, regressed onto velocities of paths from noise to data, that samples follow.

References:
    Lipman et al. 2023, "Flow matching for generative modeling", arXiv:2210.02747.
    Tong et al. 2024, "Improving and generalizing flow-based generative models with minibatch optimal transport",
        arXiv:2302.00482.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.shapes import sum_event
from src.core.spec import DataSpec
from src.models.stepwise import Stepwise, full_precision
from src.objectives.matching import Path, Source, matching_loss
from src.objectives.transport import Coupling, Independent
from src.samplers.ode import Solver, ode_log_prob, path_energy

__all__ = ["FlowMatching"]


class FlowMatching(Stepwise):
    """A continuous normalizing flow dx/dt = v(x, t), from the source at t = 0 to the data at t = 1.

    Args:
        spec: the data.
        network: v, called as `network(in_shape=, out_shape=, condition_dim=)`.
        path: between x0 and x1.
        source: distribution of x0.
        coupling: which x0 goes with which x1, in training.
        sampler: solver of samples.
        likelihood_solver: solver of the likelihood.
        divergence: "exact" or "hutchinson"; None for exact up to 16 dimensions.
        standardize: bring the data to mean 0 and standard deviation 1 first.
        conditional: give the class to the network.
        drop_condition: share of training examples whose class is left out; above 0 for guidance.
        guidance: weight of the condition in samples; 1 for none.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        path: Path,
        source: Source,
        coupling: Coupling,
        sampler: Solver,
        likelihood_solver: Solver,
        divergence: str | None = None,
        standardize: bool = True,
        conditional: bool = False,
        drop_condition: float = 0.0,
        guidance: float = 1.0,
    ) -> None:
        std = 1.0 if standardize else None
        super().__init__(spec, network, likelihood_solver, divergence, std, conditional, drop_condition, guidance)
        if not isinstance(sampler, Solver):
            raise UserError(
                "follows a field, by sampler=euler, heun or adaptive; the other samplers undo a diffusion's noise"
            )
        source.refuse(spec)
        if standardize and not source.is_standard_normal:
            raise UserError(
                "has a source in the units of the data, which therefore stay as they are: model.standardize=false"
            )
        self._path, self._source, self._coupling, self._sampler = path, source, coupling, sampler
        if source.is_standard_normal:
            self.latent_dim = spec.num_dims  # CanDecode: its samples are `decode(z)` of z ~ N(0, I)

    @property
    def objective(self) -> str:
        coupling, held_out = self._coupling.in_words, Independent.in_words  # see `_losses`
        pairs = coupling if coupling == held_out else f"{coupling}, {held_out} in evaluation"
        paths = f"{self._path.in_words}, {pairs}, from {self._source.in_words}"
        return self._in_words(f"|v - velocity|^2 / D on {paths}")

    def path_settings(self) -> dict[str, Any]:
        standardization = "none" if self._std is None else f"to mean 0 and standard deviation {self._std:g}"
        source = {"source": self._source.in_words, "standardization": standardization}
        return {**source, **self._likelihood_solver.settings()}

    @torch.no_grad()
    def path_energy_terms(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        """Of the paths that begin as samples do, followed by the solver of the likelihood; guided as samples are."""
        start = self._start(n, generator or fresh_noise())
        features = self._features(condition, start)
        with full_precision(start):
            end, energy = path_energy(self._answer, start, 0.0, 1.0, self._likelihood_solver, features, self.scale)
        displacement = sum_event((self.scale * (end - start)).square())
        return {"displacement": displacement, "bend": energy - displacement}

    def _start(self, n: int, generator: Noise) -> Tensor:
        return self._source.sample((n, *self._spec.shape), self.shift, generator)

    def _follow(
        self, start: Tensor, generator: Noise, features: tuple[Tensor, ...], known: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if known is None:
            return self._sampler.integrate(self._answer, start, 0.0, 1.0, features)
        mask, x1 = known

        def field(x: Tensor, t: Tensor, mask: Tensor, x0: Tensor, x1: Tensor, *features: Tensor) -> Tensor:
            return torch.where(mask, self._path.at(x0, x1, t)[1], self._answer(x, t, *features))

        return self._sampler.integrate(field, start, 0.0, 1.0, (mask, start, x1, *features))

    def _log_density(self, x: Tensor, features: tuple[Tensor, ...], generator: Noise) -> Tensor:
        return ode_log_prob(
            self._in_likelihood,
            x,
            1.0,
            0.0,
            self._source.log_prob,
            self._likelihood_solver,
            divergence=self._divergence,
            generator=generator,
            context=features,
        )

    def _losses(self, x: Tensor, condition: Tensor | None, u: Tensor, generator: Noise) -> Tensor:
        x0 = self._source.sample(tuple(x.shape), x, generator)
        if self.training:  # held out, the loss of an example shall not depend on its batch
            x0 = x0[self._coupling.order(x0, x, condition)]
        x_t, target = self._path.at(x0, x, u)
        return matching_loss(self._in_training(x_t, u, condition, generator), target)

    def _sampling(self) -> dict[str, Any]:
        return self._sampler.settings()

    def _with_steps(self, steps: int) -> None:
        self._sampler = self._sampler.with_steps(steps)
