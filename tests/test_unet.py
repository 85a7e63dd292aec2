"""Networks that know the time: the U-Net and the residual MLP."""

import math

import pytest
import torch
from torch import nn

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.networks.time_embedding import fourier_features
from src.networks.time_mlp import TimeMLP
from src.networks.unet import UNet

K = 3
LIKE = torch.zeros(())


def unet(shape=(1, 8, 8), condition_dim=0, **settings):
    torch.manual_seed(0)
    return UNet(shape, shape, **({"width": 8, "multipliers": (1, 2)} | settings), condition_dim=condition_dim)


def time_mlp(shape=(1, 8, 8), condition_dim=0):
    torch.manual_seed(0)
    return TimeMLP(shape, shape, width=16, num_blocks=2, condition_dim=condition_dim)


@torch.no_grad()
def awake(network):
    """The network after its layers that begin at zero have left it."""
    for weight in network.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.copy_(0.1 * SampleNoise(0).normal(tuple(weight.shape), weight))
    return network


def inputs(n=4, shape=(1, 8, 8), dtype=torch.float32):
    noise = SampleNoise(1)
    x = noise.normal((n, *shape), LIKE.to(dtype))
    return x, noise.uniform((n,), LIKE.to(dtype)), torch.eye(K)[torch.arange(n) % K]


both = pytest.mark.parametrize("make", [unet, time_mlp])


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 13, 13), (2, 9, 14)])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_image_keeps_its_size(shape, num_levels):
    network = awake(unet(shape, multipliers=(1, 2, 2)[:num_levels]))
    x, t, _ = inputs(2, shape)
    assert network(x, t).shape == x.shape
    assert network(x, t).isfinite().all()


def test_channels_of_the_output_may_be_others():
    network = UNet((3, 8, 8), (6, 8, 8), width=6, multipliers=(1, 3), num_blocks=2, num_attention_levels=2, dropout=0.1)
    assert network(*inputs(2, (3, 8, 8))[:2]).shape == (2, 6, 8, 8)
    assert TimeMLP((3, 8, 8), (5,), width=6, num_blocks=1)(*inputs(2, (3, 8, 8))[:2]).shape == (2, 5)


@both
@pytest.mark.parametrize("condition_dim", [0, K])
def test_answers_start_at_zero_and_the_gradient_reaches_every_parameter(make, condition_dim):
    network = make(condition_dim=condition_dim)
    x, t, condition = inputs()
    arguments = (x, t, condition if condition_dim else None)
    assert not network(*arguments).any()
    awake(network)(*arguments).square().sum().backward()
    assert not [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_gradient_reaches_attention_and_every_block_of_a_deeper_net():
    network = awake(unet(num_blocks=2, num_attention_levels=2, multipliers=(1, 2, 3)))
    network(*inputs()[:2]).square().sum().backward()
    assert all(weight.grad.any() for weight in network.parameters())


@both
def test_time_and_condition_are_learned(make):
    """Of examples that are all alike nothing else can tell the targets apart."""
    network = make((1, 8, 8), K)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    _, t, condition = inputs(12)
    x = torch.zeros(12, 1, 8, 8)
    target = ((2 * t - 1)[:, None] * (condition @ torch.tensor([[-1.0], [0.0], [1.0]])))[:, :, None, None].expand_as(x)
    for _ in range(40):
        loss = (network(x, t, condition) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * target.square().mean()


@both
def test_no_condition_is_one_of_zeros(make):
    network = awake(make(condition_dim=K))
    x, t, condition = inputs()
    torch.testing.assert_close(network(x, t), network(x, t, torch.zeros_like(condition)), rtol=0, atol=0)
    assert not torch.equal(network(x, t), network(x, t, condition))


@both
def test_an_example_does_not_depend_on_the_others(make):
    network = awake(make(condition_dim=K)).train()
    x, t, condition = inputs()
    alone = torch.cat([network(*(some[i : i + 1] for some in (x, t, condition))) for i in range(len(x))])
    torch.testing.assert_close(network(x, t, condition), alone, rtol=1e-4, atol=1e-5)


@both
def test_float64_works_and_is_smooth(make):
    network = awake(make()).double()
    x, t, _ = inputs(1, dtype=torch.float64)
    assert network(x, t).dtype == torch.float64
    assert network(x, t.float()).dtype == torch.float64
    direction, h = torch.ones_like(x), 1e-5
    _, slope = torch.autograd.functional.jvp(lambda x: network(x, t), x, direction)
    difference = (network(x + h * direction, t) - network(x - h * direction, t)) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)


def test_attention_mixes_all_pixels_of_the_image_and_nothing_else_does():
    """Without attention the middle of a small net sees only so far."""
    x, t, _ = inputs(1, (1, 32, 32))

    def reach(num_attention_levels):
        network = awake(unet((1, 32, 32), multipliers=(1, 1), num_attention_levels=num_attention_levels)).eval()
        for module in network.modules():  # a group's mean would see all pixels, too
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x
        given = x.clone().requires_grad_()
        network(given, t)[0, 0, 0, 0].backward()
        return bool(given.grad[0, 0, -1, -1] != 0)

    assert reach(1)
    assert not reach(0)


def test_fourier_features_are_sines_and_cosines_of_growing_frequencies():
    features = fourier_features(torch.tensor([0.0, 0.5]), 3, 16.0)
    angles = [0.5, 2.0, 8.0]
    expected = [[0.0] * 3 + [1.0] * 3, [*map(math.sin, angles), *map(math.cos, angles)]]
    torch.testing.assert_close(features, torch.tensor(expected))
    assert fourier_features(torch.tensor([0.5], dtype=torch.bfloat16), 2, 16.0).dtype == torch.float32


def test_a_thousand_times_are_told_apart():
    features = fourier_features(torch.linspace(0, 1, 1001), 32, 256.0)
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("shape", [(2,), (1, 7, 7), (784,)])
def test_unet_refuses_what_is_no_image(shape):
    with pytest.raises(UserError, match=r"U-Net, which takes images.*network=time_mlp"):
        unet(shape)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 0}, "width=0"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, r"multipliers\[1\]=0"),
        ({"multipliers": (1, 1, 1, 1)}, "fewer multipliers"),
        ({"num_attention_levels": 3}, "num_attention_levels=3"),
        ({"num_attention_levels": -1}, "num_attention_levels=-1"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        unet(**settings)


@pytest.mark.parametrize("settings", [{"width": 0}, {"num_blocks": 0}])
def test_time_mlp_refuses_sizes_that_cannot_be(settings):
    with pytest.raises(UserError, match="must be a whole number of at least 1"):
        TimeMLP((2,), (2,), **settings)
