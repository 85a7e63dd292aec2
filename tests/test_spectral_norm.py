"""Spectral normalization against singular values: what is divided by what, when it moves, and its gradient."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.networks.residual import ResidualDiscriminator
from src.networks.spectral_norm import normalize_spectra

pytestmark = pytest.mark.usefixtures("same_weights")


def random(*shape: int) -> Tensor:
    return SampleNoise(0).normal(shape, torch.zeros(()))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), random(2, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), random(2, 3, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 4), random(2, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(5, 7), torch.tensor([0, 4])),
}
layers = pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=list(LAYERS))


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A row for each output."""
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1)


def largest(layer: nn.Module, weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix(layer, weight))[0]


def normalised(network: nn.Module) -> nn.Module:
    normalize_spectra(network)
    return network


class Halved(nn.Module):
    """A parametrization of our own, as an equalized learning rate is."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@torch.no_grad()
@layers
def test_weight_is_divided_by_its_largest_singular_value(make, x):
    layer = make()
    raw = layer.weight.detach().clone()
    normalize_spectra(layer)
    for _ in range(50):
        layer(x)
    torch.testing.assert_close(layer.weight, raw / largest(layer, raw), rtol=1e-3, atol=1e-6)
    assert abs(largest(layer, layer.weight) - 1) < 1e-3


@torch.no_grad()
def test_every_weight_of_a_network_has_norm_one():
    network = normalised(ResidualDiscriminator((1, 8, 8), (1,), width=4))
    for _ in range(50):
        network(random(2, 1, 8, 8))
    weighted = [m for m in network.eval().modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(weighted) == 2 + 1 + 2 + 2 + 1
    assert all(abs(largest(layer, layer.weight) - 1) < 1e-3 for layer in weighted)


@torch.no_grad()
def test_one_forward_pass_in_training_mode_is_one_power_iteration():
    layer = normalised(nn.Linear(6, 4))
    raw, norm = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    u = raw @ norm._v
    u = u / u.norm()
    v = raw.T @ u
    layer(random(2, 6))
    torch.testing.assert_close(norm._u, u)
    torch.testing.assert_close(norm._v, v / v.norm())


@torch.no_grad()
@layers
def test_nothing_moves_in_evaluation_mode(make, x):
    layer = normalised(make()).eval()
    before = copy.deepcopy(layer.state_dict())
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@pytest.mark.usefixtures("float64")
@layers
def test_gradient_agrees_with_finite_differences(make, x):
    layer = normalised(make()).eval()  # u and v are held fixed
    parameters = [layer.parametrizations.weight.original]
    x = x.double() if x.is_floating_point() else x

    def output(raw: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"parametrizations.weight.original": raw}, x)

    assert torch.autograd.gradcheck(output, parameters)


@pytest.mark.usefixtures("float64")
def test_gradient_is_that_of_the_papers_equation():
    layer = normalised(nn.Linear(6, 4, bias=False)).eval()
    raw, norm = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    upstream = random(4, 6).double()
    (layer.weight * upstream).sum().backward()
    with torch.no_grad():
        sigma = norm._u @ raw @ norm._v
        expected = (upstream - (upstream * layer.weight).sum() * torch.outer(norm._u, norm._v)) / sigma
    torch.testing.assert_close(raw.grad, expected)


def test_two_passes_have_one_backward_pass():
    network = normalised(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)))
    x = random(3, 6).requires_grad_()
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    (network(x).mean() + network(-x).mean() + slope.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert network[0].parametrizations.weight.original.grad.any()


@torch.no_grad()
def test_normalization_goes_on_top_of_another_parametrization():
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", Halved())
    raw = layer.parametrizations.weight.original.clone()
    normalize_spectra(layer)
    for _ in range(50):
        layer(random(2, 6))
    assert torch.equal(layer.parametrizations.weight.original, raw)
    torch.testing.assert_close(layer.weight, raw / largest(layer, raw), rtol=1e-3, atol=1e-6)
    assert math.isclose(layer.parametrizations.weight[1]._u.norm(), 1, rel_tol=1e-5)


@torch.no_grad()
def test_initial_state_depends_on_the_seed_alone_and_holds_only_tensors():
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return normalised(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(isinstance(value, Tensor) for value in first.values())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.parametrizations.weight.0._u"], other["0.parametrizations.weight.0._u"])


@torch.no_grad()
def test_saved_state_and_deep_copy_give_the_same_output():
    network, x = normalised(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))), random(2, 6)
    twin, other = copy.deepcopy(network), normalised(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)))
    before = network(x)
    assert torch.equal(twin(x), before)  # its own u and v took the same step
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.eval()(x), network.eval()(x))


def test_other_layers_are_left_alone():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.PReLU(), nn.LayerNorm(4))
    keys = list(network.state_dict())
    assert list(normalised(network).state_dict()) == keys


def test_a_weight_of_zeros_is_refused_by_name():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    nn.init.zeros_(network[1].weight)
    with pytest.raises(UserError, match=r"1\.weight starts at zero.*spectral_norm=false"):
        normalize_spectra(network)
