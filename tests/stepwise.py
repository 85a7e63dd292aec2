"""Small flow matching and diffusion models for tests, with weights that answer something."""

from typing import Any

import torch
from torch import Tensor, nn

from src.core.rng import SampleNoise
from src.core.spec import DataSpec
from src.models.diffusion import Diffusion
from src.models.flow_matching import FlowMatching
from src.models.stepwise import Stepwise
from src.networks.time_mlp import TimeMLP
from src.objectives.diffusion import EDM, LogNormal
from src.objectives.matching import StandardNormal, StraightPath
from src.objectives.transport import Independent
from src.samplers.ode import Adaptive, Heun

__all__ = ["KINDS", "CountedNetwork", "diffusion", "flow_matching", "network"]


class CountedNetwork(TimeMLP):
    """Counts the examples that it is evaluated at."""

    num_rows = 0

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        assert t.shape == (len(x),)
        assert condition is None or condition.shape[:1] == t.shape
        self.num_rows += len(x)
        return super().forward(x, t, condition)


def network(in_shape: tuple[int, ...], out_shape: tuple[int, ...], condition_dim: int) -> nn.Module:
    return CountedNetwork(in_shape, out_shape, width=16, num_blocks=1, condition_dim=condition_dim)


def flow_matching(spec: DataSpec, **given: Any) -> FlowMatching:
    parts = {"path": StraightPath(), "source": StandardNormal(), "coupling": Independent(), "sampler": Heun(6)}
    return _awake(FlowMatching(spec, network, **(parts | {"likelihood_solver": Adaptive(1e-4, 1e-4)} | given)))


def diffusion(spec: DataSpec, **given: Any) -> Diffusion:
    noise = LogNormal(mean=-1.2, std=1.2, sigma_max=80.0, sigma_min=0.002, rho=7.0)
    parts = {"prediction": EDM(0.5), "noise": noise, "sampler": Heun(6)}
    return _awake(Diffusion(spec, network, **(parts | {"likelihood_solver": Adaptive(1e-4, 1e-4)} | given)))


KINDS = {"flow_matching": flow_matching, "diffusion": diffusion}


@torch.no_grad()
def _awake(model: Stepwise) -> Any:
    for i, (name, weight) in enumerate(model.named_parameters()):
        scale = 0.02 if "embedding.first" in name else 0.3  # smooth in time, as trained networks are
        weight.copy_(scale * SampleNoise(i).normal(tuple(weight.shape), weight))
    return model.eval()
