"""R3GAN's networks: shapes, the identity at the start, and derivatives of derivatives."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.networks.norm_free import NormFreeDiscriminator, NormFreeGenerator, ResidualBlock

pytestmark = pytest.mark.usefixtures("same_weights")

SIDES = [8, 13, 28, 32, 45, 64, 128]
CONDITION_DIM = 3

sides = pytest.mark.parametrize("side", SIDES)
conditions = pytest.mark.parametrize("condition_dim", [0, CONDITION_DIM], ids=["unconditional", "conditional"])


def random(*shape: int) -> Tensor:
    return SampleNoise(0).normal(shape, torch.zeros(()))


def one_hot(condition_dim: int, n: int) -> Tensor | None:
    return torch.eye(condition_dim, dtype=torch.int64)[torch.arange(n) % condition_dim] if condition_dim else None


def generator(shape: tuple[int, ...], condition_dim: int = 0) -> NormFreeGenerator:
    return NormFreeGenerator((5,), shape, width=4, max_width=8, group_size=4, condition_dim=condition_dim)


def discriminator(shape: tuple[int, ...], condition_dim: int = 0) -> NormFreeDiscriminator:
    return NormFreeDiscriminator(shape, (2, 5), width=4, max_width=8, group_size=4, condition_dim=condition_dim)


def blocks(network: nn.Module) -> list[ResidualBlock]:
    return [module for module in network.modules() if isinstance(module, ResidualBlock)]


def awake(network: nn.Module) -> nn.Module:
    """The network as if trained: no weight is zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@sides
@conditions
def test_generator_gives_square_images_of_8_to_128_pixels(side, condition_dim):
    images = generator((3, side, side), condition_dim)(random(2, 5), one_hot(condition_dim, 2))
    assert images.shape == (2, 3, side, side)


@sides
@conditions
def test_discriminator_takes_square_images_of_8_to_128_pixels(side, condition_dim):
    network, x = discriminator((3, side, side), condition_dim), random(2, 3, side, side)
    features = network.features(x, one_hot(condition_dim, 2))
    assert features.shape == (2, network.num_features)
    out = network(x, one_hot(condition_dim, 2))
    assert out.shape == (2, 2, 5)
    torch.testing.assert_close(network.head(features), out.flatten(1))


@pytest.mark.parametrize("make", [generator, discriminator])
def test_other_shapes_are_refused(make):
    with pytest.raises(UserError, match=r"square images with a side of 8 to 128 pixels.*gives 1x8x9 "):
        make((1, 8, 9))


@sides
def test_every_pixel_reaches_the_discriminator_and_the_code_every_pixel(side):
    x = random(1, 1, side, side).requires_grad_()
    awake(discriminator((1, side, side)))(x).square().sum().backward()
    assert (x.grad != 0).all()
    with torch.no_grad():
        assert (awake(generator((1, side, side)))(random(8, 5)).std(0) > 0).all()


def test_condition_changes_the_output_of_both():
    classes = one_hot(CONDITION_DIM, 3)
    out = discriminator((1, 8, 8), CONDITION_DIM)(random(1, 1, 8, 8).expand(3, -1, -1, -1), classes)
    images = generator((1, 8, 8), CONDITION_DIM)(random(1, 5).expand(3, -1), classes)
    assert not torch.isclose(out[0], out[1]).any()
    assert not torch.isclose(images[0], images[1]).all()


def test_every_block_is_the_identity_at_the_start():
    network = discriminator((1, 32, 32))
    found = blocks(network)
    assert len(found) == 2 * 4  # 32, 16, 8 and 4 pixels
    for block in found:
        x = random(2, block.widen.in_channels, 6, 6)
        assert torch.equal(block(x), x)
        assert not torch.equal(awake(block)(x), x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [generator, discriminator])
@conditions
def test_only_blocks_wait_for_a_gradient_and_only_until_the_first_step(make, condition_dim):
    network = make((3, 28, 28), condition_dim)
    x = random(8, 3, 28, 28) if make is discriminator else random(8, 5)

    def idle() -> set[str]:
        network.zero_grad()
        network(x, one_hot(condition_dim, 8)).square().sum().backward()
        return {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}

    inner = ("widen.weight", "widen.bias", "mix.weight", "mix.bias")
    assert idle() == {name for name, _ in network.named_parameters() if name.endswith(inner)}
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    assert not idle()


@torch.no_grad()
def test_initial_weights_have_the_variance_of_fixup():
    network = NormFreeDiscriminator((1, 32, 32), (1,), width=64, max_width=128)
    block = network.stages[2][0]
    num_blocks, gain = 8, (2 / (1 + 0.2**2)) ** 0.5
    for layer, fan_in in ((block.widen, 128), (block.mix, 16 * 9)):
        expected = gain / fan_in**0.5 * num_blocks**-0.25
        assert abs(float(layer.weight.std()) / expected - 1) < 0.05
        assert not layer.bias.any()
    assert abs(float(network.contraction.weight.std()) * 4 - 1) < 0.05  # fan-in 16


@torch.no_grad()
def test_signal_keeps_its_size_whatever_the_depth():
    shallow, deep = (
        NormFreeGenerator((32,), (3, 32, 32), width=16, max_width=32, num_blocks=n)(random(64, 32)).std() for n in (1, 8)
    )
    assert 0.2 < float(shallow) < 2
    assert 0.2 < float(deep) < 2


@conditions
def test_gradient_penalty_has_finite_gradients_everywhere(condition_dim):
    network = awake(discriminator((1, 13, 13), condition_dim))
    x = random(4, 1, 13, 13).requires_grad_()
    logits = network(x, one_hot(condition_dim, 4))
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    (logits.sum() + slope.square().sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


@pytest.mark.usefixtures("float64")
def test_second_derivatives_are_right():
    block = awake(ResidualBlock(2, 4, group_size=2, scale=1.0))
    assert torch.autograd.gradgradcheck(block, (random(1, 2, 3, 3).requires_grad_(),))


def test_no_module_normalises():
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
    for network in (generator((1, 28, 28)), discriminator((1, 28, 28))):
        assert not any(isinstance(module, norms) for module in network.modules())
        assert not list(network.buffers())


def test_networks_say_that_they_overflow_in_float16():
    assert NormFreeGenerator.overflows_in_float16
    assert NormFreeDiscriminator.overflows_in_float16


def test_number_of_parameters_is_that_of_the_formula():
    network = NormFreeDiscriminator((3, 32, 32), (1,), width=32, max_width=64)

    def block(c: int) -> int:
        hidden = 2 * c
        return (c * hidden + hidden) + (hidden * 16 * 9 + hidden) + hidden * c

    expected = 3 * 32 + 2 * block(32) + 32 * 64 + 3 * 2 * block(64) + 64 * 16 + 64 + 1
    assert sum(p.numel() for p in network.parameters()) == expected


def test_widths_that_give_uneven_groups_are_refused():
    with pytest.raises(UserError, match=r"40 channels \(width=20, widened\).*group_size=16"):
        NormFreeGenerator((5,), (1, 28, 28), width=20, max_width=80)


@pytest.mark.parametrize("make", [generator, discriminator])
def test_examples_do_not_depend_on_their_batch(make):
    network = awake(make((1, 13, 13)))
    x = random(4, 1, 13, 13) if make is discriminator else random(4, 5)
    apart = torch.cat([network(one[None]) for one in x])
    torch.testing.assert_close(apart, network(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [generator, discriminator])
def test_copy_is_equal_and_its_own(make):
    network = awake(make((1, 8, 8)))
    twin = copy.deepcopy(network)
    x = random(2, 1, 8, 8) if make is discriminator else random(2, 5)
    before = network(x)
    assert torch.equal(twin(x), before)
    awake(twin)
    assert torch.equal(network(x), before)
